"""The server over loopback: rows of many tasks share batches, every answer is its adapter's, errors are clear."""

import http.client
import json
import shutil
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import uvicorn
from fastapi import HTTPException
from peft import PeftModel, get_peft_model
from serve_many import Batcher, load_tasks, main, make_app, parse_args
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_lntune import LNTuningConfig
from tests.adapted import fill

TASKS = ("sentiment", "topic", "spam")
TEXTS = ["the soup was cold", "the film", "a b c d e f", "the"]
ROWS = [(task, text) for text in TEXTS for task in TASKS]


@pytest.fixture(scope="module")
def adapters(tiny_bert, tmp_path_factory):
    """A folder with an adapter for each task, one of three labels, and a damaged one."""
    folder = tmp_path_factory.mktemp("server") / "adapters"
    for seed, (task, labels) in enumerate([*((task, 2) for task in TASKS), ("ternary", 3), ("damaged", 2)]):
        base = AutoModelForSequenceClassification.from_pretrained(
            tiny_bert, num_labels=labels, ignore_mismatched_sizes=True
        )
        model = get_peft_model(base, LNTuningConfig(modules_to_save=["pooler", "classifier"]))
        fill(model, "default", std=1.0, seed=seed)
        model.save_pretrained(folder / task)
    weights = folder / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    shutil.copytree(folder / "topic", folder.parent / "outside")
    (folder / "link").symlink_to(folder.parent / "outside")
    return folder


@pytest.fixture(scope="module")
def expected(tiny_bert, adapters):
    """The probabilities that each adapter alone gives each text."""
    tokenizer, found = AutoTokenizer.from_pretrained(tiny_bert), {}
    for task in TASKS:
        base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
        model = PeftModel.from_pretrained(base, adapters / task).eval()
        with torch.no_grad():
            for text in TEXTS:
                logits = model(**tokenizer(text, return_tensors="pt")).logits
                found[task, text] = logits.softmax(-1)[0].tolist()
    return found


@pytest.fixture
def options(tiny_bert, adapters):
    return ["--adapters", str(adapters), "--model", tiny_bert, "--max-tokens", "12", "--capacity", "1"]


class Client:
    """Asks a server on this machine; a connection a question, as many clients would."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def classify(self, task, *texts):
        return self("POST", "/classify", {"task": task, "texts": list(texts)})


@contextmanager
def served(tasks, **settings):
    """The app on a free port, in a thread; stopped as a signal stops it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = make_app(tasks, **settings)
        server = uvicorn.Server(uvicorn.Config(app, ws="none", log_config=None, timeout_graceful_shutdown=10))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield Client(listening.getsockname()[1]), server
        finally:
            server.should_exit = True
            thread.join()


def test_concurrent_clients_share_batches_and_get_their_own_answers(options, expected):
    tasks = load_tasks(parse_args(options))
    together = threading.Barrier(len(ROWS))

    def ask(row):
        together.wait()
        return client.classify(*row)

    with served(tasks, max_rows=8, max_wait=0.3) as (client, _), ThreadPoolExecutor(len(ROWS)) as pool:
        assert client("GET", "/state")[1] == {"tasks": [], "batches": 0, "rows": 0}
        said = list(pool.map(ask, ROWS))
        state = client("GET", "/state")[1]
    for row, (status, answer) in zip(ROWS, said, strict=True):
        assert status == 200, answer
        assert answer["scores"] == [pytest.approx(expected[row], abs=1e-5)]
        assert answer["labels"] == [max((0, 1), key=expected[row].__getitem__)]
    assert sorted(state["tasks"]) == sorted(TASKS)  # each loaded once, when it was first named
    assert state["rows"] == len(ROWS)
    assert state["batches"] < len(ROWS) / 2


def test_several_texts_of_one_request(options, expected):
    with served(load_tasks(parse_args(options))) as (client, _):
        status, answer = client.classify("topic", *TEXTS)
    assert status == 200
    assert answer["scores"] == [pytest.approx(expected["topic", text], abs=1e-5) for text in TEXTS]


def test_clear_errors_and_the_server_goes_on(options, expected, caplog):
    tasks = load_tasks(parse_args(options))
    with served(tasks, max_rows=3) as (client, _):
        for task, texts, status, message in [
            ("nobody", ["the"], 404, "there is no adapter for the task 'nobody'"),
            ("../outside", ["the"], 400, "'../outside' is no task"),
            ("link", ["the"], 400, "'link' is no task"),
            ("/etc", ["the"], 400, "no path"),
            ("topic/../topic", ["the"], 400, "no path"),
            ("..", ["the"], 400, "no path"),
            ("", ["the"], 400, "no path"),
            ("__base__", ["the"], 400, "is no task"),
            ("x" * 5000, ["the"], 400, "up to 100 letters"),
            ("topic", ["the " * 12], 413, "text 0 has 14 tokens; 12 fit"),
            ("topic", ["the", "x" * 100_000], 413, "text 1 has 100,000 characters; 12 tokens fit"),
            ("topic", ["the"] * 4, 413, "4 texts in one request; 3 fit"),
            ("damaged", ["the"], 500, "the adapter of 'damaged' cannot be used"),
            ("ternary", ["the"], 500, "classifier.bias is (3,) there and (2,) here. See --num-labels"),
        ]:
            found, answer = client.classify(task, *texts)
            assert (found, message in answer["detail"]) == (status, True), answer
        assert client.classify("topic")[0] == 422  # no texts
        assert client("POST", "/classify", {"task": "topic"})[0] == 422
        assert "is damaged or cut off" in caplog.text
        assert tasks.bank.names == ["topic"]
        assert client.classify("topic", "the")[1]["scores"] == [pytest.approx(expected["topic", "the"], abs=1e-5)]


def test_it_stops_cleanly(options, expected):
    """What has been asked is answered, and no thread or attached bank stays behind."""
    threads, tasks = set(threading.enumerate()), load_tasks(parse_args(options))
    begun, go_on, run = threading.Event(), threading.Event(), tasks.run

    def slowly(*batch):
        begun.set()
        go_on.wait()
        return run(*batch)

    tasks.run = slowly
    with ThreadPoolExecutor(1) as pool:
        with served(tasks) as (client, server):
            asked = pool.submit(client.classify, "topic", "the")
            assert begun.wait(20)
            server.should_exit = True
            go_on.set()
        assert asked.result()[1]["scores"] == [pytest.approx(expected["topic", "the"], abs=1e-5)]
        with pytest.raises(OSError, match=r"refused|reset"):
            client.classify("topic", "the")
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= threads
    assert not any("forward" in module.__dict__ for module in tasks._model.modules())


class TestBatcher:
    def test_batches_are_filled_and_end_with_the_queue(self):
        seen, go_on = [], threading.Event()

        def run(tasks, rows):
            go_on.wait()
            seen.append(len(rows))
            return [[float(row["ids"][0])] for row in rows]

        batcher = Batcher(run, max_rows=4, max_wait=0.0)
        first = batcher.submit("a", {"ids": [0]})
        while not first.running():
            time.sleep(0.001)
        others = [batcher.submit("b", {"ids": [number]}) for number in range(1, 8)]
        assert others[2].cancel()  # its client has gone
        go_on.set()
        batcher.close()
        assert seen == [1, 3, 3]
        assert [answer.result() for answer in others if not answer.cancelled()] == [
            [1.0],
            [2.0],
            [4.0],
            [5.0],
            [6.0],
            [7.0],
        ]
        with pytest.raises(HTTPException) as stopping:
            batcher.submit("a", {"ids": [1]})
        assert stopping.value.status_code == 503

    def test_a_batch_that_fails_is_told_and_the_next_one_runs(self):
        def run(tasks, rows):
            if "bad" in tasks:
                raise RuntimeError("no memory")
            return [[1.0]] * len(rows)

        batcher = Batcher(run, max_rows=1, max_wait=0.0)
        bad: Future = batcher.submit("bad", {})
        good: Future = batcher.submit("good", {})
        with pytest.raises(RuntimeError, match="no memory"):
            bad.result(5)
        assert good.result(5) == [1.0]
        batcher.close()


class TestCommandLine:
    def test_it_serves_what_it_was_told(self, options, monkeypatch):
        seen = {}
        monkeypatch.setattr(uvicorn, "run", lambda app, **settings: seen.update(settings))
        main([*options, "--port", "1234"])
        assert (seen["host"], seen["port"]) == ("127.0.0.1", 1234)

    def test_errors_end_the_script_with_their_text(self, options, tmp_path, tiny_bert, capsys):
        with pytest.raises(SystemExit, match=r"error: no folder .*nowhere: --adapters has a directory for each task"):
            main(["--adapters", str(tmp_path / "nowhere")])
        with pytest.raises(SystemExit, match="error: no model 'no-such-model': "):
            main(["--adapters", str(tmp_path), "--model", "no-such-model"])
        with pytest.raises(SystemExit, match="error: --max-tokens 9999: this model takes 512 at most"):
            main([*options, "--max-tokens", "9999"])
        with pytest.raises(SystemExit, match="2"):
            main([*options, "--max-batch", "0"])
        assert "--max-batch should be at least 1" in capsys.readouterr().err
