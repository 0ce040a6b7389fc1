"""Which entries of a tensor an optimizer can move, and which it has moved. Pure functions on tensors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Movement", "can_move", "movement_between", "shrinks_alike", "spacing"]


def spacing(values: Tensor) -> Tensor:
    """The gap between each value and the next value of its dtype that is nearer to zero.

    At a power of two, this gap is half of that on the other side: bfloat16 has steps of 0.0039 below 1, and of 0.0078
    above.

    Args:
        values: any shape, of a floating-point dtype.

    Returns:
        The gaps in float64, in the shape of the values; for zeros, the smallest subnormal number.

    Example:
        >>> spacing(torch.tensor([1.0, 1.5], dtype=torch.bfloat16)).tolist()
        [0.00390625, 0.0078125]
    """
    info = torch.finfo(values.dtype)
    wide = values.detach().double().abs()
    mantissa, exponent = torch.frexp(wide)
    # frexp has 0.5 <= mantissa < 1: a value has the exponent of its binade minus one, a power of two that of the next.
    power = exponent - 1 - (mantissa == 0.5).to(exponent.dtype)
    gaps = torch.ldexp(torch.full_like(wide, info.eps), power)
    smallest = info.smallest_normal * info.eps
    return torch.where(wide == 0, smallest, gaps.clamp(min=smallest))


def can_move(values: Tensor, step: float | Tensor) -> tuple[Tensor, Tensor]:
    """Which entries change if an optimizer subtracts or adds a step, with the sum rounded to the dtype of the values.

    Args:
        values: any shape, of a floating-point dtype.
        step: size of the step, 0 or more; a number, or one per entry.

    Returns:
        Two bool tensors in the shape of the values: whether a step towards zero moves an entry, and whether one away
        from zero does. For zeros the two are equal.

    Example:
        >>> ones = torch.ones(1, dtype=torch.bfloat16)
        >>> [tuple(side.item() for side in can_move(ones, step)) for step in (1e-3, 3e-3, 1e-2)]
        [(False, False), (True, False), (True, True)]
    """
    values = values.detach()
    wide = values.double()
    outwards = torch.where(wide < 0, -1.0, 1.0) * step
    return (wide - outwards).to(values.dtype) != values, (wide + outwards).to(values.dtype) != values


class Movement(NamedTuple):
    """How the entries of a tensor moved.

    Attributes:
        entries: number of entries.
        moved: number of entries that differ.
        up: number of entries that are larger afterwards.
        inwards: number of entries that are nearer to zero afterwards.
        largest: largest absolute change; NaN if a value is not finite.
    """

    entries: int
    moved: int
    up: int
    inwards: int
    largest: float

    @property
    def one_way(self) -> int:
        """Number of entries that moved in the more frequent direction."""
        return max(self.up, self.moved - self.up)


def movement_between(before: Tensor, after: Tensor) -> Movement:
    """Compare a tensor with itself at a later time.

    Args:
        before: any shape, of a floating-point dtype.
        after: the same shape; another floating-point dtype is compared at the narrower one's precision, since a file
            in bfloat16 cannot show a smaller change.

    Returns:
        The counts.

    Example:
        >>> found = movement_between(torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, 0.9, -0.9]))
        >>> found.moved, found.up, found.inwards, found.one_way
        (2, 1, 2, 1)
    """
    narrow = max(before.dtype, after.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    old, new = before.detach().to(narrow).double(), after.detach().to(narrow).double()
    change = new - old
    moved = change != 0  # True for NaN too
    return Movement(
        entries=change.numel(),
        moved=int(moved.sum()),
        up=int((change > 0).sum()),
        inwards=int((new.abs() < old.abs()).sum()),
        largest=float(change.abs().max()) if change.numel() else 0.0,
    )


def shrinks_alike(before: Tensor, after: Tensor) -> float | None:
    """The common factor by which all entries shrank, as weight decay alone shrinks them.

    Decay multiplies every entry by one factor. A gradient moves the entries of a gain by different amounts, some of
    them up.

    Args:
        before: any shape, of a floating-point dtype.
        after: the same shape.

    Returns:
        The factor, below 1; None if entries stayed or grew, or the factors differ by more than the two roundings to the
        narrower dtype explain, or the values are equal beforehand, so that any optimizer could have moved them alike.

    Example:
        >>> gain = torch.tensor([1.0, 1.5, 0.7])
        >>> round(shrinks_alike(gain, 0.9 * gain), 4), shrinks_alike(gain, gain - 0.1)
        (0.9, None)
    """
    old, new = before.detach().double(), after.detach().double()
    kept = old != 0
    if kept.sum() < 2 or (old[kept] == old[kept][0]).all():
        return None
    factors = new[kept] / old[kept]
    if not ((factors > 0) & (factors < 1)).all():
        return None
    # Each side is within half a unit of rounding of its own value, relative to which eps is one unit.
    rounding = torch.finfo(before.dtype).eps + torch.finfo(after.dtype).eps
    middle = float(factors.median())
    # Once per step an update rounds too; with a decay of one factor these errors stay small beside the change.
    allowed = rounding + 0.05 * (1 - middle)
    return middle if float((factors - middle).abs().max()) <= allowed and not math.isclose(middle, 1) else None
