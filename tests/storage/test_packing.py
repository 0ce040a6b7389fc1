"""Masked deltas in two tensors: packing and unpacking are inverse, and what is packed weighs little."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from peft_lntune import LNTuningConfig
from peft_lntune.core.delta import pack_bits
from peft_lntune.errors import AdapterFileError
from peft_lntune.storage.adapter_file import WEIGHTS_FILE
from peft_lntune.storage.packing import counts_of, is_packed, pack, pack_scores, unpack, unpack_scores
from tests.adapted import adapt, build, deltas, fill
from tests.oracles import bytes_of_bits

Sizes = dict[str, tuple[int, torch.Size]]


def masked_delta(name: str, shape: tuple[int, ...], chosen: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    mask = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
    mask[chosen] = True
    values = torch.randn(len(chosen)).to(dtype)
    return {f"{name}.weight": values, f"{name}.mask": pack_bits(mask)}


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, Tensor], Sizes]:
    """A state dict of masked and dense deltas and a head, in any order, and the sizes of the masked ones."""
    root = draw(st.sampled_from(["", "base_model.model."]))
    tensors: dict[str, Tensor] = {f"{root}head.weight": torch.randn(2, 2)}
    sizes: Sizes = {}
    for module in draw(st.lists(st.sampled_from(["a", "a.b", "a.ba", "B", "lntune", "0.10", "0.9"]), unique=True)):
        for parameter in draw(st.sets(st.sampled_from(["weight", "bias"]))):
            name = f"{module}.lntune_{parameter}"
            dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
            shape = draw(st.sampled_from([(1,), (8,), (13,), (2, 5)]))
            size = torch.Size(shape).numel()
            chosen = draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True))
            if draw(st.booleans()):
                tensors |= masked_delta(root + name, shape, chosen, dtype)
                sizes[name] = len(chosen), torch.Size(shape)
            else:
                tensors[f"{root}{name}.weight"] = torch.randn(shape)
    keys = draw(st.permutations(list(tensors)))
    return {key: tensors[key] for key in keys}, sizes


@given(adapters())
@settings(max_examples=150, deadline=None)
def test_packing_and_unpacking_are_inverse(adapter: tuple[dict[str, Tensor], Sizes]) -> None:
    tensors, sizes = adapter
    packed = pack(tensors)
    back = unpack(packed, sizes, "here")
    assert back.keys() == tensors.keys()
    assert all(back[key].dtype == value.dtype and torch.equal(back[key], value) for key, value in tensors.items())
    assert is_packed(packed) is bool(sizes)
    assert pack(packed).keys() == packed.keys()
    assert counts_of(back) == counts_of(tensors)
    one_dtype = len({tensors[key].dtype for key in tensors if f"{key[:-6]}mask" in tensors}) == 1
    if one_dtype:
        assert sum(key.endswith(".mask") for key in packed) == 1


def test_the_order_is_that_of_the_names() -> None:
    tensors = {
        **masked_delta("b.lntune_weight", (8,), [0, 1], torch.float32),
        **masked_delta("b.lntune_bias", (8,), [2], torch.float32),
        **masked_delta("a.lntune_weight", (8,), [7], torch.float32),
    }
    packed = pack(tensors)
    order = ["a.lntune_weight", "b.lntune_bias", "b.lntune_weight"]
    assert torch.equal(packed["lntune_packed.weight"], torch.cat([tensors[f"{name}.weight"] for name in order]))
    assert packed["lntune_packed.mask"].tolist() == [128, 4, 3]


def test_nothing_is_shared_with_the_file() -> None:
    """A view of one tensor for all would be saved whole with each."""
    tensors = masked_delta("a.lntune_bias", (8,), [1, 3], torch.float32)
    packed = pack(tensors)
    back = unpack(packed, {"a.lntune_bias": (2, torch.Size([8]))}, "here")
    assert (
        back["a.lntune_bias.weight"].untyped_storage().data_ptr()
        != packed["lntune_packed.weight"].untyped_storage().data_ptr()
    )


def test_bits_beyond_the_last_entry_are_refused() -> None:
    packed = {"lntune_packed.weight": torch.ones(1), "lntune_packed.mask": torch.tensor([129]).byte()}
    with pytest.raises(AdapterFileError, match=r"the mask of a.lntune_bias has 1 entries and others beyond its last"):
        unpack(packed, {"a.lntune_bias": (1, torch.Size([5]))}, "here")


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=4), st.booleans(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_scores_become_bits_and_come_back(shapes: list[tuple[int, int]], scores: bool, root: bool) -> None:
    above = "base_model.model." if root else ""
    tensors = {f"{above}{n}.query.lntune_supermask.weight": torch.randn(shape) for n, shape in enumerate(shapes)}
    others = {f"{above}head.weight": torch.ones(2), f"{above}n.lntune_bias.weight": torch.ones(3)}
    packed = pack_scores({**others, **tensors}, scores)
    bits = {key: value for key, value in packed.items() if key.endswith(".keep")}
    assert {key: bytes_of_bits((value > 0).reshape(-1).tolist()) for key, value in tensors.items()} == {
        key.replace(".keep", ".weight"): value.tolist() for key, value in bits.items()
    }
    assert packed.keys() == others.keys() | bits.keys() | (tensors.keys() if scores else set())
    sizes = {key.removeprefix(above).rpartition(".lntune_")[0]: value.shape for key, value in tensors.items()}
    trained, made = unpack_scores(packed, {name: (shape, 2.0) for name, shape in sizes.items()}, "here")
    assert trained.keys() == others.keys() | tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(trained[key], value if scores else torch.where(value > 0, 2.0, -2.0))
    assert len(made) == (0 if scores else len(tensors))
    served, made = unpack_scores(packed, {name: (shape, None) for name, shape in sizes.items()}, "here")
    assert served.keys() == others.keys() | bits.keys()
    assert all(torch.equal(served[key], value) for key, value in bits.items())
    assert made == []
    alone, _ = unpack_scores(tensors, {name: (shape, None) for name, shape in sizes.items()}, "here")
    assert all(torch.equal(alone[key], value) for key, value in bits.items())


@pytest.mark.parametrize("score", [5.0, None])
@pytest.mark.parametrize(
    ("bits", "has"), [([7, 2], "2 bytes"), ([7, 1, 0], "3 bytes"), ([7], "1 bytes"), ([255, 255], "2 bytes")]
)
def test_bits_that_are_not_those_of_a_supermask(bits: list[int], has: str, score: float | None) -> None:
    packed = {"query.lntune_supermask.keep": torch.tensor(bits).byte()}
    with pytest.raises(
        AdapterFileError,
        match=rf"supermask of query has {has}, expected 2 for the 9 entries of \(3, 3\), with no bit beyond the last",
    ):
        unpack_scores(packed, {"query": (torch.Size([3, 3]), score)}, "here")


def chosen_at_random(model: PeftModel, density: float) -> dict[str, Tensor]:
    """Masks of exactly this fraction of all entries."""
    shapes = {name: delta.shape for name, delta in deltas(model).items()}
    order = torch.randperm(sum(shape.numel() for shape in shapes.values()))
    flat = torch.zeros(len(order), dtype=torch.bool)
    flat[order[: round(density * len(order))]] = True
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def encoder(width: int, layers: int) -> nn.Module:
    """A BERT body with norms of the true shapes; what no adapter of ours holds is small."""
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=8, vocab_size=8
    )
    return BertModel(config, add_pooling_layer=False)


def saved(model: PeftModel, folder: Path) -> int:
    """Bytes of the weight file of an adapter with random values."""
    fill(model, "default")
    model.save_pretrained(folder)
    return os.path.getsize(folder / WEIGHTS_FILE)


def test_a_tenth_of_bert_base(tmp_path: Path) -> None:
    model = get_peft_model(encoder(768, layers=12), LNTuningConfig())
    assert len(deltas(model)) == 50
    dense = saved(model, tmp_path / "dense")
    model.set_masks(chosen_at_random(model, 0.1))
    assert model.get_nb_trainable_parameters()[0] == 3840
    assert saved(model, tmp_path / "masked") <= 0.15 * dense


def test_a_tenth_of_minilm(tmp_path: Path) -> None:
    model = get_peft_model(encoder(384, layers=6), LNTuningConfig())
    assert model.get_nb_trainable_parameters()[0] == 9984
    model.set_masks(chosen_at_random(model, 0.1))
    assert saved(model, tmp_path) <= 7000


def test_an_adapter_of_two_dtypes_keeps_both(tmp_path: Path) -> None:
    """A delta over a float64 norm is float64."""
    base = build("bert")
    base.bert.embeddings.LayerNorm.double()
    model = adapt(base)
    model.set_masks({name: torch.arange(delta.shape.numel()) < 3 for name, delta in deltas(model).items()})
    fill(model, "default")
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / WEIGHTS_FILE).keys()
    assert sum(name.endswith(".mask") for name in names) == 3  # the packed one, and two of the float64 norm
    again = build("bert")
    again.bert.embeddings.LayerNorm.double()
    loaded = deltas(PeftModel.from_pretrained(again, tmp_path))
    for name, delta in deltas(model).items():
        assert loaded[name].weight.dtype == delta.weight.dtype
        assert torch.equal(loaded[name].dense(), delta.dense())
