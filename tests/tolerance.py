"""How far two right computations of one thing may lie apart: a number of roundings of the dtype they compute in.

Another instruction set, number of threads or size of batch sums in another order, and each order rounds otherwise. So:

- *The same kernel on the same shapes and values* (switched off, saved and loaded, merged and unmerged) is bit-equal on
  every machine: `torch.equal`.
- *Two ways to one value* (a batch and its rows, merged and not, compiled and not) differ by roundings: `assert_close`.
- *What a test is only to be right about* is computed in float64, where the tolerance of 64 roundings is 1.4e-14.
"""

import torch
from torch import Tensor

ROUNDINGS = 64
"""For a tiny model: a few layers, each of some sums over at most a few hundred terms, of which roundings add up as the
square root of their number. In float32 7.6e-6; a mistake in a formula is larger by orders of magnitude."""


def tolerance(dtype: torch.dtype, roundings: float = ROUNDINGS) -> dict[str, float]:
    """`rtol` and `atol` of `torch.testing.assert_close` and `numpy.testing.assert_allclose`, for values of about 1.

    Example:
        >>> tolerance(torch.bfloat16, 2)
        {'rtol': 0.015625, 'atol': 0.015625}
    """
    unit = roundings * torch.finfo(dtype).eps
    return {"rtol": unit, "atol": unit}


def assert_close(
    found: Tensor, expected: Tensor, roundings: float = ROUNDINGS, dtype: torch.dtype | None = None, name: str = ""
) -> None:
    """Tensors of any scale are equal but for roundings, each of the size of the largest expected entry.

    A sum that cancels is wrong by a rounding of its largest term, so an entry near zero is held to no more than that.

    Args:
        found: the tensor to test.
        expected: what it should be, of one shape; it may be wider.
        roundings: how many are let pass.
        dtype: what was computed in; None: the dtype of `found`.
        name: for the message.
    """
    unit = torch.finfo(dtype or found.dtype).eps
    expected = expected.detach().double()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        found.detach().double(),
        expected,
        rtol=0,
        atol=roundings * unit * largest,
        msg=lambda text: f"{name or 'a tensor'}, to {roundings} roundings of {unit:.1e}: {text}",
    )
