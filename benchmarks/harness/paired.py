"""Paired differences over tasks and seeds: an interval by bootstrap, a verdict, and how many more runs would decide."""

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Pairs = Mapping[str, Mapping[int, float]]
"""Task -> seed -> a difference between two runs of the same head and batches."""

HOLDS, FAILS, INCONCLUSIVE = "holds", "fails", "inconclusive"
LEVEL = 0.95
DRAWS = 10_000
MOST = 1000  # seeds or tasks beyond which a number would only pretend to be known


@dataclass(frozen=True)
class Paired:
    """Differences on some tasks, each within a seed.

    Attributes:
        by_task: the differences; seeds that a task lacks are left out of all.
    """

    by_task: Pairs

    @cached_property
    def rows(self) -> list[list[float]]:
        """The differences, task by task, of the seeds that every task has."""
        each = list(self.by_task.values())
        seeds = [seed for seed in (each[0] if each else {}) if all(seed in values for values in each)]
        return [[values[seed] for seed in seeds] for values in each] if seeds else []

    @property
    def seeds(self) -> list[float]:
        """The mean over tasks of each seed."""
        return [statistics.mean(values) for values in zip(*self.rows, strict=True)]

    @property
    def mean(self) -> float:
        """The mean over tasks and seeds."""
        return statistics.mean(self.seeds)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The interval of the mean; None with fewer than two seeds."""
        return interval(self.rows)

    @property
    def span(self) -> str:
        """The interval in words; empty with fewer than two seeds."""
        return "{:.1f} to {:.1f}".format(*self.interval) if self.interval else ""

    def verdict(self, holds: Callable[[float], bool]) -> str:
        """Return one word for a claim: whether it is true in the whole interval, nowhere in it, or in a part.

        Args:
            holds: whether the claim is true if the mean is that.
        """
        if self.interval is None:
            return INCONCLUSIVE
        low, high = map(holds, self.interval)
        return HOLDS if low and high else INCONCLUSIVE if low or high else FAILS

    def more_runs(self, bound: float) -> str:
        """Say how many more runs would decide on a bound, if mean and spread stay as they are.

        Args:
            bound: what the mean is held to.
        """
        return more_runs(self.rows, bound)


def interval(rows: Sequence[Sequence[float]], level: float = LEVEL) -> tuple[float, float] | None:
    """Return a bootstrap interval of the mean: tasks are drawn with replacement, and for each its seeds.

    The percentiles of so few values are too narrow. So their distances from the mean are stretched by
    `sqrt(n / (n - 1)) t / z`, with n differences in all and the quantiles t of Student's distribution and z of the
    normal one. For one task this is about Student's interval.

    Args:
        rows: differences (tasks, seeds).
        level: share of intervals that are to cover the mean.

    Returns:
        Both ends; None with fewer than two seeds.

    Source:
        Hesterberg 2015, "What Teachers Should Know About the Bootstrap" (arXiv 1411.5279), on the narrowness.

    Example:
        >>> low, high = interval([[-1.0, 0.0, 1.0]])
        >>> round(low, 1), round(high, 1)
        (-2.7, 2.7)
        >>> interval([[1.0]])
    """
    import numpy as np

    values = np.asarray(rows, dtype=float)
    if values.ndim != 2 or values.shape[1] < 2:
        return None
    tasks, seeds = values.shape
    random = np.random.default_rng(0)
    drawn = random.integers(tasks, size=(DRAWS, tasks, 1))
    means = values[drawn, random.integers(seeds, size=(DRAWS, tasks, seeds))].mean(axis=(1, 2))
    mean, half = values.mean(), (1 - level) / 2
    low, high = mean + _stretch(values.size, level) * (np.quantile(means, [half, 1 - half]) - mean)
    return float(low), float(high)


def _stretch(count: int, level: float) -> float:
    normal = statistics.NormalDist().inv_cdf((1 + level) / 2)
    return math.sqrt(count / (count - 1)) * _student(count, level) / normal


def _student(count: int, level: float) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + level) / 2, count - 1))


def more_runs(rows: Sequence[Sequence[float]], bound: float, level: float = LEVEL) -> str:
    """Say how many more seeds per task, or else how many more tasks, would take a bound out of the interval.

    The standard error is that of the two levels: the spread between tasks over their number, and the spread between
    seeds over the number of differences.

    Args:
        rows: differences (tasks, seeds), at least two seeds.
        bound: what the mean is held to.
        level: of the interval.

    Returns:
        The end of a sentence.

    Example:
        >>> more_runs([[-0.2, 0.4, 1.0]], 0.0)
        'about 9 more seeds per task would decide it (18 runs)'
    """
    tasks, seeds = len(rows), len(rows[0])
    gap = abs(statistics.mean(value for row in rows for value in row) - bound)
    within = statistics.mean(statistics.variance(row) for row in rows)
    means = [statistics.mean(row) for row in rows]
    between = max(0.0, statistics.variance(means) - within / seeds) if tasks > 1 else 0.0

    def decides(tasks: int, seeds: int) -> bool:
        error = math.sqrt(between / tasks + within / (tasks * seeds))
        return gap > _student(tasks * seeds, level) * error

    # Whether n decide changes once as n grows: the error falls with it, and so does Student's quantile.
    more = 1 + bisect_left(range(seeds + 1, MOST + 1), True, key=lambda n: decides(tasks, n))
    if seeds + more <= MOST:
        return f"about {more} more seeds per task would decide it ({2 * tasks * more} runs)"
    further = 1 + bisect_left(range(tasks + 1, MOST + 1), True, key=lambda n: decides(n, seeds))
    if tasks > 1 and tasks + further <= MOST:
        return f"more seeds would not decide it, about {further} more tasks would ({2 * seeds * further} runs)"
    return f"{MOST:,} seeds would not decide it"
