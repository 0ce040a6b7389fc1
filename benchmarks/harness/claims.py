"""What was claimed before measuring, what was measured, and one word for it: holds, fails or inconclusive."""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks.harness.paired import DRAWS, FAILS, HOLDS, INCONCLUSIVE, LEVEL, Paired, Pairs
from benchmarks.harness.tables import mean_and_spread

CLAIM, NOT_YET = "- Claim: ", "Not measured yet"
ABOUT_VERDICTS = (
    f"Intervals are bootstrap intervals of {LEVEL:.0%} ({DRAWS:,} draws of tasks and, within each, of seeds), widened "
    "by Student's factor for few differences. A claim holds or fails if it does so in the whole interval, and is "
    "inconclusive if the interval covers the bound, or with one seed only. The number of further runs assumes that "
    "mean and spread stay as they are. With two or three tasks, the interval says little about other tasks."
)


def claim(wanted: str, measured: str, holds: bool) -> str:
    """Return the line of a claim about one figure, such as a count.

    Example:
        >>> claim("at most 45,000 bytes", "43,464", True)
        '- Claim: at most 45,000 bytes. Measured: 43,464. Verdict: holds.'
    """
    return f"- Claim: {wanted}. Measured: {measured}. Verdict: {HOLDS if holds else FAILS}."


def runs_claim(wanted: str, measured: str, runs: int, of: int) -> str:
    """Return the line of a claim that is asked of every run; it is inconclusive where it holds in some.

    Example:
        >>> runs_claim("a is first", "in 6 of 6 runs", 6, 6)
        '- Claim: a is first. Measured: in 6 of 6 runs. Verdict: holds.'
    """
    word = HOLDS if runs == of else INCONCLUSIVE if runs else FAILS
    return f"{CLAIM}{wanted}. Measured: {measured}. Verdict: {word}."


def open_claim(wanted: str, missing: str = NOT_YET) -> str:
    """Return the line of a claim that has no rows.

    Example:
        >>> open_claim("a above b")
        '- Claim: a above b. Not measured yet.'
    """
    return f"{CLAIM}{wanted}. {missing}."


def listed(lines: Iterable[str]) -> str:
    """Return the lines of claims as one list; the claims that have no rows stand together at its end.

    Example:
        >>> print(listed([open_claim("a above b"), claim("at most 2", "1", True), open_claim("b above c")]))
        - Claim: at most 2. Measured: 1. Verdict: holds.
        - Not measured yet: a above b; b above c.
    """
    every = list(lines)
    missing = [line.removeprefix(CLAIM).removesuffix(f". {NOT_YET}.") for line in every if line.endswith(f"{NOT_YET}.")]
    kept = [line for line in every if not line.endswith(f"{NOT_YET}.")]
    return "\n".join([*kept, *([f"- {NOT_YET}: {'; '.join(missing)}."] if missing else [])])


def time_claim(wanted: str, ratio: Sequence[float], again: Sequence[float], bound: float) -> str:
    """Return the line of a claim that a ratio of times is at most a bound.

    It is inconclusive where the ratio is no further from the bound than the first arm's second run is from 1.

    Args:
        wanted: the claim.
        ratio: first quartile, median and third quartile.
        again: the same of the first arm, timed a second time.
        bound: the median is held to it.

    Example:
        >>> time_claim("at most 1.05 of the base", [1.02, 1.03, 1.04], [0.99, 1.0, 1.01], 1.05)
        '- Claim: at most 1.05 of the base. Measured: 1.030 (noise: 0.990 to 1.010). Verdict: holds.'
    """
    noise = max(abs(again[0] - 1), abs(again[2] - 1))
    word = INCONCLUSIVE if abs(ratio[1] - bound) <= noise else HOLDS if ratio[1] <= bound else FAILS
    measured = f"{ratio[1]:.3f} (noise: {again[0]:.3f} to {again[2]:.3f})"
    return f"- Claim: {wanted}. Measured: {measured}. Verdict: {word}."


def seeds_claim(
    wanted: str,
    pairs: Pairs,
    planned: int,
    bound: float = 0.0,
    holds: Callable[[float, float], bool] = operator.gt,
    note: str = "",
) -> str:
    """Return the line of a claim about a mean over tasks and seeds.

    Args:
        wanted: the claim.
        pairs: task -> seed -> value; seeds that a task lacks are left out of all.
        planned: how many seeds are planned.
        bound: the mean is held to it.
        holds: `holds(mean, bound)`.
        note: a sentence that stands behind the verdict.

    Example:
        >>> print(seeds_claim("a above b", {"sst2": {0: 1.5, 1: 1.6, 2: 1.4}}, planned=3))
        - Claim: a above b. Measured: 1.5 ± 0.1 (by seed: 1.5, 1.6, 1.4; interval: 1.3 to 1.7). Verdict: holds.
        >>> seeds_claim("a above b", {"sst2": {}}, planned=3)
        '- Claim: a above b. Not measured yet.'
    """
    found = Paired(pairs)
    if not found.seeds:
        return open_claim(wanted)
    each = ", ".join(f"{value:.1f}" for value in found.seeds)
    word = found.verdict(partial(_swapped, holds, bound))
    if found.interval is None:
        span, more = "", "; at least two seeds are needed"
    else:
        span = "; interval: {:.1f} to {:.1f}".format(*found.interval)
        more = f"; {found.more_runs(bound)}" if word == INCONCLUSIVE else ""
    return (
        f"- Claim: {wanted}. Measured: {mean_and_spread(found.seeds, planned)} (by seed: {each}{span}). "
        f"Verdict: {word}{more}.{f' {note}' if note else ''}"
    )


def _swapped(holds: Callable[[float, float], bool], bound: float, mean: float) -> bool:
    return holds(mean, bound)
