"""How fine can fine-tuning be: how far do models move, what can stay, and are zeros enough? arXiv 2004.14129.

python -m benchmarks.papers.how_fine --protocol full
python -m benchmarks.papers.how_fine --data-dir <folder>
"""

import argparse
import math
import operator
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks.harness import classification, sparse
from benchmarks.harness.answers import Answer, answer_section, measured_settings
from benchmarks.harness.arms import SPARSITY
from benchmarks.harness.claims import Finding, in_runs, listed
from benchmarks.harness.classification import (
    PROTOCOLS,
    Kind,
    Place,
    Protocol,
    choose_model,
    experiment_parser,
    final_cells,
    load_base,
    run_experiment,
    search_first,
)
from benchmarks.harness.comparison import ABOUT_DIFFERENCES, ABOUT_HEAD, ABOUT_RATES, Bound, Comparison, Side
from benchmarks.harness.finals import Finals, reported, seeds_of
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.models import head_modules
from benchmarks.harness.paired import FAILS, HOLDS
from benchmarks.harness.plots import ABOUT_ACROSS, ABOUT_DOTS, Panel, plot_dots
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.sparse import DRAWS
from benchmarks.harness.tables import as_row, mean_and_spread, mean_table, of_what_ran
from benchmarks.harness.tasks import TEXT_COLUMNS, Task, load_task
from peft_lntune.analysis import Table, closeness, plot_closeness
from peft_lntune.analysis.distances import CONTROLS as DISTANCE_CONTROLS
from peft_lntune.analysis.distances import DISTANCES

CLOSER = 10.0  # times closer than two random models are to each other: the bound set before measuring
UNEVEN = 1.5  # times the layer that moves least: the bound set before measuring
SAID = {"angle": "angle", "mean_l1": "mean L1"}  # the paper's two distances
DRAWN = "angle"
MEASURES = [*DISTANCES, *(f"{control}_{name}" for control in DISTANCE_CONTROLS for name in DISTANCES)]
ABOUT_CLOSENESS = (
    "Mean L1 is ||w1 - w0||_1 / n, the angle is arccos(cosine) / pi: 0 for one direction, 0.5 at right angles. "
    "`random`: two random initialisations of the model from its config. `noise`: the start, and the start plus "
    "Gaussian noise of the norm that the step has in each tensor. The head is left out. Layers are pooled over their "
    "matrices alone, since gains and biases of two random models are equal; a `-` stands for what is outside the "
    "layers, here the embeddings."
)


def distance_bounds(rows: Mapping[str, Sequence[Row]]) -> Iterator[Finding]:
    """Yield whether the paper's two claims on distances hold.

    Args:
        rows: task -> rows of `full`, one per seed.
    """
    layers = [_table(row, "layers") for each in rows.values() for row in each]
    close = (
        f"matrices of every layer and the embeddings at least {CLOSER:g} times closer to the pretrained ones than "
        "those of two random models to each other"
    )
    uneven = (
        f"movement uneven over layers: the layer that moves most at least {UNEVEN:g} times the one that moves least"
    )
    for wanted, measured in ((close, _closer), (uneven, _uneven)):
        for measure, said in SAID.items():
            yield measured(f"{wanted}, by {said}", layers, measure) if layers else Finding(f"{wanted}, by {said}")


def _closer(wanted: str, layers: Sequence[Table], measure: str) -> Finding:
    """Say how many times further apart two random models are, from the worst layer to the best, in how many runs."""
    each = [list(map(_ratio, t.column(f"random_{measure}"), t.column(measure))) for t in layers]
    return _in_runs(wanted, [ratio for ratios in each for ratio in ratios], [min(ratios) for ratios in each], CLOSER)


def _uneven(wanted: str, layers: Sequence[Table], measure: str) -> Finding:
    """Say how uneven the layers are, and which moves most."""
    numbered = [dict(zip(t.column("layer"), t.column(measure), strict=True)) for t in layers]
    each = [{layer: value for layer, value in found.items() if layer is not None} for found in numbered]
    ratios = [_ratio(max(found.values()), min(found.values())) for found in each]
    most = Counter(max(found, key=lambda layer: found[layer]) for found in each)
    first = ", ".join(f"layer {layer} in {count}" for layer, count in sorted(most.items()))
    return _in_runs(wanted, ratios, ratios, UNEVEN, f"Moves most: {first} of {len(layers)} runs.")


def _in_runs(wanted: str, ratios: Sequence[float], decisive: Sequence[float], bound: float, note: str = "") -> Finding:
    runs = sum(ratio >= bound for ratio in decisive)
    measured = f"{min(ratios):.1f} to {max(ratios):.1f} times, enough in {runs} of {len(decisive)} runs"
    return in_runs(wanted, measured, runs, len(decisive), note)


def write_closeness(
    rows: Sequence[Row], results: Path, stem: str, planned: int, task: str, limits: tuple[float, float] | None
) -> Iterator[str]:
    """Write a task's CSV and picture, and yield the paragraphs of its section.

    Args:
        rows: of `full`, one per seed.
        results: folder.
        stem: name of both files without its ending.
        planned: number of seeds.
        task: named in the picture.
        limits: of the colours, the same for all tasks.
    """
    places = _mean_places(rows)
    places.to_csv(results / f"{stem}.csv")
    plot_closeness(places, results / f"{stem}.png", DRAWN, title=f"Full fine-tuning on {task}", limits=limits)
    layers = [_table(row, "layers") for row in rows]
    yield of_what_ran(("layer", *_heads()), [_line(layers, n, (layer,), planned) for n, layer in _numbered(layers)])
    components = [_table(row, "components") for row in rows]
    order = mean_table(components, MEASURES).column("angle")
    names = list(zip(components[0].column("component"), components[0].column("parameter"), strict=True))
    chosen = [n for n in range(len(names)) if names[n][1] == "weight" and order[n] is not None]
    chosen.sort(key=lambda n: -order[n])
    lines = [_line(components, n, (names[n][0],), planned) for n in chosen]
    yield "Weights of each component with its layers pooled, the one that turns most first:"
    yield of_what_ran(("component", *_heads()), lines)
    yield f"Each layer, and biases: [{stem}.csv]({stem}.csv), and as a picture:\n\n![Angles on {task}]({stem}.png)"


def closeness_limits(rows: Mapping[str, Sequence[Row]]) -> tuple[float, float] | None:
    """Return the smallest and largest angle of all tasks' pictures, for one range of colours."""
    columns = [DRAWN, *(f"{control}_{DRAWN}" for control in DISTANCE_CONTROLS)]
    tables = [_mean_places(each) for each in rows.values() if each]
    values = [value for table in tables for column in columns for value in table.column(column) if value]
    return (min(values), max(values)) if values else None


def _mean_places(rows: Sequence[Row]) -> Table:
    return mean_table([_table(row, "places") for row in rows], MEASURES)


def _numbered(layers: Sequence[Table]) -> Iterator[tuple[int, str]]:
    for number, layer in enumerate(layers[0].column("layer")):
        yield number, "-" if layer is None else str(layer)


def _heads() -> Iterator[str]:
    for said in SAID.values():
        yield from (said, f"{said}, noise", f"{said}, random")


def _line(tables: Sequence[Table], number: int, first: Sequence[object], planned: int) -> list[object]:
    """Return a line of a table: each distance with its spread over seeds, and those of the controls."""
    line = list(first)
    for measure in SAID:
        line.append(mean_and_spread(_known(tables, measure, number), planned, digits=5))
        for control in ("noise", "random"):
            values = _known(tables, f"{control}_{measure}", number)
            line.append(f"{statistics.mean(values):.5f}" if values else "-")
    return line


def _known(tables: Sequence[Table], measure: str, number: int) -> list[float]:
    values = (table.column(measure)[number] for table in tables)
    return [value for value in values if value is not None]


def _table(row: Row, name: str) -> Table:
    return Table(**row["closeness"][name])


def _ratio(value: float, by: float) -> float:
    return value / by if by else math.inf


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


def answers(compared: Comparison) -> list[Answer]:
    """Return what the rows say of each claim of the abstract."""
    moved_rows = {task: [r for r in FULL.rows(compared.found, task) if "closeness" in r] for task in compared.tasks}
    found = list(distance_bounds(moved_rows))
    close, uneven = ([each for each in found if word in each.wanted] for word in ("closer", "uneven"))
    above, _, _, near, many = map(compared.asked, BOUNDS_OF_ZEROS)
    return [
        Answer("fine-tuned models are close to the pretrained one", close),
        Answer("and the closeness varies from layer to layer", uneven),
        Answer("it suffices to tune only the most critical layers", [*map(compared.asked, BOUNDS_OF_MODULES)]),
        Answer("there are many good solutions among sparsified versions of the model", [many]),
        Answer("setting entries to zero is enough to fine-tune", [above, near]),
        Answer("which saves storage per task", [_smaller(compared)]),
    ]


def _smaller(compared: Comparison) -> Finding:
    wanted = f"the file of a supermask from {_percent(SPARSITY)} is smaller than that of full"
    sides = (supermask(SPARSITY), FULL)
    ours, theirs = (
        [row["file_size"] for task in compared.tasks for row in s.rows(compared.found, task)] for s in sides
    )
    if not ours or not theirs:
        return Finding(wanted)
    ratio = statistics.mean(ours) / statistics.mean(theirs)
    return Finding(wanted, f"{100 * ratio:.1f} % of its size", HOLDS if ratio < 1 else FAILS)


def write_report(rows: Rows, results: Path, scope: Scope) -> None:
    """Write the page, its plot, and for each task the table of distances (CSV) and its picture."""
    compared = Comparison(Finals(rows, scope.protocol, scope.seeds), scope.tasks, scope.tasks)
    end = "" if scope.protocol.name == "cpu" else f"_{scope.protocol.name}"
    results.mkdir(parents=True, exist_ok=True)
    full = {task: FULL.rows(compared.found, task) for task in scope.tasks}
    settings = measured_settings(rows, scope.protocol, scope.tasks, scope.seeds, answers)
    parts = [_title(scope), *answer_section(settings), "## What holds"]
    found = [*distance_bounds(full), *map(compared.wanted, (*BOUNDS_OF_MODULES, *BOUNDS_OF_ZEROS))]
    parts.append(listed(finding.line for finding in found))
    picture = f"{NAME}{end}.png"
    drawn = _plot(compared, scope, results / picture)
    if drawn:
        parts.append(f"![Accuracy of what is left as it was, and of zeros, on {', '.join(drawn)}]({picture})")
        parts.append(f"{ABOUT_DOTS} {ABOUT_ACROSS} The names of methods are explained in the tables.")
    parts += [*_modules(compared), *_zeros(compared, scope)]
    if any(full.values()):
        parts += ["## How far fine-tuning moves", ABOUT_CLOSENESS]
    limits = closeness_limits(full)
    for task, rows_of_task in full.items():
        if rows_of_task:
            stem = f"closeness_{task}{end}"
            section = write_closeness(rows_of_task, results, stem, compared.planned, task, limits)
            parts += [f"### {task}", *section]
    missing = list(compared.not_run(_groups(scope)))
    parts += ["## Not run here", "\n".join(missing)] if missing else []
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
    yield of_what_ran(compared.header("arm"), [[said[arm], *compared.line(arm)] for arm in said])
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
        entries, *_, rates = mask = compared.line("supermask", **at)
        lines.append([f"{_percent(sparsity)}, thresholded mask", *mask])
        lines.append([f"{_percent(sparsity)}, sampled masks", entries, *compared.scores_of(sampled(sparsity)), rates])
        if sparsity:
            lines.append([f"{_percent(sparsity)}, magnitude pruning", *compared.line("pruned", **at)])
    for name, side in (("0 %, the head alone", HEAD), ("0 %, full", FULL)):
        lines.append([name, *compared.line(side.arm)])
    yield of_what_ran(compared.header("zeros at the start"), lines)
    yield (
        "Masks and pruning are of every matrix in the layers. A mask's head is tuned densely, at the rate that was "
        "chosen for the head alone, since the rate of scores would be far too high for it; every other arm has one "
        f"rate. Rates were searched at {_percent(SPARSITY)} and serve the other sparsities. A sampled mask is drawn "
        f"by the scores, anew for every batch; mean of {DRAWS} passes."
    )
    yield "### What became zero"
    yield of_what_ran(
        ("zeros at the start", "task", "zeros at the end, %", "became zero, %", "came back, %", "file, kB"),
        [line for sparsity in scope.sparsities for line in _ends(compared, sparsity)],
        names=2,
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


def _groups(scope: Scope) -> dict[str, list[Side]]:
    """Return name of a part of the page -> the methods in it."""
    zeros = [make(s) for s in scope.sparsities for make in (supermask, pruned) if s or make is supermask]
    modules = [Side(arm, arm) for arm in (*L0, *CONTROLS)]
    return {"controls": [FULL, HEAD], "what is left as it was": modules, "zeros": zeros}


def _plot(compared: Comparison, scope: Scope, path: Path) -> list[str]:
    """Draw the scores of everything that was run, and return the tasks of the panels."""
    ways = {"supermask": supermask, "sampled masks": sampled, "pruning": pruned}
    looks = {"supermask": "supermask", "sampled masks": "sampled", "pruning": "pruned"}
    panels = []
    for task in scope.tasks:
        groups = {"": [FULL, HEAD], "Left as it was": _groups(scope)["what is left as it was"]}
        for sparsity in scope.sparsities:
            made = {said: make(sparsity) for said, make in ways.items() if sparsity or said != "pruning"}
            groups[f"Zeros, from {_percent(sparsity)}"] = [replace(side, said=said) for said, side in made.items()]
        dots = {heading: compared.dots(task, sides, looks) for heading, sides in groups.items()}
        drawn = {heading: found for heading, found in dots.items() if found}
        if drawn:
            panels.append(Panel(task, metric_of(task).along, drawn, across=("full", "head")))
    if panels:
        plot_dots(path, panels, f"Accuracy after {scope.protocol.steps} steps")
    return [panel.title for panel in panels]


DTYPE = "float32"
FIRST_SPARSITIES, MORE_SPARSITIES = (0.0, 0.2, 0.4), (0.6, 0.8)
ARM_NAMES = (FULL.arm, HEAD.arm, *L0, *CONTROLS, *sparse.SPARSE)


@dataclass(frozen=True)
class Extent:
    """What a protocol runs where the command line says nothing: a Hub id (None: MiniLM), and tasks."""

    model: str | None
    tasks: tuple[str, ...]


CPU = Extent(None, ("sst2", "trec"))
EXTENTS = {"full": Extent("bert-base-uncased", ("sst2", "cola", "mrpc", "rte"))}


def stages(options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Return the coordinates of what is reported, most informative first."""
    first = [sparsity for sparsity in options.sparsities if sparsity in FIRST_SPARSITIES]
    rest = [sparsity for sparsity in options.sparsities if sparsity not in FIRST_SPARSITIES]
    found: list[list[dict[str, Any]]] = [
        [{"arm": arm} for arm in (FULL.arm, HEAD.arm)],
        [{"arm": arm} for arm in L0],
        _sparse(first),
        [{"arm": arm} for arm in CONTROLS],
        _sparse(rest),
    ]
    return [[at for at in stage if at["arm"] in options.arms] for stage in found]


def _sparse(sparsities: Sequence[float]) -> list[dict[str, Any]]:
    """Return the arms with zeros; one that is pruned of nothing is the arm `head`."""
    return [
        {"arm": arm, "sparsity": sparsity}
        for arm in sparse.SPARSE
        for sparsity in sparsities
        if sparsity or arm != "pruned"
    ]


def waves(options: argparse.Namespace, protocol: Protocol) -> list[list[Cell]]:
    """Return the cells most informative first; each stage searches its learning rates first."""
    finals = [
        [cell for at in stage for task in options.tasks for cell in _finals(protocol, task, at, options.seeds)]
        for stage in stages(options)
    ]
    return search_first(protocol, finals)


def _finals(protocol: Protocol, task: str, at: dict[str, Any], seeds: Sequence[int]) -> list[Cell]:
    return final_cells(protocol, task, dtype=DTYPE, seeds=seeds, **at)


def run_cell(cell: Cell, protocol: Protocol, place: Place, rates: dict[Kind, float]) -> Row:
    """Run one cell of any arm; a reported one of `full` says how far it has moved, one of a supermask its zeros."""
    task = load_task(cell["task"], place.data_dir, place.model)
    inspect = {
        FULL.arm: partial(moved, cell=cell, protocol=protocol, place=place, task=task),
        "supermask": partial(sparse.measure_masks, task=task, device=torch.device(place.device)),
    }
    found = inspect.get(cell["arm"]) if cell["phase"] == "final" else None
    return classification.run_cell(cell, protocol, place, rates, sparse.tune, found)


def moved(model: nn.Module, cell: Cell, protocol: Protocol, place: Place, task: Task) -> Row:
    """Compare a trained body with its start, beside two random ones and beside noise of the same length.

    Returns:
        Tables of `closeness`: each component and layer, components with their layers pooled, and the matrices of each
        layer. The last leaves out vectors, of which random ones are equal: gains are 1 and biases 0 in both.
    """
    start = load_base(cell, protocol, place, task)
    config = AutoConfig.from_pretrained(place.model, **task.head.fields)
    fresh = []
    for number in range(2):
        torch.manual_seed(2 * cell["seed"] + number)
        fresh.append(_body(task.head.auto_class.from_config(config, dtype=torch.float32)))

    def table(matrices: bool = False, **how: Any) -> Row:
        old, new, one, two = ({n: t for n, t in b.items() if t.dim() > 1 or not matrices} for b in bodies)
        return as_row(closeness(old, new, initial=(one, two), seed=cell["seed"], progress=False, **how))

    bodies = (_body(start), _body(model), *fresh)
    tables = {"places": table(), "components": table(layers=False), "layers": table(matrices=True, by="layer")}
    return {"closeness": tables}


def _body(model: nn.Module) -> dict[str, Tensor]:
    heads = tuple(f"{name}." for name in head_modules(model))
    return {name: value.detach() for name, value in model.named_parameters() if not name.startswith(heads)}


def shared_rows(results: Path) -> list[Row]:
    """Return rows of two other benchmarks that count here too: cells are equal where protocol, model and arm are.

    A row of `full` does not say there how far it has moved, so only its search is shared.
    """
    rows = [row for name in ("accuracy", "unified_framework") for row in Rows(results / f"{name}.jsonl")]
    return [row for row in rows if row["cell"]["phase"] == "search" or row["cell"].get("arm") != FULL.arm]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = experiment_parser("How far do models move, what need not, and do zeros alone do?")
    parser.add_argument("--arms", nargs="+", choices=ARM_NAMES, default=ARM_NAMES)
    parser.add_argument("--sparsities", nargs="+", type=float, default=(*FIRST_SPARSITIES, *MORE_SPARSITIES))
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or EXTENTS.get(options.protocol, CPU).tasks
    unknown = [task for task in options.tasks if task not in TEXT_COLUMNS]
    if unknown:
        parser.error(f"unknown task {unknown[0]!r}; the tasks are {', '.join(TEXT_COLUMNS)}.")
    impossible = [sparsity for sparsity in options.sparsities if not 0 <= sparsity < 1]
    if impossible:
        parser.error(f"a sparsity is at least 0 and below 1, but {impossible[0]:g} was given.")
    return options


def scope(options: argparse.Namespace, protocol: Protocol, rows: Rows) -> Scope:
    """Return what is reported: what the protocol plans, and what else has been asked for or run."""
    finals = [cell for cell in reported(rows, protocol) if cell["arm"] in ARM_NAMES]
    planned = (*FIRST_SPARSITIES, *MORE_SPARSITIES)
    tasks = (
        *EXTENTS.get(options.protocol, CPU).tasks,
        *options.tasks,
        *(c["task"] for c in finals if c["arm"] != HEAD.arm),
    )
    return Scope(
        protocol=protocol,
        tasks=tuple(dict.fromkeys(tasks)),
        sparsities=tuple(sorted({*planned, *(cell["sparsity"] for cell in finals if "sparsity" in cell)})),
        seeds=seeds_of(finals),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    usual = EXTENTS.get(options.protocol, CPU).model
    options.model, protocol = choose_model(options.model, usual, PROTOCOLS[options.protocol])
    rows = Rows(options.results / f"{NAME}.jsonl")
    rows.adopt(shared_rows(options.results))
    failed = 0
    if not options.report:
        failed = run_experiment(NAME, options, protocol, rows, waves(options, protocol), run_cell)
    if not options.list:
        write_report(rows, options.results, scope(options, protocol, rows))
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
