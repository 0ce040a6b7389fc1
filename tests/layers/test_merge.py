"""Merging writes the rounded sum, unmerging puts the base back bit for bit, and a safe merge is all or nothing."""

import pytest
import torch

from tests.adapted import DTYPES, adapt, assert_unchanged, build, deltas, inputs, layers, output, snapshot

FAMILIES = ["bert", "llama", "gemma2", "cohere", "t5"]
ALREADY = "ignore:Already following adapters were merged"  # PEFT says so at every second merge


def parameters(model):
    """The base parameters that are tuned, by name."""
    return {
        f"{layer.label}.{p}": getattr(layer.base_layer, p)
        for layer in layers(model)
        for p in ("weight", "bias")
        if len(layer.deltas(p))
    }


def summed(base, *found):
    """base + delta + delta ..., in the wide dtype from left to right, rounded once to the base's own."""
    total = base.to(torch.promote_types(base.dtype, torch.float32))
    for delta in found:
        total = total + delta.dense()
    return total.to(base.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_writes_the_rounded_sum_and_unmerge_the_old_bits(family, dtype):
    model, batch = build(family, dtype), inputs(family, dtype)
    peft_model = adapt(model)
    before, base = snapshot(peft_model), {name: p.clone() for name, p in parameters(peft_model).items()}
    tuned = output(peft_model, batch)
    peft_model.merge_adapter()
    for name, parameter in parameters(peft_model).items():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, summed(base[name], deltas(peft_model)[name]))
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(output(peft_model, batch), tuned)
    peft_model.unmerge_adapter()
    assert_unchanged(peft_model, before)
    assert torch.equal(output(peft_model, batch), tuned)


@pytest.mark.filterwarnings(ALREADY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [["a", "b", "c"], ["c", "a", "b"], ["b", "c"]], ids="".join)
def test_adapters_merged_in_sequence_round_once(order, dtype):
    """In bfloat16 a sum that is rounded after each adapter would drift from the sum of all."""
    peft_model = adapt(build("bert", dtype), "a", "b", "c")
    before, base = snapshot(peft_model), {name: p.clone() for name, p in parameters(peft_model).items()}
    for name in order:
        peft_model.merge_adapter([name])
    found = [deltas(peft_model, name) for name in order]
    for name, parameter in parameters(peft_model).items():
        assert torch.equal(parameter, summed(base[name], *(delta[name] for delta in found)))
    assert peft_model.get_model_status().merged_adapters == sorted(order)
    peft_model.unmerge_adapter()
    assert_unchanged(peft_model, before)


def test_merging_one_call_or_several_is_the_same():
    once, twice = (adapt(build("llama", torch.bfloat16), "a", "b") for _ in range(2))
    once.merge_adapter(["a", "b"])
    twice.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="Already following adapters were merged a"):
        twice.merge_adapter(["b"])
    assert_unchanged(once, snapshot(twice))
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        twice.merge_adapter(["a", "b"])
    assert_unchanged(once, snapshot(twice))


@pytest.mark.filterwarnings(ALREADY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_that_is_refused_changes_nothing(verb, value):
    """Also when only the last layer is broken: those before it must not be merged, nor taken out."""
    peft_model = adapt(build("bert", torch.float16), "good", "broken")
    peft_model.merge_adapter(["good"])
    *_, last = deltas(peft_model, "broken").values()
    with torch.no_grad():
        last.weight[3] = value
    before, names = snapshot(peft_model), [name for name, _ in peft_model.named_modules()]
    with pytest.raises(ValueError, match=r"NaNs detected .*\. The adapter broken seems to be broken"):
        getattr(peft_model, verb)(safe_merge=True, adapter_names=["broken"])
    assert_equal_with_nans(snapshot(peft_model), before)
    assert [name for name, _ in peft_model.named_modules()] == names
    assert peft_model.get_model_status().merged_adapters == ["good"]
    peft_model.unmerge_adapter()
    getattr(peft_model, verb)(safe_merge=True, adapter_names=["good"])


def assert_equal_with_nans(after, before):
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_layer_refuses_by_itself():
    peft_model = adapt(build("bert"))
    layer = next(layers(peft_model))
    with torch.no_grad():
        layer.lntune_bias["default"].weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"the bias of bert\.embeddings\.LayerNorm would not be finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_unload_is_the_tuned_model_without_us(family):
    model, batch = build(family), inputs(family)
    peft_model = adapt(model)
    tuned = output(peft_model, batch)
    merged = peft_model.merge_and_unload(safe_merge=True)
    assert not list(layers(merged))
    assert not hasattr(merged, "peft_config")
    assert torch.equal(output(merged, batch), tuned)


def test_merge_and_unload_of_chosen_adapters():
    model, batch = build("bert"), inputs("bert")
    peft_model = adapt(model, "a", "b")
    peft_model.set_adapter("b")
    tuned = output(peft_model, batch)
    assert torch.equal(output(peft_model.merge_and_unload(adapter_names=["b"]), batch), tuned)


def test_a_merged_model_moves_to_another_dtype_and_back_to_its_base():
    peft_model = adapt(build("llama", torch.bfloat16))
    base = {name: p.clone() for name, p in parameters(peft_model).items()}
    peft_model.merge_adapter()
    peft_model.float()
    peft_model.unmerge_adapter()
    for name, parameter in parameters(peft_model).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, base[name].float())


def test_merging_keeps_the_base_parameters_themselves():
    """Optimizers, tied weights and hooks hold the Parameter object; only its values change."""
    peft_model = adapt(build("bert"))
    before = {name: id(p) for name, p in parameters(peft_model).items()}
    peft_model.merge_adapter()
    assert {name: id(p) for name, p in parameters(peft_model).items()} == before
    peft_model.unmerge_adapter()
    assert {name: id(p) for name, p in parameters(peft_model).items()} == before
