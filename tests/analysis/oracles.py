"""Slow and obviously right answers for the analysis: plain Python numbers, one at a time."""

import math
import statistics
from collections.abc import Sequence
from itertools import combinations


def change(before: Sequence[float], after: Sequence[float]) -> tuple[float | None, ...]:
    """Mean |change|, and the same over mean |before| and over std(before); None where that is 0 or unknown."""
    moved = math.fsum(abs(new - old) for old, new in zip(before, after, strict=True)) / len(before)
    size = math.fsum(map(abs, before)) / len(before)
    std = statistics.stdev(before) if len(set(before)) > 1 else 0
    return moved, moved / size if size else None, moved / std if std else None


def ranks(values: Sequence[float | None]) -> list[int | None]:
    """Places in the order from the largest; equal values have the first of their places."""
    order = sorted((value for value in values if value is not None), reverse=True)
    return [None if value is None else order.index(value) + 1 for value in values]


def mean_overlap(a: int, b: int, entries: int) -> float:
    """The mean Jaccard index over every two masks of these sizes."""
    one = set(range(a))  # which entries it has does not matter: the other runs through all
    others = [set(other) for other in combinations(range(entries), b)]
    return statistics.mean(len(one & other) / len(one | other) if one | other else 1.0 for other in others)
