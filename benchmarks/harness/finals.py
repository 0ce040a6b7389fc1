"""The reported rows of an experiment, and sentences about them."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.arms import find_arm
from benchmarks.harness.classification import Protocol, best_rates, final_cells
from benchmarks.harness.metrics import ACCURACY, metric_of
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import mean_and_spread


class Finals:
    """The rows of one protocol, by task, arm, dtype and an arm's further coordinates."""

    def __init__(self, rows: Rows, protocol: Protocol, seeds: Sequence[int]) -> None:
        """Look into `rows`; `seeds` are the planned ones."""
        self.rows, self.protocol, self.seeds = rows, protocol, seeds

    def of(self, task: str, arm: str, dtype: str = "float32", **at: Any) -> list[Row]:
        """Return the rows there are, in the order of the seeds."""
        cells = final_cells(self.protocol, task, arm, dtype, self.seeds, **at)
        return [row for row in map(self.rows.get, cells) if row is not None]

    def rate(self, task: str, arm: str, dtype: str = "float32") -> str | None:
        """Return the learning rate that was chosen, and whether it was the smallest or largest tried."""
        searched = find_arm(arm).rate_of or arm
        chosen = best_rates(self.rows, self.protocol, [(task, searched, dtype)]).get((task, searched, dtype))
        if chosen is None:
            return None
        rates = find_arm(searched).rates
        return f"{chosen:g}" + (" (edge)" if chosen in (min(rates), max(rates)) else "")


def reported(rows: Rows, protocol: Protocol, dtype: str = "float32") -> list[Cell]:
    """Return what this experiment has run and reports of a protocol; of others' tasks and seeds it says nothing."""
    cells = [row["cell"] for row in rows.own() if row["cell"]["phase"] == "final"]
    return [cell for cell in cells if cell["protocol"] == protocol.name and cell["dtype"] == dtype]


def figures(rows: Sequence[Row]) -> list[float]:
    """Return the score of each row by its task's metric, as tables show it: accuracy in per cent and the like."""
    return [metric_of(row["cell"]["task"]).shown(row["metrics"]) for row in rows]


def by_seed(rows: Sequence[Row]) -> dict[int, float]:
    """Return seed -> score."""
    return {row["cell"]["seed"]: score for row, score in zip(rows, figures(rows), strict=True)}


def differences(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[int, float]:
    """Return seed -> by how many points ours are better than theirs, for every seed that both have.

    Example:
        >>> row = lambda seed, score: {"cell": {"task": "sst2", "seed": seed}, "metrics": {"accuracy": score}}
        >>> differences([row(0, 0.75), row(1, 0.5)], [row(0, 0.5)])
        {0: 25.0}
    """
    first, second = by_seed(ours), by_seed(theirs)
    shared = [seed for seed in first if seed in second]
    metric = metric_of(ours[0]["cell"]["task"]) if shared else ACCURACY
    return {seed: metric.gain(first[seed] - second[seed]) for seed in shared}


def verdict(wanted: str, measured: Sequence[float], planned: int, held: bool) -> str:
    """Return the sentence that says whether a bound held.

    Example:
        >>> verdict("a within 1 point of b", [-0.5, 0.5], planned=2, held=True)
        'Wanted: a within 1 point of b. Measured, seed by seed: 0.0 ± 0.7: held.'
    """
    found = mean_and_spread(measured, planned)
    return f"Wanted: {wanted}. Measured, seed by seed: {found}: {'held' if held else 'did not hold'}."


def certainty(measured: Sequence[float], bound: float) -> str:
    """Return how sure it is on which side of a bound the mean of the measured values lies.

    Example:
        >>> certainty([0.4, -0.2, 1.0], bound=0.0)
        'open: mean ± spread covers 0 (by seed: 0.4, -0.2, 1.0)'
        >>> certainty([1.4, 1.2], bound=0.0)
        'mean ± spread is above 0 (by seed: 1.4, 1.2)'
        >>> certainty([1.4], bound=0.0)
        'open: one seed has no spread (by seed: 1.4)'
    """
    each = "(by seed: " + ", ".join(f"{value:.1f}" for value in measured) + ")"
    if len(measured) < 2:
        return f"open: one seed has no spread {each}"
    mean, spread = statistics.mean(measured), statistics.stdev(measured)
    if mean - spread <= bound <= mean + spread:
        return f"open: mean ± spread covers {bound:g} {each}"
    return f"mean ± spread is {'above' if mean > bound else 'below'} {bound:g} {each}"
