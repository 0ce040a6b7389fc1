"""Spacing, rounding and movement, against slow oracles."""

import math

import pytest
import torch

from peft_lntune.doctor import can_move, movement_between, spacing
from peft_lntune.doctor.movement import shrinks_alike

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def values(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    found = torch.cat([torch.randn(200), 2.0 ** torch.arange(-10, 4), torch.tensor([0.0, 1.0, -1.0, 1e-7])])
    return found.to(dtype)


@pytest.mark.parametrize("dtype", BITS)
def test_spacing_is_that_of_the_bits(dtype: torch.dtype) -> None:
    given = values(dtype)
    given = given[given != 0]
    nearer = (given.view(BITS[dtype]) - 1).view(dtype)  # the next pattern of bits is the next value towards zero
    wanted = (given.double() - nearer.double()).abs()
    assert torch.equal(spacing(given), wanted)


@pytest.mark.parametrize("dtype", BITS)
def test_the_spacing_of_zero_is_the_smallest_number(dtype: torch.dtype) -> None:
    smallest = torch.tensor([1], dtype=BITS[dtype]).view(dtype).double()
    assert torch.equal(spacing(torch.zeros(1, dtype=dtype)), smallest)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("step", [0.0, 1e-8, 1e-4, 1.9e-3, 3e-3, 1e-2])
def test_what_can_move_is_what_an_optimizer_moves(dtype: torch.dtype, step: float) -> None:
    given = values(dtype)
    inwards, outwards = can_move(given, step)
    for value, near, far in zip(given.tolist(), inwards.tolist(), outwards.tolist(), strict=True):
        sign = -1.0 if value < 0 else 1.0
        assert near == (torch.tensor(value - sign * step, dtype=torch.float64).to(dtype).item() != value)
        assert far == (torch.tensor(value + sign * step, dtype=torch.float64).to(dtype).item() != value)


def test_movement() -> None:
    before = torch.tensor([1.0, -2.0, 0.0, 3.0, 5.0])
    found = movement_between(before, torch.tensor([1.5, -2.5, 0.0, 2.0, 4.0]))
    assert found == (5, 4, 1, 2, 1.0)
    assert found.one_way == 3


def test_a_coarser_file_shows_no_smaller_change() -> None:
    before = torch.tensor([1.0, 1.0])
    after = torch.tensor([1.001, 1.5])
    assert movement_between(before, after).moved == 2
    assert movement_between(before, after.bfloat16()).moved == 1
    assert movement_between(before.bfloat16(), after).moved == 1


def test_nan_has_moved() -> None:
    found = movement_between(torch.ones(2), torch.tensor([1.0, math.nan]))
    assert found.moved == 1
    assert math.isnan(found.largest)


def test_decay_is_one_factor() -> None:
    torch.manual_seed(0)
    gain = 1 + 0.2 * torch.randn(64)
    decayed = gain.clone()
    for _ in range(100):
        decayed *= 1 - 1e-3
    assert shrinks_alike(gain, decayed) == pytest.approx(0.999**100, rel=1e-5)  # of the order of 100 roundings
    assert shrinks_alike(gain, gain - 0.1) is None
    assert shrinks_alike(gain, gain) is None
    assert shrinks_alike(gain, 1.1 * gain) is None
    assert shrinks_alike(gain.bfloat16(), (0.8 * gain).bfloat16()) == pytest.approx(0.8, rel=0.01)
