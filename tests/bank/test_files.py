"""A bank's file gives back what was in the bank, and a damaged one is refused or says which adapter it is."""

import hashlib
import json
import os

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_lntune import AdapterBank
from peft_lntune.bank import bank_file
from peft_lntune.errors import AdapterFileError
from tests import adapted
from tests.adapted import adapt, build, inputs
from tests.bank.banked import CLOSE, NAMES, banked, routed
from tests.oracles import each_alone


@pytest.fixture
def saved(tmp_path):
    model, bank = banked("bert-classifier", "a", "b", "c", task_type="SEQ_CLS")
    bank.remove("c")
    bank.add("headless", (adapt(build("bert-classifier"), "x"), "x"))
    path = tmp_path / "folder" / "bank.safetensors"
    bank.save(path)
    bank.detach()
    return model, bank, path


def same(bank, other):
    assert other.names == bank.names
    for name in bank.names:
        expected = bank.deltas(name)
        assert all(torch.equal(value, expected[key]) for key, value in other.deltas(name).items())
        heads, found = bank.heads(name), other.heads(name)
        assert {h: list(tensors) for h, tensors in found.items()} == {h: list(tensors) for h, tensors in heads.items()}
        assert all(torch.equal(found[h][key], value) for h, tensors in heads.items() for key, value in tensors.items())


def test_there_and_back(saved):
    model, bank, path = saved
    other, batch = AdapterBank.open(path, build("bert-classifier")), inputs("bert-classifier")
    same(bank, other)
    served = AdapterBank.open(path, model)
    served.attach()
    torch.testing.assert_close(routed(served, model, batch, NAMES), each_alone(model, batch, NAMES), **CLOSE)
    assert os.listdir(path.parent) == [path.name]  # no temporary file is left


def test_rows_are_copied_when_they_are_asked_for(saved):
    model, _, path = saved
    bank = AdapterBank.open(path, model)
    assert list(bank._saved.pending) == ["a", "b", "headless"]
    bank.attach()
    routed(bank, model, inputs("bert-classifier"), ["b", "__base__", "b"])
    assert list(bank._saved.pending) == ["a", "headless"]
    bank.remove("a")
    bank.load()
    assert not bank._saved.pending
    assert bank.names == ["b", "headless"]


def test_an_opened_bank_goes_on(saved):
    """Adapters are added to it and removed, and it is saved over its own file, of which not all has been read."""
    model, bank, path = saved
    opened = AdapterBank.open(path, model)
    opened.remove("b")
    opened.add("d", (model, "b"))
    opened.save(path)
    again = AdapterBank.open(path, model)
    assert again.names == ["a", "headless", "d"]
    same(opened, again)
    expected = bank.deltas("b")
    assert all(torch.equal(value, expected[key]) for key, value in again.deltas("d").items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_has_the_dtype_of_the_bank(tmp_path, dtype):
    model = adapt(build("llama"), "a")
    bank = AdapterBank(model, dtype=dtype)
    bank.add("a", (model, "a"))
    bank.save(tmp_path / "bank")
    opened = AdapterBank.open(tmp_path / "bank", model, capacity=5)
    assert opened.row_bytes == bank.row_bytes
    assert opened.capacity == 5
    same(bank, opened)


def test_more_than_a_block_and_more_than_the_capacity(tmp_path):
    model = adapt(build("bert"), "a", "b")
    bank = AdapterBank(model)
    bank.add_many({str(number): (model, "ab"[number % 2]) for number in range(3 * bank_file.BLOCK + 5)})
    bank.remove("70")
    bank.save(tmp_path / "bank")
    opened = AdapterBank.open(tmp_path / "bank", model, capacity=1)
    assert opened.capacity == len(bank)
    opened.load(["3", "100", "101"])  # apart and together
    assert len(opened._saved.pending) == len(bank) - 3
    same(bank, opened)


def test_an_empty_bank(tmp_path):
    model = build("bert")
    AdapterBank(model).save(tmp_path / "bank")
    assert AdapterBank.open(tmp_path / "bank", model).names == []


def test_heads_of_another_shape_are_saved_too(tmp_path):
    five = hf.BertForSequenceClassification(hf.BertConfig(**{**adapted._SIZES, "num_labels": 5})).eval()
    bank = AdapterBank(build("bert-classifier"))
    bank.add("five", (adapt(five, "x", modules_to_save=["classifier"]), "x"))
    bank.save(tmp_path / "bank")
    same(bank, AdapterBank.open(tmp_path / "bank", build("bert-classifier")))


def test_it_is_a_safetensors_file(saved):
    _, bank, path = saved
    with safe_open(path, framework="pt") as file:
        index = json.loads(file.metadata()["lntune_bank"])
    assert index["names"] == bank.names
    tensors = load_file(path)
    names = index["stacks"][0]
    assert torch.equal(
        tensors["stack.0"][1][list(names).index("bert.embeddings.LayerNorm.bias")],
        bank.deltas("b")["bert.embeddings.LayerNorm.bias"],
    )


# Damage.


def rewritten(path, change_index=None, **changes):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    index = json.loads(metadata["lntune_bank"])
    if change_index is not None:
        change_index(index)
    tensors = {name: value for name, value in {**load_file(path), **changes}.items() if value is not None}
    text = json.dumps(index)
    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, {**metadata, "lntune_bank": text, "lntune_bank_digest": digest})


@pytest.mark.parametrize("cut", [3, 200, -1])
def test_one_that_is_cut_off_is_refused(saved, cut):
    model, _, path = saved
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(AdapterFileError, match="is damaged or cut off"):
        AdapterBank.open(path, model)


def test_what_is_no_bank_is_refused(saved, tmp_path):
    with pytest.raises(AdapterFileError, match="is damaged or cut off"):
        AdapterBank.open(tmp_path / "nowhere", saved[0])
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(AdapterFileError, match=r"is not a bank: it was not written by AdapterBank\.save"):
        AdapterBank.open(tmp_path / "other", saved[0])


def test_another_format_is_refused(saved):
    model, _, path = saved
    rewritten(path, lambda index: index.update(format_version=3))
    with pytest.raises(AdapterFileError, match=r"has format_version 3, and peft_lntune .* reads 1 and 2\. Upgrade"):
        AdapterBank.open(path, model)


def exchange_names(index):
    index["names"][0], index["names"][1] = index["names"][1], index["names"][0]


def test_exchanged_names_are_refused(saved):
    model, _, path = saved
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'[\\"a\\", \\"b\\"', b'[\\"b\\", \\"a\\"', 1))
    assert path.read_bytes() != raw
    with pytest.raises(AdapterFileError, match=r"the index of .* is damaged: it was changed since it was written"):
        AdapterBank.open(path, model)
    path.write_bytes(raw)
    rewritten(path, exchange_names)  # also where the index is signed anew: a row's digest says whose it is
    with pytest.raises(AdapterFileError, match=r"adapter 'b' in .* is damaged: its digest differs"):
        AdapterBank.open(path, model).load()


def test_a_file_of_version_1_is_read(saved):
    """Its digests are of values alone."""
    model, bank, path = saved
    rows = load_file(path)
    heads = {row: sorted(k for k in rows if k.startswith(f"head.{row}.")) for row in range(3)}
    made = [
        hashlib.sha256(b"".join(t.numpy().tobytes() for t in (rows["stack.0"][row], *map(rows.get, heads[row]))))
        for row in range(3)
    ]
    assert [name for name in rows if name.startswith("stack")] == ["stack.0"]
    digests = torch.tensor([list(one.digest()) for one in made], dtype=torch.uint8)
    rewritten(path, lambda index: index.update(format_version=1), digests=digests)
    same(bank, AdapterBank.open(path, model))
    rewritten(path, lambda index: index.update(format_version=2), digests=digests)
    with pytest.raises(AdapterFileError, match=r"adapter 'a' in .* is damaged: its digest differs"):
        AdapterBank.open(path, model).load()


@pytest.mark.parametrize("key", ["names", "dtype", "stacks", "heads"])
def test_an_index_without_a_part_is_refused(saved, key):
    model, _, path = saved
    rewritten(path, lambda index: index.pop(key))
    with pytest.raises(AdapterFileError, match=r"the index of .* is damaged: KeyError"):
        AdapterBank.open(path, model)


@pytest.mark.parametrize(
    "change",
    [{"digests": None}, {"digests": torch.zeros(1, 32).byte()}, {"stack.0": torch.ones(2)}],
    ids=["missing", "short", "small"],
)
def test_tensors_that_are_not_those_of_the_index_are_refused(saved, change):
    model, _, path = saved
    rewritten(path, **change)
    with pytest.raises(AdapterFileError, match=r"lacks digests|is damaged: .* should be"):
        AdapterBank.open(path, model)


@pytest.mark.parametrize("names", [["a", "a", "b"], ["__base__", "a", "b"], ["", "a", "b"]], ids=str)
def test_names_that_cannot_be_are_refused(saved, names):
    model, _, path = saved
    rewritten(path, lambda index: index.update(names=names))
    with pytest.raises(ValueError, match=r"is damaged|cannot be named"):
        AdapterBank.open(path, model)


def test_one_of_another_model_is_refused(saved):
    _, _, path = saved
    headless = build("bert-classifier")
    del headless.classifier
    with pytest.raises(
        AdapterFileError, match=r"was saved for another model: bert\..* is \(16,\) there and missing here"
    ):
        AdapterBank.open(path, build("gpt2"))
    with pytest.raises(AdapterFileError, match="it has heads for classifier, which this model lacks"):
        AdapterBank.open(path, headless)


@pytest.mark.parametrize("tensor", ["stack.0", "head.1.classifier.weight"])
def test_one_damaged_adapter_is_named_and_the_others_serve(saved, tensor):
    model, _bank, path = saved
    damaged = load_file(path)[tensor]
    flat = damaged[1] if tensor == "stack.0" else damaged
    flat.reshape(-1)[3] += 1
    rewritten(path, **{tensor: damaged})
    opened = AdapterBank.open(path, model)
    opened.attach()
    for ask in (lambda: opened.load(), lambda: opened.deltas("b"), lambda: routed(opened, model, {}, ["b"])):
        with pytest.raises(AdapterFileError, match=r"adapter 'b' in .* is damaged: its digest differs"):
            ask()
    assert not opened._route.active
    batch, names = inputs("bert-classifier"), ["a", "__base__", "a"]
    torch.testing.assert_close(routed(opened, model, batch, names), each_alone(model, batch, names), **CLOSE)
    opened.remove("b")
    opened.load()
    assert opened.names == ["a", "headless"]


def test_what_cannot_be_written_leaves_the_old_file(saved, monkeypatch):
    model, bank, path = saved
    before = path.read_bytes()
    bank.add("more", (model, "a"))
    monkeypatch.setattr(bank_file.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        bank.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
