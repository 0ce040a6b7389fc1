"""The store of a server's adapters: what is in memory, which version, and what the files have to do with it."""

import os
import shutil
import threading

import pytest
import torch
from adapter_store import SETTLED, AdapterStore, RefusedError, Requests
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

from peft_lntune import AdapterBank, LNTuningConfig
from peft_lntune.errors import ConfigError
from tests.adapted import fill

KINDS = ("one", "two", "headed")


@pytest.fixture(scope="module")
def model(tiny_bert):
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2).eval()


@pytest.fixture(scope="module")
def kinds(tiny_bert, tmp_path_factory):
    """Three adapters with different values, the last with a head, and their deltas."""
    folder, deltas = tmp_path_factory.mktemp("kinds"), {}
    for seed, kind in enumerate(KINDS):
        base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
        tuned = get_peft_model(base, LNTuningConfig(modules_to_save=["classifier"] if kind == "headed" else None))
        fill(tuned, "default", seed=seed)
        tuned.save_pretrained(folder / kind)
        bank = AdapterBank(base)
        bank.add("it", folder / kind)
        deltas[kind] = bank.deltas("it")
    return folder, deltas


class Folder:
    """A store over a folder of tasks, which the test writes."""

    def __init__(self, model, kinds, folder, adapters=10):
        self.kinds, self.deltas = kinds
        self.folder, self.bank = folder, AdapterBank(model, capacity=adapters)
        folder.mkdir()
        self.store = AdapterStore(self.bank, folder, adapters * self.bank.row_bytes)

    def put(self, task, kind):
        """Write new files in place of a task's."""
        new = self.folder.parent / "new"
        shutil.copytree(self.kinds / kind, new)
        (self.folder / task).mkdir(exist_ok=True)
        for file in new.iterdir():
            file.replace(self.folder / task / file.name)
        new.rmdir()

    def cut(self, task):
        """Damage a task's weights."""
        file = self.folder / task / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-5])

    def lease(self, task):
        while (adapter := self.store.lease(task)) is None:
            self.store.load(task)
        return adapter

    def use(self, *tasks):
        for task in tasks:
            self.store.release(self.lease(task))

    def kind(self, adapter):
        """Which adapter this is, by its deltas in the bank."""
        found = self.bank.deltas(adapter.name)
        [kind] = [
            kind
            for kind, deltas in self.deltas.items()
            if found.keys() == deltas.keys() and all(torch.equal(found[name], deltas[name]) for name in found)
        ]
        return kind

    def refused(self, task, status, match):
        with pytest.raises(RefusedError, match=match) as told:
            self.lease(task)
        assert told.value.status == status


@pytest.fixture
def at(model, kinds, tmp_path):
    return Folder(model, kinds, tmp_path / "adapters")


@pytest.fixture
def small(model, kinds, tmp_path):
    return Folder(model, kinds, tmp_path / "adapters", adapters=3)


@pytest.fixture
def reads(monkeypatch):
    """The adapters that were read from files."""
    seen, add = [], AdapterBank.add
    monkeypatch.setattr(
        AdapterBank, "add", lambda bank, name, source: (seen.append(source.name), add(bank, name, source))
    )
    return seen


def test_an_adapter_is_read_once_when_it_is_first_named(at, reads):
    at.put("french", "one")
    assert at.store.lease("french") is None
    assert at.store.tasks == []
    first, second = at.lease("french"), at.lease("french")
    assert first is second
    assert at.kind(first) == "one"
    assert reads == ["french"]
    assert at.store.nbytes == at.bank.row_bytes


def test_names_that_lead_nowhere_or_elsewhere(at):
    at.put("topic", "one")
    (at.folder.parent / "outside").symlink_to(at.folder / "topic")
    shutil.copytree(at.folder / "topic", at.folder.parent / "elsewhere")
    (at.folder / "link").symlink_to(at.folder.parent / "elsewhere")
    (at.folder / "other-name").symlink_to(at.folder / "topic")
    at.refused("nobody", 404, "there is no adapter for the task 'nobody'")
    for name in ("../elsewhere", "link", "/etc", "..", "", "topic/../topic", "__base__", "\ud800", "x" * 101):
        at.refused(name, 400, "is no task: up to 100 letters")
    assert at.kind(at.lease("other-name")) == "one"
    assert at.store.bad == []


def test_a_replaced_adapter_is_picked_up_and_old_requests_keep_theirs(at):
    at.put("french", "one")
    old = at.lease("french")
    at.put("french", "two")
    assert at.lease("french") is old  # nobody has looked yet
    at.store.release(old)
    at.store.refresh()
    new = at.lease("french")
    assert (at.kind(old), at.kind(new)) == ("one", "two")
    assert old.version != new.version
    at.store.release(old)
    at.store.refresh()
    assert at.bank.names == [new.name]


def test_held_versions_outlive_their_request(at):
    at.put("french", "one")
    old = at.lease("french")
    with at.store.held([old, old]):
        at.store.release(old)
        at.put("french", "two")
        at.store.refresh()
        assert at.kind(old) == "one"
    at.store.refresh()
    assert old.name not in at.bank


def test_a_deleted_adapter_is_let_go(at):
    at.put("french", "one")
    old = at.lease("french")
    shutil.rmtree(at.folder / "french")
    at.store.refresh()
    at.refused("french", 404, "no adapter")
    assert at.kind(old) == "one"
    at.store.release(old)
    at.store.refresh()
    assert len(at.bank) == 0


def test_a_loaded_adapter_that_becomes_a_link_out_of_the_folder_is_let_go(at):
    at.put("french", "one")
    at.use("french")
    (at.folder / "french").rename(at.folder.parent / "elsewhere")
    (at.folder / "french").symlink_to(at.folder.parent / "elsewhere")
    at.put("french", "two")  # through the link
    at.store.refresh()
    at.refused("french", 400, "is no task")


def test_a_bad_adapter_is_remembered_until_it_changes(at, reads, caplog, monkeypatch):
    monkeypatch.setattr("adapter_store.SETTLED", -1.0)
    at.put("french", "one")
    at.cut("french")
    for _ in range(3):
        at.refused("french", 500, "the adapter of 'french' cannot be used")
        at.store.load("french")  # as a request does that waited for the first one's reading
        at.store.refresh()
    assert reads == ["french"]
    assert at.store.bad == ["french"]
    assert "is damaged or cut off" in caplog.text
    at.put("french", "two")
    at.store.refresh()
    assert at.kind(at.lease("french")) == "two"
    assert at.store.bad == []


def test_a_bad_adapter_that_is_deleted_is_forgotten(at):
    at.put("french", "one")
    at.cut("french")
    at.refused("french", 500, "cannot be used")
    shutil.rmtree(at.folder / "french")
    at.store.refresh()
    at.refused("french", 404, "no adapter")


def test_a_bad_replacement_leaves_the_old_version_in_use(at, reads, monkeypatch):
    monkeypatch.setattr("adapter_store.SETTLED", -1.0)
    at.put("french", "one")
    at.use("french")
    at.put("french", "two")
    at.cut("french")
    for _ in range(3):
        at.store.refresh()
        assert at.kind(at.lease("french")) == "one"
    assert reads == ["french"] * 2
    assert at.store.bad == ["french"]
    at.put("french", "two")
    at.store.refresh()
    assert at.kind(at.lease("french")) == "two"
    assert at.store.bad == []


def test_the_old_files_put_back_are_not_bad_any_more(at):
    at.put("french", "one")
    old = at.lease("french")
    at.put("french", "two")
    at.cut("french")
    at.store.refresh()
    at.put("french", "one")
    at.store.refresh()
    assert at.lease("french") is old
    assert at.store.bad == []


def test_files_written_again_with_the_same_contents_are_the_same_version(at, reads):
    at.put("french", "one")
    old = at.lease("french")
    at.put("french", "one")
    at.store.refresh()
    assert at.lease("french") is old
    assert reads == ["french"]


def test_a_change_within_the_resolution_of_timestamps_is_noticed(at, monkeypatch):
    at.put("french", "one")
    stamp = at.store._stamp("french")
    monkeypatch.setattr(AdapterStore, "_stamp", lambda store, task: stamp)
    at.use("french")
    at.put("french", "two")
    at.store.refresh()
    assert at.kind(at.lease("french")) == "two"


def test_files_that_are_old_are_not_read_again(at, monkeypatch):
    at.put("french", "one")
    monkeypatch.setattr("adapter_store.time.time", lambda: os.stat(at.folder / "french").st_ctime + SETTLED + 60)
    at.use("french")
    monkeypatch.setattr(AdapterStore, "_version", lambda store, task: pytest.fail("the files were read"))
    at.store.refresh()


def test_an_adapter_that_is_written_while_it_is_read_is_neither_used_nor_bad(at, monkeypatch):
    at.put("french", "one")
    add = AdapterBank.add

    def slowly(bank, name, source):
        add(bank, name, source)
        at.put("french", "two")

    with monkeypatch.context() as patch:
        patch.setattr(AdapterBank, "add", slowly)
        with pytest.raises(RefusedError, match="is being replaced") as told:
            at.store.load("french")
    assert (told.value.status, told.value.retry_after) == (503, 1)
    assert len(at.bank) == 0
    assert at.kind(at.lease("french")) == "two"


def test_a_head_that_does_not_fit_is_refused(model, kinds, tmp_path):
    at = Folder(model, kinds, tmp_path / "adapters")
    at.store = AdapterStore(at.bank, at.folder, 10**6, lambda heads: "other shape" if heads else "")
    at.put("french", "headed")
    at.put("german", "one")
    at.refused("french", 500, "the head of 'french' is not that of this server: other shape. See --num-labels")
    assert len(at.bank) == 0
    assert at.kind(at.lease("german")) == "one"


class TestMemory:
    def test_the_least_recently_used_adapter_makes_room(self, small):
        for task in "abcd":
            small.put(task, "one")
        small.use("a", "b", "c", "a", "d")
        assert small.store.tasks == ["c", "a", "d"]
        assert small.store.nbytes == 3 * small.bank.row_bytes
        assert small.bank.capacity == 3

    def test_adapters_in_use_stay(self, small):
        for task in "abcd":
            small.put(task, "one")
        first, _, third = (small.lease(task) for task in "abc")
        small.refused("d", 503, "the memory for adapters is full of adapters in use")
        small.store.release(third)
        small.use("d")
        assert small.store.tasks == ["a", "b", "d"]
        assert small.kind(first) == "one"

    def test_a_replacement_takes_the_place_of_another_adapter_or_waits(self, small):
        for task in "abc":
            small.put(task, "one")
        leases = [small.lease(task) for task in "abc"]
        small.put("a", "two")
        small.store.refresh()
        assert small.lease("a") is leases[0]
        small.store.release(leases[1])
        small.store.refresh()
        assert small.kind(small.lease("a")) == "two"
        assert small.store.tasks == ["c", "a"]

    def test_heads_count(self, small):
        small.put("a", "headed")
        small.put("b", "one")
        small.use("b", "a")
        head = small.bank.heads(small.lease("a").name)["classifier"]
        assert small.store.nbytes == 2 * (small.bank.row_bytes + sum(tensor.nbytes for tensor in head.values()))

    def test_no_memory_at_all(self, model, tmp_path):
        with pytest.raises(ConfigError, match="100 bytes are not memory for two adapters"):
            AdapterStore(AdapterBank(model), tmp_path, 100)


def test_threads_see_whole_versions_while_files_are_replaced(at):
    """Two versions come in turns; a reader's lease is one of them, whole, as long as it lasts."""
    at.put("french", "one")
    at.use("french")
    wrong, seen, stop = [], set(), threading.Event()

    def read():
        while not stop.is_set():
            try:
                lease = at.lease("french")
                seen.update(at.kind(lease) for _ in range(3))
                at.store.release(lease)
            except Exception as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(10):
        at.put("french", KINDS[turn % 2])
        at.store.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert seen == {"one", "two"}
    at.store.refresh()
    assert len(at.bank) == 1


class TestRequests:
    def test_texts_beyond_the_limits_are_refused(self):
        requests = Requests(max_texts=5, max_texts_per_task=3)
        with requests.admitted("a", 3):
            with pytest.raises(RefusedError, match="3 texts of 'a' wait; 3 of one task may") as task:
                requests.admitted("a", 1).__enter__()
            with pytest.raises(RefusedError, match="3 texts wait; there is room for 5") as total:
                requests.admitted("b", 3).__enter__()
            with requests.admitted("b", 2):
                assert requests.texts == 5
        assert (task.value.status, total.value.status) == (429, 503)
        assert task.value.retry_after == total.value.retry_after == 1
        assert requests.texts == 0
        assert not requests._per_task  # tasks that have gone leave nothing behind

    def test_a_closed_server_answers_what_it_accepted(self):
        requests = Requests(5, 5)
        with requests.entered():
            requests.closed = True
            assert requests.open == 1
            with pytest.raises(RefusedError, match="the server is stopping"), requests.entered():
                pass
            with requests.admitted("a", 1):
                assert requests.texts == 1
        assert requests.open == 0
