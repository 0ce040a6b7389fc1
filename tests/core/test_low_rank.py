"""Changes of linear maps as products of two matrices, against dense oracles in float64."""

import pytest
import torch
from torch import Tensor

from peft_lntune.core.low_rank import LowRank, fold_gain, joined, padded, scaled, truncated
from tests.tolerance import assert_close


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(change: LowRank) -> Tensor:
    return change.b @ change.a


@pytest.mark.parametrize("out", [20, 3], ids=["tall", "flat"])
def test_a_fold_is_the_change_of_the_gain(out: int) -> None:
    weight, gain, delta = random(out, 12), random(12, seed=1), random(12, seed=2)
    delta[::2] = 0
    fold = fold_gain(weight, gain, delta)
    assert fold.rank == min(out, 6)
    x = random(5, 12, seed=3)
    assert_close((gain * x) @ (weight + dense(fold)).mT, ((gain + delta) * x) @ weight.mT)


def test_a_fold_is_in_float32_over_half_precision() -> None:
    weight, gain = random(4, 3).bfloat16(), torch.ones(3)
    delta = torch.tensor([1e-4, 0, 0])  # in bfloat16 the sum with the gain would be the gain
    fold = fold_gain(weight, gain, delta)
    assert fold.b.dtype == torch.float32
    torch.testing.assert_close(fold.b[:, 0], weight[:, 0].float() * 1e-4, rtol=1e-6, atol=0)


def test_a_change_behind_a_changed_gain() -> None:
    change, gain, delta = LowRank(random(2, 6), random(4, 2, seed=1)), random(6, seed=2), random(6, seed=3)
    delta[0] = gain[0] = 0  # nothing is tuned there, and nothing comes through
    x = random(5, 6, seed=4)
    assert_close((gain * x) @ dense(scaled(change, gain, delta)).mT, ((gain + delta) * x) @ dense(change).mT)


def test_sums_and_zeros() -> None:
    one, two = LowRank(random(2, 6), random(4, 2, seed=1)), LowRank(random(1, 6, seed=2), random(4, 1, seed=3))
    both = joined(one, two)
    assert both.rank == 3
    assert_close(dense(both), dense(one) + dense(two))
    wide = padded(both, 8)
    assert (wide.a.shape, wide.b.shape) == ((8, 6), (4, 8))
    assert_close(dense(wide), dense(both))


@pytest.mark.parametrize("out", [20, 5], ids=["tall", "flat"])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("picks", [True, False])
def test_truncation_is_the_best_of_its_rank(out: int, calibrated: bool, picks: bool) -> None:
    """By Eckart and Young, through a Cholesky factor of the moment and torch's SVD of the whole matrix."""
    some = torch.eye(12, dtype=torch.float64)[[11, 2, 3, 0, 5, 8, 7]]
    change = LowRank(some if picks else random(7, 12), random(out, 7, seed=1))
    x = random(500, 12, seed=2) * torch.linspace(0.1, 3, 12, dtype=torch.float64)
    moment = x.mT @ x / len(x) if calibrated else torch.eye(12, dtype=torch.float64)
    root = torch.linalg.cholesky(moment)
    values = torch.linalg.svdvals(dense(change) @ root)
    for rank in (1, 3, 4):
        best, energy = truncated(change, rank, moment if calibrated else None)
        left = (dense(change) - dense(best)) @ root
        assert best.rank == rank
        assert_close(left.square().sum(), values[rank:].square().sum(), roundings=1e4)  # of a sum of 100 squares
        assert_close(energy[: len(values)], values.square()[: len(energy)], roundings=1e4)
        first = truncated(change, 1, moment if calibrated else None)[0]
        assert_close(best.b[:, :1] @ best.a[:1], dense(first))  # so a smaller rank is a slice


@pytest.mark.parametrize("row", [[0, 0, 2, 0], [0, 1, 1, 0], [0, 1, 0, 0]], ids=["scaled", "sum", "twice"])
def test_rows_that_are_almost_picked(row: list[int]) -> None:
    """They are not taken for rows of the identity: twice one of them, a sum of two, or the same one twice."""
    change = LowRank(torch.tensor([[0, 1, 0, 0], row], dtype=torch.float64), random(5, 2))
    x = random(9, 4, seed=1)
    best, energy = truncated(change, 2, x.mT @ x)
    assert_close(dense(best), dense(change), roundings=1e4)
    assert_close(energy.sum(), (x @ dense(change).mT).square().sum(), roundings=1e4)


def test_truncation_where_inputs_lie_in_a_plane() -> None:
    """A moment that has no inverse: few tokens, or an entry that is always zero."""
    change = LowRank(torch.eye(6, dtype=torch.float64), random(9, 6))
    x = random(2, 6, seed=1)
    best, energy = truncated(change, 4, x.mT @ x)
    assert (energy > 1e-9 * energy[0]).sum() == 2
    assert_close(x @ dense(best).mT, x @ dense(change).mT, roundings=1e8)  # eigenvalues near 0 are right to 1e-16 of 1
    assert torch.isfinite(best.a).all()


def test_many_rows_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    change = LowRank(random(3, 5), random(10, 3, seed=1))
    whole = truncated(change, 2)
    monkeypatch.setattr("peft_lntune.core.low_rank._ROWS", 4)
    pieces = truncated(change, 2)
    assert_close(dense(pieces[0]), dense(whole[0]))
