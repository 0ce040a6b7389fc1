"""Low-rank changes of a linear map: a norm's delta folded into it, exactly, and the best change of a lower rank.

A linear map that reads a norm's output, `x = g * xhat`, sees a changed gain `g + dg` as a change of its own weight:

    W ((g + dg) * xhat) = W x + W diag(dg / g) x

`dg` with k entries that are not zero gives a change of rank at most k: `B A` with a row of the identity in A, and a
column of `W diag(dg / g)` in B, for each of those entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LowRank", "fold_gain", "joined", "padded", "scaled", "truncated"]

_ROWS = 8192  # rows of B that are widened to float64 at once: the head of a language model has 100,000 and more


class LowRank(NamedTuple):
    """A change `B A` of the weight of a linear map.

    Attributes:
        a: `(r, in)`, what is applied first.
        b: `(out, r)`.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """The number of rows of A, which bounds the rank of the change."""
        return len(self.a)


def fold_gain(weight: Tensor, gain: Tensor, delta: Tensor) -> LowRank:
    """Fold a change of a norm's gain into a linear map that reads the norm's output.

    Args:
        weight: `(out, d)`, weight of the linear map.
        gain: `(d,)`, what the norm multiplies by before the change, its offset included (Gemma: `1 + w`).
        delta: `(d,)`, the change of the gain. The gain must not be zero where the change is not.

    Returns:
        The change of the weight, in the wider of float32 and the dtype of `delta`. Its rank is at most the number of
        entries of `delta` that are not zero, and at most `out`.

    Example:
        >>> weight, gain = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([2.0, 1.0])
        >>> fold = fold_gain(weight, gain, torch.tensor([1.0, 0.0]))
        >>> fold.a.tolist(), fold.b.tolist()
        ([[1.0, 0.0]], [[0.5], [1.5]])
    """
    wide = torch.promote_types(delta.dtype, torch.float32)
    tuned = delta.nonzero().reshape(-1)
    # A ratio rounded to float32 would be off by a rounding in each entry, and the norm's own sum is not.
    ratio = (delta[tuned].double() / gain[tuned].double()).to(wide)
    b = weight[:, tuned].to(wide) * ratio
    if len(weight) < len(tuned):
        a = b.new_zeros(b.shape[0], len(gain))
        a[:, tuned] = b
        return LowRank(a, torch.eye(len(weight), dtype=wide, device=weight.device))
    a = b.new_zeros(len(tuned), len(gain))
    a[torch.arange(len(tuned), device=a.device), tuned] = 1
    return LowRank(a, b)


def scaled(change: LowRank, gain: Tensor, delta: Tensor) -> LowRank:
    """The change that has the same effect before a norm's gain was changed.

    Args:
        change: a change of a linear map that reads the norm's output, made for the gain `gain + delta`.
        gain: `(d,)`, what the norm multiplies by before the change, its offset included.
        delta: `(d,)`, the change of the gain.

    Returns:
        The change for the gain `gain`, of the same rank.
    """
    tuned = delta != 0
    ratio = torch.where(tuned, delta.double() / torch.where(tuned, gain, 1).double(), 0)
    return LowRank((change.a.double() * (1 + ratio)).to(change.a.dtype), change.b)


def joined(*changes: LowRank) -> LowRank:
    """The sum of changes of one linear map, of the sum of their ranks.

    Args:
        *changes: at least one.

    Returns:
        Their matrices, one below the other (A) and side by side (B).
    """
    return LowRank(torch.cat([change.a for change in changes]), torch.cat([change.b for change in changes], 1))


def padded(change: LowRank, rank: int) -> LowRank:
    """The same change with zeros up to a rank.

    Args:
        change: a change of at most this rank.
        rank: the new number of rows of A.

    Returns:
        The change with `rank` rows in A.
    """
    a, b = change
    return LowRank(
        torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])]),
        torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], 1),
    )


def truncated(change: LowRank, rank: int, moment: Tensor | None = None) -> tuple[LowRank, Tensor]:
    """The change of at most a rank whose effect is nearest to that of a change: its calibrated SVD.

    It minimizes the mean of `|B A x - B' A' x|^2` over inputs x with `E[x x^T] = moment`. With U the leading
    eigenvectors of `B A moment A^T B^T`, the best change is `U U^T B A`; no inverse of the moment is needed.

    Args:
        change: the change.
        rank: the largest rank of the result.
        moment: `(in, in)`, second moment of the inputs of the linear map, not centred; None: the identity, which is
            the plain SVD.

    Returns:
        The change, most important direction first, so that its first r rows and columns are the best change of rank r;
        and the energy of each direction of the whole change, `(min(out, r),)` in float64, largest first. What
        truncation at r leaves out is the sum of the energies from r on.

    Example:
        >>> change = LowRank(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> best, energy = truncated(change, 1)
        >>> (best.b @ best.a).abs().tolist(), energy.tolist()
        ([[3.0, 0.0], [0.0, 0.0]], [9.0, 1.0])
    """
    a, b = change
    # float64: energies are squares, and half of the digits are lost in them
    inputs = _moment_of_rows(a, moment)
    if len(b) <= b.shape[1]:
        wide_b = b.double()
        energy, vectors = torch.linalg.eigh(wide_b @ inputs @ wide_b.mT)
        energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
        return LowRank(_times(vectors.mT @ wide_b, a).to(a.dtype), vectors.to(b.dtype)), energy
    root = _root(inputs)
    gram = sum((rows.double().mT @ rows.double() for rows in b.split(_ROWS)), torch.zeros_like(inputs))
    energy, vectors = torch.linalg.eigh(root.mT @ gram @ root)
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
    # Directions of no energy have no effect, and their length could not be divided by.
    kept = energy[:rank] > energy[:1] * torch.finfo(torch.float64).eps
    lengths = torch.where(kept, energy[:rank], 1).sqrt()
    outward = torch.where(kept, root @ vectors / lengths, 0)  # B times these columns is U
    best_b = torch.cat([(rows.double() @ outward).to(b.dtype) for rows in b.split(_ROWS)])
    return LowRank(_times(outward.mT @ gram, a).to(a.dtype), best_b), energy


def _root(moment: Tensor) -> Tensor:
    """A matrix whose product with its transpose is a moment; triangular, unless the moment is singular."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    if not failed:
        return lower  # as accurate as eigenvectors, for a thirtieth of the operations
    squares, directions = torch.linalg.eigh(moment)
    return directions * squares.clamp(min=0).sqrt()


def _moment_of_rows(a: Tensor, moment: Tensor | None) -> Tensor:
    """`A moment A^T` in float64."""
    picked = _picked(a)
    if picked is not None and moment is not None:
        picked = picked.to(moment.device)
        return moment.double()[picked[:, None], picked].to(a.device)
    wide = a.double()
    return wide @ (wide if moment is None else wide @ moment.double().to(a.device)).mT


def _times(left: Tensor, a: Tensor) -> Tensor:
    """`left A` in float64."""
    picked = _picked(a)
    if picked is None:
        return left @ a.double()
    product = left.new_zeros(len(left), a.shape[1])
    product[:, picked] = left
    return product


def _picked(a: Tensor) -> Tensor | None:
    """The inputs that A picks, if its rows are different rows of the identity, as `fold_gain` makes them."""
    tuned = a.nonzero()
    rows, columns = tuned.unbind(1)
    ones = len(tuned) == len(a) == len(columns.unique()) and bool((a[rows, columns] == 1).all())
    return columns if ones and torch.equal(rows, torch.arange(len(a), device=a.device)) else None
