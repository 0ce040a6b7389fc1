"""Intervals, verdicts and numbers of further runs, from differences by task and seed."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness import paired
from benchmarks.harness.claims import over_seeds
from benchmarks.harness.paired import FAILS, HOLDS, INCONCLUSIVE, Paired, interval, more_runs


def test_one_task_gives_about_students_interval() -> None:
    values = np.random.default_rng(0).normal(size=12)
    low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    found = interval([values.tolist()])
    assert found is not None
    # Quantiles of the resampled means, which are nearly normal at twelve values, and 10,000 draws.
    assert found == pytest.approx((low, high), abs=0.05 * (high - low))


def test_tasks_that_differ_widen_the_interval() -> None:
    alike, apart = [[0.9, 1.0, 1.1]] * 3, [[-0.1, 0.0, 0.1], [0.9, 1.0, 1.1], [1.9, 2.0, 2.1]]
    (low, high), (lower, higher) = interval(alike) or (), interval(apart) or ()
    assert 0 < low < high
    assert lower < 0.2
    assert higher > 1.8


def test_intervals_cover_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "DRAWS", 400)
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        low, high = interval(random.normal(size=(1, 3)).tolist()) or (0.0, 0.0)
        covered += low <= 0 <= high
    # 95 % are wanted; 300 draws of that have a standard deviation of 1.3 %, and plain percentiles cover some 75 %.
    assert 0.90 <= covered / 300 <= 0.99


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([1.5, 1.6, 1.4], HOLDS),
        ([-1.5, -1.6, -1.4], FAILS),
        ([0.4, -0.2, 1.0], INCONCLUSIVE),
        ([1.4], INCONCLUSIVE),
        ([0.0, 0.0], FAILS),
    ],
)
def test_verdicts(values: list[float], word: str) -> None:
    assert Paired({"sst2": dict(enumerate(values))}).verdict(lambda mean: mean > 0) == word


def test_seeds_that_a_task_lacks_are_left_out() -> None:
    found = Paired({"sst2": {0: 1.0, 1: 2.0, 2: 9.0}, "trec": {1: 4.0, 0: 3.0}})
    assert found.rows == [[1.0, 2.0], [3.0, 4.0]]
    assert found.seeds == [2.0, 3.0]
    assert found.mean == 2.5
    assert Paired({"sst2": {0: 1.0}, "trec": {}}).seeds == Paired({}).seeds == []


def test_as_many_more_runs_would_decide() -> None:
    rows = [[-0.2, 0.4, 1.0]]
    assert more_runs(rows, 0.0) == "about 9 more seeds per task would decide it (18 runs)"
    mean, spread = 0.4, 0.6
    least = [n for n in range(2, 99) if abs(mean) > stats.t.ppf(0.975, n - 1) * spread / n**0.5]
    assert least[0] == 3 + 9
    assert more_runs(rows, 0.4) == "1,000 seeds would not decide it"


def test_where_tasks_differ_more_seeds_do_not_help() -> None:
    rows = [[-1.1, -1.0, -0.9], [2.9, 3.0, 3.1]]
    said = more_runs(rows, 0.0)
    assert said.startswith("more seeds would not decide it, about ")
    tasks = int(said.split("about ")[1].split()[0])
    assert said.endswith(f"more tasks would ({6 * tasks} runs)")


def test_the_line_of_a_claim() -> None:
    line = over_seeds("a above b", {"sst2": {0: 0.4, 1: -0.2, 2: 1.0}}, planned=3, note="A note.").line
    assert line.startswith("- Claim: a above b. Measured: 0.4 ± 0.6 (by seed: 0.4, -0.2, 1.0; interval: -1.2 to 2.0). ")
    assert line.endswith("Verdict: inconclusive; about 9 more seeds per task would decide it (18 runs). A note.")
    assert "inconclusive; at least two seeds are needed." in over_seeds("a above b", {"sst2": {0: 0.4}}, planned=1).line
