"""The tables and pictures of `norm_entries.py`, from its rows."""

import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from benchmarks.harness.classification import Protocol
from benchmarks.harness.comparison import over_seeds
from benchmarks.harness.finals import certainty, verdict
from benchmarks.harness.plots import plot_along, plot_matrices
from benchmarks.harness.rows import Row
from benchmarks.harness.tables import markdown, mean_and_spread

NAME = "norm_entries"
SCORES = ("magnitude", "Fisher", "movement")
MEASURED = (*SCORES, "contribution", "leave-out")
KINDS = ("together", "gains", "biases")
PAIRS = tuple(f"{one}, {other}" for one, other in combinations(MEASURED, 2))
Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class Scope:
    """What is reported.

    Attributes:
        protocol: of the rows.
        sizes: the coordinates of a cell that say how much is measured.
        seeds: planned ones, and others that were run.
        rows: task -> reported rows, in the order of the seeds.
    """

    protocol: Protocol
    sizes: Mapping[str, int]
    seeds: tuple[int, ...]
    rows: Mapping[str, Sequence[Row]]

    @property
    def planned(self) -> int:
        """Return how many seeds are planned."""
        return len(self.seeds)

    def values(self, task: str, value: Value) -> list[float]:
        """Return a value of each row that has one."""
        found = (value(row) for row in self.rows[task])
        return [each for each in found if each is not None]

    def average(self, value: Value) -> list[float]:
        """Return the mean over tasks of a value, for each seed that all of them have."""
        by_task = {
            task: {row["cell"]["seed"]: each for row in rows if (each := value(row)) is not None}
            for task, rows in self.rows.items()
        }
        return over_seeds(by_task)


def _correlation(kind: str, pair: str) -> Value:
    """Return what reads a correlation over entries from a row, in hundredths."""
    return lambda row: _hundredths(row["correlations"][kind][pair])


def _over_groups(kind: str, score: str) -> Value:
    return lambda row: _hundredths(row["group_correlations"][kind][score])


def _difference(first: Value, second: Value) -> Value:
    def value(row: Row) -> float | None:
        one, other = first(row), second(row)
        return None if one is None or other is None else one - other

    return value


def _hundredths(value: float | None) -> float | None:
    return None if value is None else 100 * value


_USEFUL = {score: _correlation("together", f"{score}, contribution") for score in SCORES}
# What was wanted before measuring, and the value that is above 0 where it is so.
WANTED: tuple[tuple[str, Value], ...] = (
    *(
        (f"larger {kind} contribute more", _correlation(kind, "magnitude, contribution"))
        for kind in ("gains", "biases")
    ),
    ("entries of more Fisher information contribute more", _USEFUL["Fisher"]),
    (
        "Fisher information ranks contributions better than magnitude",
        _difference(_USEFUL["Fisher"], _USEFUL["magnitude"]),
    ),
    (
        "movement ranks contributions better than Fisher information",
        _difference(_USEFUL["movement"], _USEFUL["Fisher"]),
    ),
)


def write_report(results: Path, scope: Scope) -> None:
    """Write the page and its two pictures."""
    end = "" if scope.protocol.name == "cpu" else f"_{scope.protocol.name}"
    results.mkdir(parents=True, exist_ok=True)
    parts = [_title(scope), *_held(scope), *_correlations(scope)]
    if any(scope.rows.values()):
        _plot_correlations(scope, results / f"{NAME}{end}.png")
        parts.append(f"![Rank correlations, mean over tasks and seeds]({NAME}{end}.png)")
    parts += _bins(scope)
    if any(scope.rows.values()):
        _plot_bins(scope, results / f"{NAME}_left_out{end}.png")
        parts.append(f"![Rise in loss without each bin]({NAME}_left_out{end}.png)")
    (results / f"{NAME}{end}.md").write_text("\n\n".join([*parts, *_answers(scope)]) + "\n", encoding="utf-8")


def _title(scope: Scope) -> str:
    protocol, sizes = scope.protocol, scope.sizes
    return (
        "# Which entries of the norms matter\n\n"
        f"Protocol `{protocol.name}`: all norms and the head are trained for {protocol.steps} steps of "
        f"{protocol.batch_size} rows; mean ± standard deviation over {scope.planned} seeds. Of each entry (a gain or a "
        "bias) is known:\n\n"
        "- magnitude: |w0| in the pretrained model;\n"
        f"- Fisher: empirical Fisher information over {protocol.mask_samples:,} training rows, at the pretrained body "
        "with the fresh head of the seed, as masks are chosen by;\n"
        "- movement: |w1 - w0| over the training;\n"
        f"- contribution: its share of the loss that all norms save, by integrated gradients from w0 to w1 "
        f"({sizes['points']} points);\n"
        "- leave-out: the loss that is added where its random group is set back to w0, mean over "
        f"{sizes['partitions']} partitions into {sizes['groups']} groups.\n\n"
        f"The last two are on the same {sizes['rows']} rows that were held out of the training rows. Correlations are "
        "Spearman's, in hundredths. What an entry's leave-out says is mostly of the others in its groups, so over "
        "entries its correlations are small by construction; those over groups are not."
    )


def _held(scope: Scope) -> Iterator[str]:
    yield "## What held"
    yield "\n".join(_line(scope, wanted, value) for wanted, value in WANTED)


def _line(scope: Scope, wanted: str, value: Value) -> str:
    said = f"{wanted}: rank correlation, or difference of two, above 0 on average over {', '.join(scope.rows)}"
    values = scope.average(value)
    if not values:
        return f"- Wanted: {said}. Not measured yet."
    held = operator.gt(statistics.mean(values), 0.0)
    return f"- {verdict(said, values, scope.planned, held)} How sure: {certainty(values, 0.0)}."


def _correlations(scope: Scope) -> Iterator[str]:
    header = [f"{task}, {kind}" for task in scope.rows for kind in KINDS]
    yield "## Over entries"
    yield markdown(("rank correlation of", *header), [[pair, *_cells(scope, _correlation, pair)] for pair in PAIRS])
    yield "## Over random groups"
    yield "Of the sum of a score over a group's entries with the loss that leaving the group out adds:"
    lines = [[score, *_cells(scope, _over_groups, score)] for score in (*SCORES, "contribution")]
    yield markdown(("rank correlation of", *header), lines)
    yield "`-` stands where all entries are equal. With gains or biases alone, the rest of each group is noise."


def _cells(scope: Scope, read: Callable[[str, str], Value], name: str) -> Iterator[str | None]:
    for task, rows in scope.rows.items():
        for kind in KINDS:
            values = scope.values(task, read(kind, name))
            yield mean_and_spread(values, scope.planned) if values or not rows else "-"


def _bins(scope: Scope) -> Iterator[str]:
    bins = scope.sizes["bins"]
    yield "## Without the entries of the highest or lowest scores"
    ends = (("highest", bins - 1), ("lowest", 0))
    header = [f"{task}, {said}" for task in scope.rows for said, _ in ends]
    lines = [
        [kind, score, *(_rise(scope, task, kind, score, b) for task in scope.rows for _, b in ends)]
        for kind in ("gains", "biases")
        for score in (*SCORES, "random")
    ]
    yield markdown(("entries", "by", *header), lines)
    yield (
        f"The loss that is added, and in brackets the points of accuracy lost, where one of {bins} equal bins of all "
        "gains, or of all biases, is set back to its start. `random` has no order: its bins show what chance does."
    )


def _rise(scope: Scope, task: str, kind: str, score: str, number: int) -> str | None:
    loss = scope.values(task, lambda row: row["bins"][kind][score][number][0])
    points = scope.values(task, lambda row: 100 * row["bins"][kind][score][number][1])
    said = mean_and_spread(loss, scope.planned, digits=3)
    return said and f"{said} ({mean_and_spread(points, len(points))})"


def _answers(scope: Scope) -> Iterator[str]:
    yield "## What there was to save"
    lines: list[list[object]] = []
    for task in scope.rows:
        line: list[object] = [task]
        for when in ("tuned", "reset"):
            line.append(mean_and_spread(scope.values(task, _answer(when, "loss")), scope.planned, digits=3))
            accuracy = [100 * value for value in scope.values(task, _answer(when, "accuracy"))]
            line.append(mean_and_spread(accuracy, scope.planned))
        contributed = scope.values(task, lambda row: row["contributed"])
        lines.append([*line, mean_and_spread(contributed, scope.planned, digits=3)])
    header = ("loss", "accuracy, %", "loss, norms set back", "accuracy, %, norms set back")
    yield markdown(("task", *header, "sum of contributions"), lines)
    yield (
        "The sum of contributions is the difference of the two losses, but for the error of the integral. The head is "
        "the trained one throughout, so norms set back do worse here than a head trained on a frozen body."
    )


def _answer(when: str, name: str) -> Value:
    return lambda row: row["answers"][when][name]


def _plot_correlations(scope: Scope, path: Path) -> None:
    panels = {kind: [[_mean(scope, kind, one, other) for other in MEASURED] for one in MEASURED] for kind in KINDS}
    plot_matrices(path, panels, MEASURED, "Spearman's correlation over entries, in hundredths")


def _mean(scope: Scope, kind: str, one: str, other: str) -> float | None:
    if one == other:
        return 100.0
    pair = ", ".join(sorted((one, other), key=MEASURED.index))
    values = [value for task in scope.rows for value in scope.values(task, _correlation(kind, pair))]
    return statistics.mean(values) if values else None


def _plot_bins(scope: Scope, path: Path) -> None:
    bins = scope.sizes["bins"]
    places = [100 * (b + 0.5) / bins for b in range(bins)]
    panels = {
        f"{task}, {kind}": {
            score: [(at, [row["bins"][kind][score][b][0] for row in rows]) for b, at in enumerate(places)]
            for score in (*SCORES, "random")
        }
        for task, rows in scope.rows.items()
        if rows
        for kind in ("gains", "biases")
    }
    title = f"Each of {bins} bins of entries set back: mean, worst and best seed"
    plot_along(path, panels, title, "entries by rising score, %", "loss that is added")
