"""The tables and plots of `layernorm_key_component.py`, from its rows and those it shares with `accuracy.py`."""

import operator
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.classification import Protocol
from benchmarks.harness.finals import Finals, certainty, differences, percents, verdict
from benchmarks.harness.masked import DENSITY
from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.tables import markdown, mean_and_spread
from benchmarks.layernorm_change_report import CHANGE_NOTES, output_norm, write_change

NAME = "layernorm_key_component"
AT = f"{100 * DENSITY:g} %"
NEAR_ALL = 1.0  # points of accuracy that a Fisher mask may lose against all norms: the bound set before measuring
SAID = {
    "full": "full: everything",
    "bitfit": "bitfit: every bias",
    "ln": "ln: all norms",
    "ln-ffn": "ln-ffn: post-FFN norms",
    "ln-attention": "ln-attention: post-attention norms",
    "head": "head: nothing else",
    "fisher": "most Fisher information",
    "lowest-fisher": "least Fisher information",
    "random": "random",
    "magnitude": "largest magnitude",
    "change": "largest change (LT-SFT)",
}


@dataclass(frozen=True)
class Scope:
    """What is reported.

    Attributes:
        protocol: of the rows.
        tasks: in this order.
        arms: without masks.
        masks: kinds of masks.
        densities: of the masks, rising.
        unions: a task, and the tasks whose masks are joined for it.
        seeds: planned ones, and others that were run.
    """

    protocol: Protocol
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    masks: tuple[str, ...]
    densities: tuple[float, ...]
    unions: tuple[tuple[str, tuple[str, ...]], ...]
    seeds: tuple[int, ...]


def write_report(rows: Rows, results: Path, scope: Scope) -> None:
    """Write the page, its plot, and for each task the table of changes (CSV) and its picture."""
    found = Finals(rows, scope.protocol, scope.seeds)
    end = "" if scope.protocol.name == "cpu" else f"_{scope.protocol.name}"
    results.mkdir(parents=True, exist_ok=True)
    picture = f"{NAME}{end}.png"
    parts = [_title(scope), *_held(found, scope), *_arms(found, scope), *_masks(found, scope), *_unions(found, scope)]
    curves = {task: _curves(found, scope, task) for task in scope.tasks}
    if any(curves.values()):
        title = "Accuracy at equal steps: mean, worst and best seed"
        plot_curves(results / picture, curves, title, bands=[SAID["full"]])
        parts.append(f"![Accuracy against tuned entries]({picture})")
    parts += ["## What full fine-tuning changes", CHANGE_NOTES]
    for task in scope.tasks:
        parts += [f"### {task}", *write_change(found.of(task, "full"), results, f"layernorm_change_{task}{end}")]
    (results / f"{NAME}{end}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _title(scope: Scope) -> str:
    protocol = scope.protocol
    return (
        "# Which part of LayerNorm matters\n\n"
        f"Protocol `{protocol.name}`: {protocol.steps} steps of {protocol.batch_size} rows for every arm; accuracy in "
        f"per cent, mean ± standard deviation over {len(scope.seeds)} seeds. Masks are chosen on "
        f"{protocol.mask_samples:,} training rows, at the pretrained body with the fresh head of the seed. Questions "
        "and controls are those of arXiv 2403.20284; models, steps and rates are our own, so nothing here reproduces "
        "its tables."
    )


# Differences, seed by seed.


@dataclass(frozen=True)
class _Arm:
    """One arm at a density, as it stands in a sentence."""

    said: str
    arm: str
    density: float | None = None

    def rows(self, found: Finals, task: str) -> list[Row]:
        at: dict[str, Any] = {} if self.density is None else {"density": self.density}
        return found.of(task, self.arm, **at)


ALL, FULL, HEAD = _Arm("all norms", "ln"), _Arm("full", "full"), _Arm("head", "head")
FFN, ATTENTION = _Arm("post-FFN norms", "ln-ffn"), _Arm("post-attention norms", "ln-attention")
FISHER, LOWEST, RANDOM, MAGNITUDE, CHANGE = (
    _Arm(f"{said} at {AT}", arm, DENSITY)
    for said, arm in (
        ("Fisher", "fisher"),
        ("lowest Fisher", "lowest-fisher"),
        ("random", "random"),
        ("magnitude", "magnitude"),
        ("change", "change"),
    )
)
COMPARED = (
    (ALL, FULL),
    (ALL, HEAD),
    (FFN, ALL),
    (FFN, ATTENTION),
    (FISHER, ALL),
    (FISHER, RANDOM),
    (FISHER, LOWEST),
    (FISHER, MAGNITUDE),
    (FISHER, CHANGE),
)


def _by_task(found: Finals, scope: Scope, ours: _Arm, theirs: _Arm) -> dict[str, dict[int, float]]:
    """Task -> seed -> ours minus theirs."""
    return {task: differences(ours.rows(found, task), theirs.rows(found, task)) for task in scope.tasks}


def _average(by_task: Mapping[str, Mapping[int, float]]) -> list[float]:
    """The mean over tasks of each seed that every task has."""
    each = list(by_task.values())
    seeds = [seed for seed in each[0] if all(seed in values for values in each)]
    return [statistics.mean(values[seed] for values in each) for seed in seeds]


def _held(found: Finals, scope: Scope) -> Iterator[str]:
    """Yield the bounds set beforehand and the table of differences."""
    yield "## What held"
    names = ", ".join(scope.tasks)
    lines = []
    for theirs, bound, holds, wanted in (
        (ALL, -NEAR_ALL, operator.ge, f"within {NEAR_ALL:g} point of all norms"),
        (RANDOM, 0.0, operator.gt, "above random of equal size"),
    ):
        values = _average(_by_task(found, scope, FISHER, theirs))
        wanted = f"{FISHER.said} {wanted}, on average over {names}"
        if not values:
            lines.append(f"- Wanted: {wanted}. Not measured yet.")
            continue
        said = verdict(wanted, values, len(scope.seeds), holds(statistics.mean(values), bound))
        lines.append(f"- {said} How sure: {certainty(values, bound)}.")
    lines.append(f"- {output_norm([row for task in scope.tasks for row in found.of(task, 'full')])}")
    yield "\n".join(lines)
    yield (
        "Differences in points, the first minus the second, each taken within a seed (the same head and batches, for "
        "masks of scores the same rows). `on average` is over the tasks, seed by seed. A few seeds tell a difference "
        "well beyond its spread from none, and no smaller one."
    )
    table: list[list[object]] = []
    for ours, theirs in COMPARED:
        by_task = _by_task(found, scope, ours, theirs)
        values = _average(by_task)
        planned = len(scope.seeds)
        each = (mean_and_spread(list(seeds.values()), planned) for seeds in by_task.values())
        sure = certainty(values, 0.0) if values else None
        table.append([f"{ours.said} - {theirs.said}", *each, mean_and_spread(values, planned), sure])
    yield markdown(("difference", *scope.tasks, "on average", "how sure it is not 0"), table)


# Tables.


def _scores(found: Finals, scope: Scope, arm: str, **at: Any) -> list[object]:
    """The cells of a line that hold accuracy: each task, and the average of the seeds that every task has."""
    by_task = {task: found.of(task, arm, **at) for task in scope.tasks}
    by_seed = {
        task: {row["cell"]["seed"]: score for row, score in zip(rows, percents(rows), strict=True)}
        for task, rows in by_task.items()
    }
    cells = [list(scores.values()) for scores in by_seed.values()]
    return [mean_and_spread(scores, len(scope.seeds)) for scores in (*cells, _average(by_seed))]


def _entries(found: Finals, scope: Scope, arm: str, **at: Any) -> str | None:
    counts = {row["num_method_params"] for task in scope.tasks for row in found.of(task, arm, **at)}
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)})) if counts else None


def _rates(found: Finals, scope: Scope, arm: str) -> str | None:
    rates = [found.rate(task, arm) for task in scope.tasks]
    return "; ".join(rate or "not run" for rate in rates) if any(rates) else None


def _header(scope: Scope, *first: str) -> tuple[str, ...]:
    return (*first, "tuned entries", *scope.tasks, "on average", f"rate ({'; '.join(scope.tasks)})")


def _arms(found: Finals, scope: Scope) -> Iterator[str]:
    yield "## Arms"
    lines = [
        [SAID[arm], _entries(found, scope, arm), *_scores(found, scope, arm), _rates(found, scope, arm)]
        for arm in scope.arms
    ]
    yield markdown(_header(scope, "arm"), lines)
    yield (
        "Every arm trains the head as well; `tuned entries` leaves it out. `rate` is the learning rate chosen on "
        "held-out training rows; `(edge)` marks the smallest or largest tried."
    )


def _masks(found: Finals, scope: Scope) -> Iterator[str]:
    yield "## Masks of equal size"
    lines: list[list[object]] = []
    for density in scope.densities:
        for mask in scope.masks:
            size, scores = _entries(found, scope, mask, density=density), _scores(found, scope, mask, density=density)
            lines.append([SAID[mask], f"{100 * density:g} %", size, *scores, _rates(found, scope, mask)])
    everything = [_entries(found, scope, "ln"), *_scores(found, scope, "ln"), _rates(found, scope, "ln")]
    lines.append([SAID["ln"], "100 %", *everything])
    yield markdown(_header(scope, "entries of", "density"), lines)
    yield (
        f"The rate of each kind of mask was searched at {AT} and serves its other densities, whose best rate may be "
        "another: fewer entries may want a larger one. Random masks are drawn anew for each task and seed."
    )


def _unions(found: Finals, scope: Scope) -> Iterator[str]:
    yield "## Masks of other tasks: leave one task out"
    lines: list[list[object]] = []
    planned = len(scope.seeds)
    for task, others in scope.unions:
        joined = found.of(task, "union", density=DENSITY, mask_tasks=list(others))
        alone = len(others) == 1
        control = RANDOM.rows(found, task)
        if not alone:
            control = found.of(task, "random-union", density=DENSITY, mask_tasks=list(others))
        sizes = [row["num_method_params"] for row in joined]
        whole = [row["num_method_params"] for row in ALL.rows(found, task)]
        size = f"{statistics.mean(sizes):,.0f}" if sizes else None
        density = f"{100 * statistics.mean(sizes) / whole[0]:.1f} %" if sizes and whole else None
        compared = (joined, control, FISHER.rows(found, task), ALL.rows(found, task))
        scores = [mean_and_spread(percents(rows), planned) for rows in compared]
        lines.append([task, ", ".join(others), size, density, *scores])
    header = ("task", "masks of", "tuned entries, mean", "real density", "union", "random of its size")
    yield markdown((*header, f"own Fisher at {AT}", "all norms"), lines)
    yield (
        f"The union of the other tasks' Fisher masks at {AT}, which has seen nothing of the task. Where only one other "
        "task has a mask, the union is that mask. It takes the rate of the task's own Fisher mask."
    )


# Plot.


def _curves(found: Finals, scope: Scope, task: str) -> Curves:
    curves: dict[str, list[tuple[int, list[float]]]] = {}
    every = _point(ALL.rows(found, task))
    for mask in scope.masks:
        points = [_point(found.of(task, mask, density=density)) for density in scope.densities]
        if any(points):
            curves[SAID[mask]] = [point for point in (*points, every) if point]
    for arm in scope.arms:
        point = _point(found.of(task, arm))
        if point:
            curves[SAID[arm]] = [point]
    for name, others in scope.unions:
        point = _point(found.of(task, "union", density=DENSITY, mask_tasks=list(others)))
        if name == task and point:
            curves["union of other tasks' masks"] = [point]
    return curves


def _point(rows: Sequence[Row]) -> tuple[int, list[float]] | None:
    return (round(statistics.mean(row["num_method_params"] for row in rows)), percents(rows)) if rows else None
