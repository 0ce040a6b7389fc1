"""The tables and plots of `how_fine.py`, from its rows and those it shares with other benchmarks."""

import operator
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.arms import SPARSITY
from benchmarks.harness.classification import Protocol
from benchmarks.harness.comparison import ABOUT_DIFFERENCES, ABOUT_HEAD, ABOUT_RATES, Bound, Comparison, Side
from benchmarks.harness.finals import Finals, figures
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.plots import plot_along
from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.sparse import DRAWS
from benchmarks.harness.tables import markdown, mean_and_spread
from benchmarks.papers.closeness_report import ABOUT_CLOSENESS, distance_bounds, write_closeness

NAME = "how_fine"
NEAR = 1.0  # points of accuracy that may be lost: the bound set before measuring
GOOD_UP_TO = 0.4  # the sparsity up to which the paper reports good results
FULL, HEAD = Side("full", "full"), Side("head", "head")
L0 = {
    "l0-close": "l0-close: all but key projections and embeddings",
    "l0-no-key": "all but key projections",
    "l0-no-embedding": "all but embeddings",
    "l0-no-deepest": "all but the deepest third of the layers",
}
CONTROLS = {
    "l0-close-no-deepest": "l0-close without the deepest third of the layers",
    "l0-no-value": "control: all but value projections",
    "l0-no-lowest": "control: all but the lowest third of the layers",
}


@dataclass(frozen=True)
class Scope:
    """What is reported.

    Attributes:
        protocol: of the rows.
        tasks: in this order.
        sparsities: of supermasks and of pruning, rising.
        seeds: planned ones, and others that were run.
    """

    protocol: Protocol
    tasks: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]


def _sampled(row: Row) -> Row:
    """Return the row of a supermask by the mean score of its sampled masks."""
    score = statistics.mean(row["masks"]["sampled"])
    return {**row, "metrics": {metric_of(row["cell"]["task"]).name: score}}


def supermask(sparsity: float) -> Side:
    """Return the thresholded masks that started at a sparsity."""
    return Side(f"supermask from {_percent(sparsity)}", "supermask", {"sparsity": sparsity})


def sampled(sparsity: float) -> Side:
    """Return the same masks, drawn by their scores."""
    return Side(f"sampled masks from {_percent(sparsity)}", "supermask", {"sparsity": sparsity}, _sampled)


def pruned(sparsity: float) -> Side:
    """Return pruning at a sparsity; that of nothing is the head on the pretrained body."""
    if not sparsity:
        return HEAD
    return Side(f"pruning at {_percent(sparsity)}", "pruned", {"sparsity": sparsity})


def _l0(arm: str) -> Side:
    return Side({**L0, **CONTROLS}[arm].removeprefix("control: "), arm)


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:g} %"


BOUNDS_OF_MODULES = tuple(
    Bound(_l0(arm), FULL, f"within {NEAR:g} point of full", -NEAR, operator.ge) for arm in (*L0, "l0-close-no-deepest")
)
BOUNDS_OF_ZEROS = (
    Bound(supermask(0.0), HEAD, "above the head alone: zeros learn the task"),
    Bound(supermask(SPARSITY), pruned(SPARSITY), "above pruning of about as many entries"),
    Bound(supermask(GOOD_UP_TO), pruned(GOOD_UP_TO), "above pruning of about as many entries"),
    Bound(supermask(GOOD_UP_TO), FULL, f"within {NEAR:g} point of full", -NEAR, operator.ge),
    Bound(
        sampled(SPARSITY),
        supermask(SPARSITY),
        f"within {NEAR:g} point of the thresholded one: there are many good masks",
        -NEAR,
        operator.ge,
    ),
)
COMPARED_MODULES = (
    *((_l0(arm), FULL) for arm in (*L0, *CONTROLS)),
    (_l0("l0-no-key"), _l0("l0-no-value")),
    (_l0("l0-no-deepest"), _l0("l0-no-lowest")),
    (FULL, HEAD),
)


def write_report(rows: Rows, results: Path, scope: Scope) -> None:
    """Write the page, its plot, and for each task the table of distances (CSV) and its picture."""
    compared = Comparison(Finals(rows, scope.protocol, scope.seeds), scope.tasks, scope.tasks)
    end = "" if scope.protocol.name == "cpu" else f"_{scope.protocol.name}"
    results.mkdir(parents=True, exist_ok=True)
    full = {task: FULL.rows(compared.found, task) for task in scope.tasks}
    parts = [_title(scope), "## What held"]
    parts.append("\n".join([*distance_bounds(full), *map(compared.wanted, (*BOUNDS_OF_MODULES, *BOUNDS_OF_ZEROS))]))
    parts += [*_modules(compared), *_zeros(compared, scope)]
    picture = f"{NAME}{end}.png"
    if _plot(compared, scope, results / picture):
        parts.append(f"![Accuracy against zeros]({picture})")
    parts += ["## How far fine-tuning moves", ABOUT_CLOSENESS]
    for task in scope.tasks:
        parts += [f"### {task}", *write_closeness(full[task], results, f"closeness_{task}{end}", compared.planned)]
    (results / f"{NAME}{end}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _title(scope: Scope) -> str:
    protocol = scope.protocol
    return (
        "# How fine fine-tuning can be\n\n"
        f"Protocol `{protocol.name}`: {protocol.steps} steps of {protocol.batch_size} rows for every arm; accuracy in "
        f"per cent, mean ± standard deviation over {len(scope.seeds)} seeds. Questions are those of arXiv 2004.14129; "
        "models, steps, rates, bounds and controls are our own, so nothing here reproduces its tables."
    )


def _modules(compared: Comparison) -> Iterator[str]:
    yield "## What is left as it was"
    said = {"full": "full: everything", **L0, **CONTROLS, "head": "head: nothing else"}
    yield markdown(compared.header("arm"), [[said[arm], *compared.line(arm)] for arm in said])
    yield (
        f"{ABOUT_HEAD} {ABOUT_RATES} Arms that leave something out are nearly full fine-tuning and take its rate. "
        "Embeddings are those of words, positions and types; the paper leaves out those of words."
    )
    yield ABOUT_DIFFERENCES.format(also="", tasks="the tasks")
    yield compared.difference_table(COMPARED_MODULES)


def _zeros(compared: Comparison, scope: Scope) -> Iterator[str]:
    yield "## Zeros alone"
    lines: list[list[object]] = []
    for sparsity in scope.sparsities:
        at = {"sparsity": sparsity}
        lines.append([f"{_percent(sparsity)}, thresholded mask", *compared.line("supermask", **at)])
        lines.append([f"{_percent(sparsity)}, sampled masks", "", *compared.scores_of(sampled(sparsity)), ""])
        if sparsity:
            lines.append([f"{_percent(sparsity)}, magnitude pruning", *compared.line("pruned", **at)])
    for name, side in (("0 %, the head alone", HEAD), ("0 %, full", FULL)):
        lines.append([name, *compared.line(side.arm)])
    yield markdown(compared.header("zeros at the start"), lines)
    yield (
        "Masks and pruning are of every matrix in the layers. A mask's head is tuned densely, at the rate that was "
        "chosen for the head alone, since the rate of scores would be far too high for it; every other arm has one "
        f"rate. Rates were searched at {_percent(SPARSITY)} and serve the other sparsities. A sampled mask is drawn "
        f"by the scores, anew for every batch; mean of {DRAWS} passes."
    )
    yield "### What became zero"
    yield markdown(
        ("zeros at the start", "task", "zeros at the end, %", "became zero, %", "came back, %", "file, kB"),
        [line for sparsity in scope.sparsities for line in _ends(compared, sparsity)],
    )
    yield "Shares are of the masked entries. The file has a bit for each of them, and the head."
    yield compared.difference_table(_pairs(scope.sparsities))


def _ends(compared: Comparison, sparsity: float) -> Iterator[list[object]]:
    for task in compared.tasks:
        rows = supermask(sparsity).rows(compared.found, task)
        shares = ([100 * row["masks"][name] for row in rows] for name in ("sparsity", "dropped", "revived"))
        cells = [mean_and_spread(values, compared.planned, digits=2) for values in shares]
        size = f"{statistics.mean(row['file_size'] for row in rows) / 1000:,.0f}" if rows else None
        yield [_percent(sparsity), task, *cells, size]


def _pairs(sparsities: Sequence[float]) -> Iterator[tuple[Side, Side]]:
    for sparsity in sparsities:
        yield supermask(sparsity), pruned(sparsity)
        yield supermask(sparsity), FULL
        yield sampled(sparsity), supermask(sparsity)


def _plot(compared: Comparison, scope: Scope, path: Path) -> bool:
    """Draw the scores against the share of zeros at the end, and tell whether any supermask has been run."""
    panels: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    for task in scope.tasks:
        curves: dict[str, list[tuple[float, list[float]]]] = {}
        for name, make in (("supermask", supermask), ("sampled masks", sampled), ("magnitude pruning", pruned)):
            for sparsity in scope.sparsities:
                rows = make(sparsity).rows(compared.found, task)
                if rows:
                    ends = [row["masks"]["sparsity"] if "masks" in row else sparsity for row in rows]
                    curves.setdefault(name, []).append((100 * statistics.mean(ends), figures(rows)))
        for side in (FULL, HEAD):
            rows = side.rows(compared.found, task)
            if rows:
                curves[side.said] = [(0.0, figures(rows))]
        if "supermask" in curves:
            panels[task] = curves
    if panels:
        title, along = "Accuracy at equal steps: mean, worst and best seed", "zeros in the matrices of the layers, %"
        plot_along(path, panels, title, along, bands=[FULL.said, HEAD.said])
    return bool(panels)
