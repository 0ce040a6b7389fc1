"""What entries are good for, on a classifier small enough to know it by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.leave_out import (
    answers,
    contributions,
    flat,
    partition,
    quantile,
    spearman,
    unflat,
    usefulness,
    without,
)


class Scaled(nn.Module):
    """Logits are the inputs times a gain, plus a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = x * self.weight + self.bias
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [{"x": torch.randn(n, 3), "labels": torch.randint(3, (n,))} for n in (5, 2)]


START = {"weight": torch.ones(3), "bias": torch.zeros(3)}
END = {"weight": torch.tensor([2.0, 0.5, 1.0]), "bias": torch.tensor([0.0, 1.0, -0.5])}


def test_answers_are_means_over_rows(batches: list[dict[str, Tensor]]) -> None:
    model = Scaled()
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    logits = rows["x"] * END["weight"] + END["bias"]
    found = answers(model, END, batches)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, rows["labels"])), rel=1e-6)
    assert found.accuracy == int((logits.argmax(-1) == rows["labels"]).sum()) / 7
    assert torch.equal(model.weight, START["weight"])
    assert not model.training


def test_contributions_are_shares_of_what_is_saved(batches: list[dict[str, Tensor]]) -> None:
    model = Scaled()
    saved = answers(model, START, batches).loss - answers(model, END, batches).loss
    found = contributions(model, START, END, {}, batches, points=50)
    assert float(found.sum()) == pytest.approx(saved, rel=1e-3)
    assert found[2] == found[3] == 0  # they have not moved
    # Of one entry alone, the share is what leaving it out costs.
    alone = {"weight": START["weight"], "bias": torch.tensor([0.0, 1.0, 0.0])}
    rest = {"weight": END["weight"]}
    (share,) = contributions(model, {"bias": START["bias"]}, {"bias": alone["bias"]}, rest, batches, 50)[1:2]
    end = {**rest, "bias": alone["bias"]}
    cost = answers(model, {**rest, "bias": START["bias"]}, batches).loss - answers(model, end, batches).loss
    assert float(share) == pytest.approx(cost, rel=1e-3)


def test_left_out_entries_are_as_before() -> None:
    group = torch.tensor([True, False, False, False, True, True])
    found = without(START, END, group)
    assert found["weight"].tolist() == [1.0, 0.5, 1.0]
    assert found["bias"].tolist() == [0.0, 0.0, 0.0]
    assert flat(unflat(flat(END), END)).tolist() == flat(END).tolist()
    assert flat(without(START, END, torch.ones(6).bool())).tolist() == flat(START).tolist()


def test_usefulness_finds_what_is_useful() -> None:
    worth = torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0, 0.0])
    drawn = torch.Generator().manual_seed(0)
    partitions = [partition(6, 3, drawn) for _ in range(40)]
    rises = [torch.zeros(3).index_add(0, groups, worth).tolist() for groups in partitions]
    found = usefulness(partitions, rises)
    assert int(found.argmax()) == 2
    assert float(found[2]) == 5.0


def test_bins_rise_and_are_even() -> None:
    scores = torch.tensor([5.0, 1.0, 3.0, 3.0, 9.0, 0.0, 2.0])
    bins = quantile(scores, 3)
    assert bins.bincount().tolist() == [3, 2, 2]
    assert max(scores[bins == 0]) <= min(scores[bins == 1]) <= max(scores[bins == 1]) <= min(scores[bins == 2])


def test_rank_correlation() -> None:
    from scipy.stats import spearmanr

    torch.manual_seed(0)
    one, two = torch.randint(5, (40,)).float(), torch.randn(40)
    assert spearman(one, two) == pytest.approx(float(spearmanr(one, two).statistic), rel=1e-9)
    assert spearman(one, -one) == pytest.approx(-1.0)
    assert spearman(one, torch.ones(40)) is None
