"""Tensors of models, dicts and files, read one at a time; and what is refused before anything is read."""

import json
import weakref

import pytest
import torch
from safetensors.torch import save_file

from peft_lntune.analysis import Checkpoint, match_tensors, open_tensors
from peft_lntune.errors import AdapterFileError, ConfigError
from tests import adapted
from tests.cases import build

W = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([0.5])}


def save(folder, tensors=W, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder


def shard(folder, tensors=W):
    """Each tensor in a file of its own, with the index beside them."""
    files = {key: f"model-{number}.safetensors" for number, key in enumerate(tensors)}
    for key, file in files.items():
        save(folder, {key: tensors[key]}, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


PATHS = {
    "folder": lambda folder: save(folder),
    "file": lambda folder: save(folder, name="other.safetensors") / "other.safetensors",
    "sharded folder": lambda folder: shard(folder),
    "index": lambda folder: shard(folder) / "model.safetensors.index.json",
    "text": lambda folder: str(save(folder)),
}


@pytest.mark.parametrize("kind", PATHS)
def test_paths(kind, tmp_path):
    found = Checkpoint(PATHS[kind](tmp_path / "m"))
    assert list(found) == list(W)
    assert len(found) == 2
    assert all(torch.equal(found[name], value) for name, value in W.items())
    assert {name: fact.shape for name, fact in found.facts.items()} == {"a.weight": (2, 3), "b.bias": (1,)}


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart", "llama"])
def test_a_saved_model_has_the_tensors_of_the_model(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    before, after = match_tensors(model, tmp_path)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = match_tensors(tmp_path, model.state_dict())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_are_in_the_order_in_which_people_count(tmp_path):
    names = [f"h.{layer}.{part}.weight" for layer in (0, 1, 2, 10, 11) for part in ("attn", "mlp")]
    save(tmp_path, {name: torch.ones(1) for name in reversed(names)})
    assert list(Checkpoint(tmp_path)) == names


def test_names_of_the_first_berts(tmp_path):
    save(tmp_path, {"x.LayerNorm.gamma": torch.ones(2), "LayerNorm.beta": torch.zeros(2), "beta": torch.ones(1)})
    assert set(Checkpoint(tmp_path)) == {"x.LayerNorm.weight", "LayerNorm.bias", "beta"}


def test_no_tensor_is_kept(tmp_path):
    found = Checkpoint(save(tmp_path))
    alive = weakref.ref(found["a.weight"])
    assert alive() is None


def test_headers_are_enough_to_match(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: pytest.fail("a tensor was read"))
    match_tensors(save(tmp_path / "one"), shard(tmp_path / "two"))
    with pytest.raises(ConfigError, match="2 only before"):
        match_tensors(tmp_path / "one", save(tmp_path / "other", {"c": torch.ones(1)}))


# What counts as a tensor.


def test_positions_counters_and_tied_tensors_are_left_out(tmp_path):
    whole = {**W, "position_ids": torch.arange(4), "seen": torch.tensor(True), "count": torch.tensor(3).int()}
    assert list(open_tensors({**whole, "tied": W["a.weight"], "view": W["a.weight"].T})) == [
        "a.weight",
        "b.bias",
        "view",
    ]
    assert list(open_tensors(save(tmp_path, whole))) == list(W)


def test_empty_tensors_are_not_one_another():
    assert list(open_tensors({"a": torch.ones(0), "b": torch.ones(0)})) == ["a", "b"]


def test_a_model_with_an_adapter_is_taken_as_it_computes():
    model = adapted.adapt(adapted.build("bert"))
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert not torch.equal(open_tensors(model)[name], open_tensors(adapted.build("bert"))[name])


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(2, dtype=torch.int8), "w should have floating-point values, but is int8"),
        (torch.ones(2, dtype=torch.uint8), "but is uint8"),
        (torch.ones(2, device="meta"), "but is float32 on meta"),
    ],
)
def test_no_values(tensor, said):
    with pytest.raises(ConfigError, match=said):
        open_tensors({"w": tensor})


def test_quantized_files(tmp_path):
    with pytest.raises(ConfigError, match="w should have floating-point values, but is I8"):
        open_tensors(save(tmp_path, {"w": torch.ones(2, dtype=torch.int8)}))


# Two sources.


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({**W, "c": torch.ones(1)}, r"but 1 only after, such as c; 2 are in both.*shared=True \(--shared\)"),
        ({"b.bias": W["b.bias"]}, "but 1 only before, such as a.weight; 1 are in both"),
        ({"x": torch.ones(1)}, "2 only before, such as a.weight and 1 only after, such as x; 0 are"),
        ({**W, "a.weight": torch.ones(3, 2)}, r"a.weight is \(2, 3\) before and \(3, 2\) after \(and 0 more"),
    ],
)
def test_what_differs_is_named(after, said):
    with pytest.raises(ConfigError, match=said):
        match_tensors(W, after)


def test_nothing_at_all():
    with pytest.raises(ConfigError, match="before is empty"):
        match_tensors({}, W)


def test_shared_leaves_heads_out():
    before = {**W, "head.weight": torch.ones(2, 2), "cls.bias": torch.ones(1)}
    after = {**W, "head.weight": torch.ones(3, 2), "classifier.bias": torch.ones(1)}
    assert [list(one) for one in match_tensors(before, after, shared=True)] == [list(W), list(W)]


@pytest.mark.parametrize("swapped", [False, True])
def test_shared_sees_through_a_prefix(swapped):
    plain, inside = dict(W), {f"bert.{name}": value + 1 for name, value in W.items()} | {"head.bias": torch.ones(1)}
    one, two = match_tensors(*((inside, plain) if swapped else (plain, inside)), shared=True)
    assert list(one) == list(two) == ([f"bert.{name}" for name in W] if swapped else list(W))
    moved = [two[name] - one[name] for name in one]
    assert all(torch.equal(value, torch.full_like(value, -1 if swapped else 1)) for value in moved)


def test_shared_with_a_stranger():
    with pytest.raises(
        ConfigError, match=r"share no tensor .* 2 tensors such as a.weight \(2, 3\) before, 1 tensors such"
    ):
        match_tensors(W, {"x": torch.ones(1)}, shared=True)


# Files that are not whole.


def cut(file, keep=-4):
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [-1, 20, 4, 0])
def test_cut_off(keep, tmp_path):
    cut(save(tmp_path) / "model.safetensors", keep)
    with pytest.raises(AdapterFileError, match=r"model.safetensors is damaged or cut off"):
        Checkpoint(tmp_path)


def test_a_shard_is_cut_off(tmp_path):
    cut(shard(tmp_path) / "model-1.safetensors")
    with pytest.raises(AdapterFileError, match=r"model-1.safetensors is damaged or cut off"):
        Checkpoint(tmp_path)


def test_cut_off_after_it_was_opened(tmp_path):
    found = Checkpoint(save(tmp_path))
    cut(tmp_path / "model.safetensors")
    with pytest.raises(AdapterFileError, match="damaged or cut off"):
        _ = found["a.weight"]


def test_a_shard_is_missing(tmp_path):
    (shard(tmp_path) / "model-0.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"names 1 missing shards, such as model-0"):
        Checkpoint(tmp_path)


def test_a_shard_of_another_save(tmp_path):
    save(shard(tmp_path), {"x": torch.ones(1)}, "model-0.safetensors")
    with pytest.raises(AdapterFileError, match=r"model-0.safetensors should hold a.weight \(and 0 more\)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(AdapterFileError, match="is not the index of a checkpoint"):
        Checkpoint(tmp_path)


def test_no_such_thing(tmp_path):
    with pytest.raises(AdapterFileError, match="nowhere does not exist"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match=r"has neither .* but no weights. Give the file"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"but pytorch_model.bin"):
        Checkpoint(tmp_path)
    with pytest.raises(AdapterFileError, match="not a safetensors file, and pickled weights are not read"):
        Checkpoint(tmp_path / "pytorch_model.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match=r"It is an adapter: give the merged model"):
        Checkpoint(tmp_path)
