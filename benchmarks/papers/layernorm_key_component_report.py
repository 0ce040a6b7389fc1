"""The tables and plots of `layernorm_key_component.py`, from its rows and those it shares with `accuracy.py`."""

import operator
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.classification import Protocol
from benchmarks.harness.comparison import ABOUT_DIFFERENCES, ABOUT_HEAD, ABOUT_RATES, Bound, Comparison, Side
from benchmarks.harness.finals import Finals, figures
from benchmarks.harness.masked import DENSITY
from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.rows import Rows
from benchmarks.harness.tables import markdown, mean_and_spread
from benchmarks.papers.layernorm_change_report import CHANGE_NOTES, output_norm, write_change

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
    compared = Comparison(found, scope.tasks, scope.tasks)
    stem = scope.protocol.stem
    results.mkdir(parents=True, exist_ok=True)
    picture = f"{stem(NAME)}.png"
    parts = [_title(scope), *_held(compared), *_arms(compared, scope), *_masks(compared, scope)]
    parts += _unions(found, scope)
    curves = {task: _curves(compared, scope, task) for task in scope.tasks}
    if any(curves.values()):
        title = "Accuracy at equal steps: mean, worst and best seed"
        plot_curves(results / picture, curves, title, bands=[SAID["full"]])
        parts.append(f"![Accuracy against tuned entries]({picture})")
    parts += ["## What full fine-tuning changes", CHANGE_NOTES]
    for task in scope.tasks:
        parts += [f"### {task}", *write_change(found.of(task, "full"), results, stem(f"layernorm_change_{task}"))]
    (results / f"{stem(NAME)}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


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


ALL, FULL, HEAD = Side("all norms", "ln"), Side("full", "full"), Side("head", "head")
FFN, ATTENTION = Side("post-FFN norms", "ln-ffn"), Side("post-attention norms", "ln-attention")
FISHER, LOWEST, RANDOM, MAGNITUDE, CHANGE = (
    Side(f"{said} at {AT}", arm, {"density": DENSITY})
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


BOUNDS = (
    Bound(FISHER, ALL, f"within {NEAR_ALL:g} point of all norms", -NEAR_ALL, operator.ge),
    Bound(FISHER, RANDOM, "above random of equal size"),
)


def _held(compared: Comparison) -> Iterator[str]:
    """Yield the bounds set beforehand and the table of differences."""
    yield "## What held"
    full = [row for task in compared.tasks for row in FULL.rows(compared.found, task)]
    yield "\n".join([*map(compared.wanted, BOUNDS), f"- {output_norm(full)}"])
    yield ABOUT_DIFFERENCES.format(also=", for masks of scores the same rows", tasks="the tasks")
    yield compared.difference_table(COMPARED)


# Tables.


def _arms(compared: Comparison, scope: Scope) -> Iterator[str]:
    yield "## Arms"
    yield markdown(compared.header("arm"), [[SAID[arm], *compared.line(arm)] for arm in scope.arms])
    yield f"{ABOUT_HEAD} {ABOUT_RATES}"


def _masks(compared: Comparison, scope: Scope) -> Iterator[str]:
    yield "## Masks of equal size"
    lines: list[list[object]] = []
    for density in scope.densities:
        for mask in scope.masks:
            lines.append([SAID[mask], f"{100 * density:g} %", *compared.line(mask, density=density)])
    lines.append([SAID["ln"], "100 %", *compared.line("ln")])
    yield markdown(compared.header("entries of", "density"), lines)
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
        scores = [mean_and_spread(figures(rows), planned) for rows in compared]
        lines.append([task, ", ".join(others), size, density, *scores])
    header = ("task", "masks of", "tuned entries, mean", "real density", "union", "random of its size")
    yield markdown((*header, f"own Fisher at {AT}", "all norms"), lines)
    yield (
        f"The union of the other tasks' Fisher masks at {AT}, which has seen nothing of the task. Where only one other "
        "task has a mask, the union is that mask. It takes the rate of the task's own Fisher mask."
    )


# Plot.


def _curves(compared: Comparison, scope: Scope, task: str) -> Curves:
    curves: dict[str, list[tuple[int, list[float]]]] = {}
    every = compared.point(task, "ln")
    for mask in scope.masks:
        points = [compared.point(task, mask, density=density) for density in scope.densities]
        if any(points):
            curves[SAID[mask]] = [point for point in (*points, every) if point]
    for arm in scope.arms:
        point = compared.point(task, arm)
        if point:
            curves[SAID[arm]] = [point]
    for name, others in scope.unions:
        point = compared.point(task, "union", density=DENSITY, mask_tasks=list(others))
        if name == task and point:
            curves["union of other tasks' masks"] = [point]
    return curves
