"""What was claimed before measuring, what was measured, and one word for it: holds, fails or inconclusive."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Finding:
    """What was claimed, what was measured, and what that says.

    Attributes:
        wanted: the claim.
        measured: in a line; None has not been measured.
        verdict: one word.
        short: `measured` in a table; empty means the same.
        more: what would decide it, if it is inconclusive.
        note: sentences that stand behind the verdict.
        missing: why there is no measurement.
        edge: methods of which a chosen learning rate is at the edge of its grid, in a table.
    """

    wanted: str
    measured: str | None = None
    verdict: str | None = None
    short: str = ""
    more: str = ""
    note: str = ""
    missing: str = NOT_YET
    edge: str = ""

    @property
    def line(self) -> str:
        """The finding as an item of a list.

        Example:
            >>> Finding("a above b").line
            '- Claim: a above b. Not measured yet.'
            >>> Finding("a above b", "0.1", INCONCLUSIVE, more="more seeds are needed", note="A note.").line
            '- Claim: a above b. Measured: 0.1. Verdict: inconclusive; more seeds are needed. A note.'
        """
        if self.measured is None:
            return f"{CLAIM}{self.wanted}. {self.missing}."
        more, note = self.more and f"; {self.more}", self.note and f" {self.note}"
        return f"{CLAIM}{self.wanted}. Measured: {self.measured}. Verdict: {self.verdict}{more}.{note}"


def claim(wanted: str, measured: str, holds: bool) -> str:
    """Return the line of a claim about one figure, such as a count.

    Example:
        >>> claim("at most 45,000 bytes", "43,464", True)
        '- Claim: at most 45,000 bytes. Measured: 43,464. Verdict: holds.'
    """
    return Finding(wanted, measured, HOLDS if holds else FAILS).line


def in_runs(wanted: str, measured: str, runs: int, of: int, note: str = "") -> Finding:
    """Return what is found of a claim that is asked of every run; it is inconclusive where it holds in some.

    Example:
        >>> in_runs("a is first", "in 6 of 6 runs", 6, 6).line
        '- Claim: a is first. Measured: in 6 of 6 runs. Verdict: holds.'
    """
    return Finding(wanted, measured, HOLDS if runs == of else INCONCLUSIVE if runs else FAILS, note=note)


def listed(lines: Iterable[str]) -> str:
    """Return the lines of claims as one list; the claims that have no rows stand together at its end.

    Example:
        >>> print(listed([Finding("a above b").line, claim("at most 2", "1", True), Finding("b above c").line]))
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
    return Finding(wanted, measured, word).line


def over_seeds(
    wanted: str,
    pairs: Pairs,
    planned: int,
    bound: float = 0.0,
    holds: Callable[[float, float], bool] = operator.gt,
    note: str = "",
) -> Finding:
    """Return what is found of a claim about a mean over tasks and seeds.

    Args:
        wanted: the claim.
        pairs: task -> seed -> value; seeds that a task lacks are left out of all.
        planned: how many seeds are planned.
        bound: the mean is held to it.
        holds: `holds(mean, bound)`.
        note: a sentence that stands behind the verdict.

    Example:
        >>> print(over_seeds("a above b", {"sst2": {0: 1.5, 1: 1.6, 2: 1.4}}, planned=3).line)
        - Claim: a above b. Measured: 1.5 ± 0.1 (by seed: 1.5, 1.6, 1.4; interval: 1.2 to 1.8). Verdict: holds.
        >>> over_seeds("a above b", {"sst2": {}}, planned=3).line
        '- Claim: a above b. Not measured yet.'
    """
    found = Paired(pairs)
    if not found.seeds:
        return Finding(wanted)
    each = ", ".join(f"{value:.1f}" for value in found.seeds)
    word = found.verdict(partial(_swapped, holds, bound))
    span = found.span
    more = "" if word != INCONCLUSIVE else found.more_runs(bound) if span else "at least two seeds are needed"
    measured = f"{mean_and_spread(found.seeds, planned)} (by seed: {each}{span and f'; interval: {span}'})"
    return Finding(wanted, measured, word, f"{found.mean:.1f} ({span or 'one seed'})", more, note)


def _swapped(holds: Callable[[float, float], bool], bound: float, mean: float) -> bool:
    return holds(mean, bound)
