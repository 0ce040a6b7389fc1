"""Comparisons of arms over several tasks: differences within a seed, bounds set beforehand, lines of tables."""

import operator
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.harness.claims import ABOUT_VERDICTS, Finding, over_seeds
from benchmarks.harness.finals import Finals, by_seed, differences, edge_note, figures
from benchmarks.harness.paired import Paired, Pairs
from benchmarks.harness.plots import Dot
from benchmarks.harness.rows import Row
from benchmarks.harness.tables import NONE, NOT_RUN, mean_and_spread, of_what_ran, what_did_not_run

ABOUT_DIFFERENCES = (
    "Differences in points, the first minus the second, each taken within a seed (the same head and batches{also}). "
    "`on average` is over {tasks}, seed by seed. "
    f"{ABOUT_VERDICTS}"
)
ABOUT_HEAD = "Every arm trains the head as well; `tuned entries` leaves it out."
ABOUT_RATES = (
    "`rate` is the learning rate chosen on held-out training rows; `(edge)` marks the smallest or largest tried, so "
    "that a rate beyond might do better."
)


@dataclass(frozen=True)
class Side:
    """One arm of a comparison.

    Attributes:
        said: in a sentence.
        arm: in rows.
        at: further coordinates of its rows.
        view: a row -> the row as it is compared, where that is by another figure of it.
    """

    said: str
    arm: str
    at: Mapping[str, Any] = field(default_factory=dict)
    view: Callable[[Row], Row] | None = None

    def rows(self, found: Finals, task: str) -> list[Row]:
        """Return the reported rows on a task."""
        rows = found.of(task, self.arm, **self.at)
        return rows if self.view is None else [self.view(row) for row in rows]


@dataclass(frozen=True)
class Bound:
    """What was wanted of a difference before measuring: `holds(mean of ours - theirs, bound)`."""

    ours: Side
    theirs: Side
    wanted: str
    bound: float = 0.0
    holds: Callable[[float, float], bool] = operator.gt


def not_run(missing: Iterable[Side]) -> str:
    """Return the end of a sentence that names the sides without rows.

    Example:
        >>> not_run([Side("mam", "mam"), Side("lora+ln", "lora+ln")]), not_run([])
        ('; not run: mam, lora+ln', '')
    """
    names = ", ".join(side.said for side in missing)
    return f"; {NOT_RUN}: {names}" if names else ""


@dataclass(frozen=True)
class Comparison:
    """Rows of some tasks, of which some are averaged.

    Attributes:
        found: the reported rows.
        tasks: in this order.
        averaged: those of the tasks that averages are over.
    """

    found: Finals
    tasks: Sequence[str]
    averaged: Sequence[str]

    @property
    def planned(self) -> int:
        """Return how many seeds are planned."""
        return len(self.found.seeds)

    def differences(self, ours: Side, theirs: Side) -> dict[str, dict[int, float]]:
        """Return task -> seed -> ours minus theirs."""
        return {task: differences(ours.rows(self.found, task), theirs.rows(self.found, task)) for task in self.tasks}

    def of_averaged(self, by_task: Pairs) -> Pairs:
        """Return what there is of the averaged tasks."""
        return {task: by_task[task] for task in self.averaged}

    def average(self, by_task: Pairs) -> list[float]:
        """Return the mean over the averaged tasks, for each seed that all of them have."""
        return Paired(self.of_averaged(by_task)).seeds

    def wanted(self, bound: Bound) -> Finding:
        """Return what is found of the claim that a difference is beyond a bound."""
        pairs = self.of_averaged(self.differences(bound.ours, bound.theirs))
        wanted = f"{bound.ours.said} {bound.wanted}, on average over {', '.join(self.averaged)}"
        note = self.edges([bound.ours, bound.theirs])
        return over_seeds(wanted, pairs, self.planned, bound.bound, bound.holds, note)

    def asked(self, bound: Bound) -> Finding:
        """Return the same for a table that names the tasks elsewhere."""
        found = self.wanted(bound)
        sides = [each for each in (bound.ours, bound.theirs) if self.edges([each])]
        wanted = f"{bound.ours.said} {bound.wanted}"
        return replace(found, wanted=wanted, edge=", ".join(dict.fromkeys(each.said for each in sides)))

    def edges(self, sides: Iterable[Side], tasks: Sequence[str] | None = None) -> str:
        """Return the sentence that says whose learning rates were at the edge of their grids.

        Args:
            sides: whose rates are meant.
            tasks: None means those of the averages.
        """
        of = self.averaged if tasks is None else tasks
        return edge_note({side.said: [task for task in of if self.found.at_edge(task, side.arm)] for side in sides})

    def ranked(self, sides: Iterable[Side], against: Side) -> tuple[list[Side], list[Side]]:
        """Return sides by their mean difference from another, the worst first, and those that have none."""
        means, missing = list[tuple[float, Side]](), list[Side]()
        for side in sides:
            values = self.average(self.differences(side, against))
            if values:
                means.append((statistics.mean(values), side))
            else:
                missing.append(side)
        return [side for _, side in sorted(means, key=lambda found: found[0])], missing

    def difference_table(self, pairs: Iterable[tuple[Side, Side]]) -> str:
        """Return a table with a line a pair."""
        table: list[list[object]] = []
        for ours, theirs in pairs:
            by_task = self.differences(ours, theirs)
            found = Paired(self.of_averaged(by_task))
            each = (mean_and_spread(list(seeds.values()), self.planned) for seeds in by_task.values())
            verdict = found.verdict(lambda mean: mean > 0) if found.seeds else None
            table.append([f"{ours.said} - {theirs.said}", *each, mean_and_spread(found.seeds, self.planned), verdict])
        return of_what_ran(("difference", *self.tasks, "on average", "above 0"), table)

    def not_run(self, groups: Mapping[str, Sequence[Side]], tasks: Sequence[str] | None = None) -> Iterator[str]:
        """Yield the lines that list what has no row or too few.

        Args:
            groups: name of a table -> what is in it.
            tasks: that were planned; None means those compared.
        """
        for name, sides in groups.items():
            runs = {
                task: {side.said: len(side.rows(self.found, task)) for side in sides} for task in tasks or self.tasks
            }
            yield from (f"- {name}, {said}" for said in what_did_not_run(runs, self.planned))

    def scores(self, arm: str, **at: Any) -> list[object]:
        """Return the cells of a line that hold scores: each task, and the average of the seeds that all have."""
        return self.scores_of(Side(arm, arm, at))

    def scores_of(self, side: Side) -> list[object]:
        """Return the same of a side, which may be seen by another figure."""
        by_task = {task: by_seed(side.rows(self.found, task)) for task in self.tasks}
        cells = [list(scores.values()) for scores in by_task.values()]
        return [mean_and_spread(scores, self.planned) for scores in (*cells, self.average(by_task))]

    def entries(self, arm: str, **at: Any) -> str | None:
        """Return the entries that an arm tunes, with both ends where tasks differ."""
        counts = {row["num_method_params"] for task in self.tasks for row in self.found.of(task, arm, **at)}
        return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) if counts else None

    def rates(self, arm: str, **at: Any) -> str | None:
        """Return the learning rate that was chosen for each task on which the arm was run."""
        ran = {task: self.found.of(task, arm, **at) for task in self.tasks}
        rates = [self.found.rate(task, arm) if rows else None for task, rows in ran.items()]
        return "; ".join(rate or NONE for rate in rates) if any(rates) else None

    def header(self, *first: str) -> tuple[str, ...]:
        """Return the header of a table whose lines are `line`s behind other cells."""
        return (*first, "tuned entries", *self.tasks, "on average", f"rate ({'; '.join(self.tasks)})")

    def line(self, arm: str, **at: Any) -> list[object]:
        """Return entries, scores and rates of an arm."""
        return [self.entries(arm, **at), *self.scores(arm, **at), self.rates(arm, **at)]

    def dots(self, task: str, sides: Iterable[Side], methods: Mapping[str, str] | None = None) -> list[Dot]:
        """Return the rows of a dot plot, of what was run.

        Args:
            task: whose scores they are.
            sides: in order.
            methods: what a side said -> whose colour it has, where that is not its arm's.
        """
        found = [(side, figures(side.rows(self.found, task))) for side in sides]
        return [Dot(s.said, (methods or {}).get(s.said, s.arm), scores) for s, scores in found if scores]
