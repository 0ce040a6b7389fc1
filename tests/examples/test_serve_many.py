"""The whole server, in processes of its own: answers, limits, changing adapters, bad clients, and its end."""

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_lntune import LNTuningConfig
from tests.adapted import fill

pytest.importorskip("ray.serve", reason="the server needs Ray: pip install -e '.[serve]'")
pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parents[2]
TASKS = ("sentiment", "topic", "spam")
TEXTS = ["the soup was cold", "the film", "a b c d e f", "the"]
ROWS = [(task, text) for text in TEXTS for task in TASKS]
REFRESH = 0.5


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


class Server:
    """A running server. Every question has a connection of its own, as from many clients."""

    def __init__(self, process, port, metrics_port, logs):
        self.process, self.port, self.metrics_port, self.logs = process, port, metrics_port, logs

    def __call__(self, method, path, body=None, headers=None, **options):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read all
                connection.request(method, path, body, headers or {}, **options)
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text)
        finally:
            connection.close()

    def classify(self, task, *texts):
        return self("POST", "/classify", json.dumps({"task": task, "texts": list(texts)}))

    def state(self):
        return self("GET", "/state")[1]

    def metrics(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=20)
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()

    def log_lines(self):
        """The lines that the replica has logged, from JSON."""
        files = list(self.logs.rglob("replica_*.log"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def memory(self):
        """Bytes of the replica."""
        psutil = pytest.importorskip("psutil")
        [process] = {line["process"] for line in self.log_lines()}
        return psutil.Process(process).memory_info().rss


def free_ports(count):
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    return ports


def until(condition, seconds=20.0):
    """Wait for something that must come true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)
    return found


@contextmanager
def running(folder, model, logs, *options):
    """A server that is ready; ended by SIGTERM."""
    port, metrics_port = free_ports(2)
    command = [sys.executable, "examples/serve_many.py", "--adapters", folder, "--model", model, "--log-dir", logs]
    ports = ["--port", str(port), "--metrics-port", str(metrics_port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        for _ in range(3):  # Ray gives a node thirty seconds to start, which a busy machine may exceed
            with (logs.parent / "console.txt").open("w") as console:
                process = subprocess.Popen(
                    [*map(str, command), *ports, *options], cwd=ROOT, env=environment, stdout=console, stderr=console
                )
            server = Server(process, port, metrics_port, logs)

            def up(server=server):
                # Nothing listens yet, or a proxy that knows no application.
                with suppress(OSError, ValueError, http.client.HTTPException):
                    return server("GET", "/readyz") == (200, {"status": "ok"}) or server.process.poll() is not None
                return server.process.poll() is not None

            until(up, 240)
            if process.poll() is None or "timed out during startup" not in Path(console.name).read_text():
                break
        assert process.poll() is None, console.name
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(120)


@pytest.fixture(scope="module")
def server(adapters, tiny_bert, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs") / "lines"
    limits = ["--max-tokens=12", "--max-batch=8", "--max-body=100000", "--max-seconds=8", "--memory=1"]
    limits += ["--max-texts=64", "--max-texts-per-task=20", f"--refresh={REFRESH}", "--max-wait=50"]
    with running(adapters, tiny_bert, logs, *limits) as server:
        yield server


def test_fifty_clients_share_batches_and_get_their_own_answers(server, expected):
    together = threading.Barrier(50)
    rows = [ROWS[number % len(ROWS)] for number in range(50)]

    def ask(row):
        together.wait()
        return server.classify(*row)

    with ThreadPoolExecutor(50) as pool:
        said = list(pool.map(ask, rows))
    for row, (status, answer) in zip(rows, said, strict=True):
        assert status == 200, answer
        assert answer["scores"] == [pytest.approx(expected[row], abs=1e-5)]
        assert answer["labels"] == [max((0, 1), key=expected[row].__getitem__)]
    assert len({(row[0], answer["version"]) for row, (_, answer) in zip(rows, said, strict=True)}) == len(TASKS)

    def batches():  # Ray publishes every ten seconds
        lines = [line for line in server.metrics().splitlines() if line.startswith("ray_serve_actual_batch_size_")]
        sizes = {line.split("{")[0][-5:]: float(line.rsplit(" ", 1)[1]) for line in lines if "_bucket" not in line}
        return sizes.get("e_sum", 0) >= 50 and sizes

    found = until(batches, 120)
    texts, count = found["e_sum"], found["count"]
    assert count < texts / 2
    assert "ray_lntune_requests_total{" in server.metrics()
    assert 'task="topic"' in server.metrics()


def test_several_texts_of_one_request(server, expected):
    status, answer = server.classify("topic", *TEXTS)
    assert status == 200
    assert answer["scores"] == [pytest.approx(expected["topic", text], abs=1e-5) for text in TEXTS]


def test_clear_errors_and_the_server_goes_on(server, expected):
    for task, texts, status, message in [
        ("nobody", ["the"], 404, "there is no adapter for the task 'nobody'"),
        ("../outside", ["the"], 400, "'../outside' is no task"),
        ("x" * 5000, ["the"], 400, "up to 100 letters"),
        ("topic", ["the " * 12], 413, "text 0 has 14 tokens; 12 fit"),
        ("topic", ["the", "x" * 90_000], 413, "text 1 has 90,000 characters; 12 tokens fit"),
        ("topic", ["the"] * 9, 413, "9 texts in one request; 8 fit"),
        ("damaged", ["the"], 500, "the adapter of 'damaged' cannot be used"),
        ("ternary", ["the"], 500, "classifier.bias is (3,) there and (2,) here. See --num-labels"),
        ("topic", [], 422, "texts: List should have at least 1 item"),
    ]:
        found, answer = server.classify(task, *texts)
        assert (found, message in answer["detail"]) == (status, True), answer
    for body, message in [
        ('{"task": "topic", "texts": ["\\ud800"]}', "Invalid JSON"),
        ('{"task": "\\udfff", "texts": ["the"]}', "Invalid JSON"),
        ('{"task": "topic", "texts": [NaN]}', "texts.0: Input should be a valid string"),
        ('{"task": Infinity, "texts": ["the"]}', "task: Input should be a valid string"),
        ('{"task": "topic"}', "texts: Field required"),
        ("[" * 50_000, "Invalid JSON"),
        (b'{"task": "topic", "texts": ["\xff\xfe"]}', "Invalid JSON"),
        ("", "Invalid JSON"),
    ]:
        found, answer = server("POST", "/classify", body)
        assert (found, message in answer["detail"]) == (422, True), (body[:50], answer)
    assert server("GET", "/healthz") == (200, {"status": "ok"})
    assert set(server.state()["bad"]) == {"damaged", "ternary"}
    assert server.classify("topic", "the")[1]["scores"] == [pytest.approx(expected["topic", "the"], abs=1e-5)]
    [line] = until(lambda: [each for each in server.log_lines() if each.get("task") == "damaged"])
    assert "is damaged or cut off" in line["message"]
    assert line["levelname"] == "ERROR"


def test_a_body_of_200_megabytes_is_not_kept(server, expected):
    before, megabyte = server.memory(), b"x" * 1_000_000
    for _ in range(2):
        status, answer = server("POST", "/classify", b"x" * 200_000_000)
        assert (status, answer["detail"]) == (413, "the body has more than 100,000 bytes.")
        status, answer = server("POST", "/classify", iter([megabyte] * 200), encode_chunked=True)
        assert status == 413
    assert server.memory() - before < 100_000_000
    assert server.classify("topic", "the")[1]["scores"] == [pytest.approx(expected["topic", "the"], abs=1e-5)]


def test_slow_and_dropping_clients_keep_nobody_waiting(server, expected):
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 60\r\n\r\n"
    whole = json.dumps({"task": "topic", "texts": ["the"]}).encode()
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(10)]
    for client in slow:
        client.sendall(head + b'{"task"')
    for _ in range(40):  # gone while their texts wait
        client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        client.sendall(head.replace(b"60", str(len(whole)).encode()) + whole)
        client.close()
    with ThreadPoolExecutor(10) as pool:
        began = time.monotonic()
        said = list(pool.map(lambda row: server.classify(*row), ROWS))
        took = time.monotonic() - began
    assert [status for status, _ in said] == [200] * len(ROWS)
    assert [answer["scores"][0] for _, answer in said] == [pytest.approx(expected[row], abs=1e-5) for row in ROWS]
    assert took < 8  # the slow ones had not been given up yet
    for client in slow:
        assert client.recv(1000).startswith(b"HTTP/1.1 408")
        client.close()
    until(lambda: server.state()["waiting"] == 0)


def test_too_many_texts_are_refused_and_all_others_answered(server, expected):
    texts = TEXTS * 2

    def ask(task):
        status, answer = server.classify(task, *texts)
        if status == 200:
            assert answer["scores"] == [pytest.approx(expected[task, text], abs=1e-5) for text in texts]
        return status

    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(ask, ["topic"] * 100)) == {200, 429}
    assert ask("topic") == 200


def test_a_replaced_adapter_is_picked_up_and_a_deleted_one_let_go(server, adapters, expected):
    """As in vllm#42125, a name whose files changed must not answer with what it knew before."""
    shutil.copytree(adapters / "spam", adapters / "changing")
    was = server.classify("changing", *TEXTS)[1]
    assert was["scores"] == [pytest.approx(expected["spam", text], abs=1e-5) for text in TEXTS]
    seen, stop = [], threading.Event()

    def keep_asking():
        while not stop.is_set():
            seen.append(server.classify("changing", *TEXTS))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking) for _ in range(4)]
        shutil.copytree(adapters / "topic", adapters / "new")
        for file in (adapters / "new").iterdir():
            file.replace(adapters / "changing" / file.name)
        until(lambda: seen and seen[-1][1]["version"] != was["version"], 20 * REFRESH)
        stop.set()
        for each in asking:
            each.result()
    tasks = {was["version"]: "spam", seen[-1][1]["version"]: "topic"}
    for status, answer in seen:  # never half: one version for all texts of a request
        assert status == 200
        task = tasks[answer["version"]]
        assert answer["scores"] == [pytest.approx(expected[task, text], abs=1e-5) for text in TEXTS]
    shutil.rmtree(adapters / "changing")
    until(lambda: server.classify("changing", "the")[0] == 404, 20 * REFRESH)
    assert "changing" not in server.state()["tasks"]


def test_two_thousand_tenants_in_the_memory_of_fewer(server, adapters, expected):
    names = [f"tenant-{number}" for number in range(2000)]
    for number, name in enumerate(names):
        (adapters / name).mkdir()
        for file in (adapters / TASKS[number % 3]).iterdir():
            os.link(file, adapters / name / file.name)

    def ask(number):
        status, answer = server.classify(names[number], TEXTS[0])
        assert status == 200, answer
        assert answer["scores"] == [pytest.approx(expected[TASKS[number % 3], TEXTS[0]], abs=1e-5)]

    order = [*range(2000), *random.Random(0).sample(range(2000), 200)]
    with ThreadPoolExecutor(25) as pool:
        list(pool.map(ask, order))
    state = server.state()
    assert state["bytes"] <= 1_000_000
    assert 10 < len(state["tasks"]) < 2000
    labels = {line.split('task="')[1].split('"')[0] for line in server.metrics().splitlines() if 'task="tenant' in line}
    assert len(labels) <= 100


def test_sigterm_ends_it_after_all_accepted_requests(adapters, tiny_bert, expected, tmp_path):
    """All are accepted and wait for their batch when the signal comes."""
    with running(
        adapters, tiny_bert, tmp_path / "lines", "--max-tokens=12", "--max-batch=64", "--max-wait=8000"
    ) as server:
        server.classify("topic", "the")
        with ThreadPoolExecutor(50) as pool:
            asked = {row: pool.submit(server.classify, *row) for row in ROWS}
            asked |= {number: pool.submit(server.classify, "topic", "the") for number in range(50 - len(ROWS))}
            until(lambda: server.state()["waiting"] == 50, 30)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server("GET", "/readyz")[0] == 503)
            assert server.classify("topic", "the")[0] == 503
            said = {row: each.result() for row, each in asked.items()}
    assert [status for status, _ in said.values()] == [200] * 50
    for row in ROWS:
        assert said[row][1]["scores"] == [pytest.approx(expected[row], abs=1e-5)]
    assert server.process.returncode == 0
    with pytest.raises(OSError, match=r"refused|reset"):
        server.classify("topic", "the")


class TestCommandLine:
    def test_errors_end_the_script_with_their_text(self, adapters, tiny_bert, tmp_path, capsys):
        from serve_many import main

        options = ["--adapters", str(adapters), "--model", tiny_bert]
        with pytest.raises(SystemExit, match=r"error: no folder .*nowhere: --adapters has a directory for each task"):
            main(["--adapters", str(tmp_path / "nowhere")])
        with pytest.raises(SystemExit, match="error: no model 'no-such-model': "):
            main(["--adapters", str(tmp_path), "--model", "no-such-model"])
        with pytest.raises(SystemExit, match="error: --max-tokens 9999: this model takes 512 at most"):
            main([*options, "--max-tokens", "9999"])
        for wrong, told in [("--max-batch=0", "--max-batch: Input should be greater"), ("--port=x", "--port: Input")]:
            with pytest.raises(SystemExit, match="2"):
                main([*options, wrong])
            assert told in capsys.readouterr().err
