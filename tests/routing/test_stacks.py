"""Stacks hold what was written, however they grow."""

import pytest
import torch

from peft_lntune.routing.stacks import Stacks, as_rows, spread

LIKE = {"a.weight": torch.ones(4), "a.bias": torch.ones(4), "b.weight": torch.ones(2, 3), "c.weight": torch.ones(4)}


def adapter(seed, names=LIKE):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(LIKE[name].shape, generator=generator) for name in names}


def test_one_stack_a_shape():
    stacks = Stacks(LIKE, 3)
    assert [stack.names for stack in stacks] == [("a.weight", "a.bias", "c.weight"), ("b.weight",)]
    assert [tuple(stack.values.shape) for stack in stacks] == [(3, 3, 4), (3, 1, 2, 3)]
    assert stacks.row_bytes == 4 * (3 * 4 + 6)


def test_dtypes_are_the_tensors_own_or_one_for_all():
    like = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2), "n": torch.ones(2, dtype=torch.long)}
    assert [stack.values.dtype for stack in Stacks(like, 1)] == [torch.bfloat16, torch.float32, torch.long]
    assert [stack.values.dtype for stack in Stacks(like, 1, torch.float16)] == [torch.float16]


@pytest.mark.parametrize("slots", [[1, 2, 3], [3, 1, 2]], ids=["in a row", "anywhere"])
def test_what_is_written_is_read_and_gathered(slots):
    stacks, adapters = Stacks(LIKE, 4), [adapter(seed) for seed in range(3)]
    stacks.write(slots, as_rows(stacks, adapters))
    for slot, own in zip(slots, adapters, strict=True):
        assert all(torch.equal(value, own[name]) for name, value in stacks.read(slot).items())
    index = torch.tensor([slots[2], slots[0], slots[0]])
    gathered = stacks.gather(index)
    stacks.write(slots, as_rows(stacks, [adapter(9)] * 3))  # what was gathered is a copy
    rows = spread(gathered)
    for place, own in enumerate((adapters[2], adapters[0], adapters[0])):
        assert torch.equal(rows["a"].bias[place, 0], own["a.bias"])
        assert torch.equal(rows["b"].weight[place, 0], own["b.weight"])
    assert rows["b"].bias is None


def test_what_an_adapter_lacks_is_zero():
    stacks = Stacks(LIKE, 2)
    stacks.write([1], as_rows(stacks, [adapter(0, ["a.bias"])]))
    found = stacks.read(1)
    assert found.pop("a.bias").any()
    assert not any(value.any() for value in found.values())


def test_growing_doubles_and_exchanges():
    stacks = Stacks(LIKE, 2)
    stacks.write([1], as_rows(stacks, [adapter(0)]))
    before, old = stacks.read(1), [stack.values for stack in stacks]
    stacks.grow(2)
    assert next(stack.values for stack in stacks) is old[0]
    stacks.grow(5)
    assert stacks.rows == 8
    assert all(torch.equal(value, before[name]) for name, value in stacks.read(1).items())
    stacks.write([1], as_rows(stacks, [{}]))
    assert old[0][1].any(), "who holds the old stack keeps its rows"


def test_made_in_inference_mode_they_are_written_outside():
    with torch.inference_mode():
        stacks = Stacks(LIKE, 2)
    stacks.write([1], as_rows(stacks, [adapter(0)]))
    assert torch.equal(stacks.read(1)["a.bias"], adapter(0)["a.bias"])
