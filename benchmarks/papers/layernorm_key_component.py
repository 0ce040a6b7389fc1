"""Is LayerNorm the key component, and which part of it? The experiments of arXiv 2403.20284.

python -m benchmarks.papers.layernorm_key_component --protocol full
python -m benchmarks.papers.layernorm_key_component --data-dir <folder>
"""

import argparse
import operator
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import classification, masked
from benchmarks.harness.answers import Answer, answer_section, measured_settings
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
    refuse_unknown,
    run_experiment,
    search_first,
)
from benchmarks.harness.comparison import ABOUT_DIFFERENCES, ABOUT_HEAD, ABOUT_RATES, Bound, Comparison, Side
from benchmarks.harness.finals import Finals, figures, reported, seeds_of
from benchmarks.harness.masked import DENSITY
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.plots import ABOUT_ACROSS, ABOUT_DOTS, Panel, plot_dots
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import NONE, as_row, markdown, mean_and_spread, mean_table, of_what_ran
from benchmarks.harness.tasks import TEXT_COLUMNS, load_task
from benchmarks.papers.accuracy import NEAR_FULL
from peft_lntune.analysis import Table, parameter_change, plot_change
from peft_lntune.analysis.change import MEASURES

OUTPUT_NORM = "FFN norm"  # the paper's output LayerNorm, as the analysis names it
TOP = 8  # components in a table
MEASURED = {
    "mean_change": "raw mean change",
    "relative_to_mean": "change relative to mean size",
    "relative_to_std": "change relative to standard deviation",
}
# What is not of the body: the pooler, which every method trains with the classifier, and the classifier.
OF_THE_HEAD = ("pooler", "head")
COUNTED = {"without the head": OF_THE_HEAD, "with the head (pooler and classifier)": ()}
CHANGE_NOTES = (
    "Mean |change| of each component with its layers pooled, weight and bias apart; mean over seeds. Raw means favour "
    "the weights of norms, which sit near 1 where others sit near 0.05, so the same is given relative to the "
    "component's mean size and to its standard deviation. Ranks are given without the head, which is the pooler and "
    "the classifier: the classifier starts anew, and every method trains both. The lines of the lists say what comes "
    "first with and without the head."
)


def output_norm(rows: Sequence[Row], note: str = "") -> Iterator[Finding]:
    """Yield what is found of the paper's claim that full fine-tuning changes the output norm most.

    Args:
        rows: of `full`, of all tasks.
        note: a sentence that stands behind each verdict.
    """
    for measure in MEASURES:
        for counted, without in COUNTED.items():
            wanted = (
                "full fine-tuning changes the output norm (post-FFN), its weight or its bias, most, by "
                f"{MEASURED[measure]} {counted}"
            )
            if rows:
                times = {parameter: _times(measure, rows, without, [parameter]) for parameter in ("weight", "bias")}
                first = _times(measure, rows, without)
                which = f" (by its weight in {times['weight']}, by its bias in {times['bias']})" if first else ""
                yield in_runs(wanted, f"first in {first} of {len(rows)} runs{which}", first, len(rows), note)
            else:
                yield Finding(wanted)


def write_change(
    rows: Sequence[Row], results: Path, stem: str, task: str, limits: tuple[float, float] | None
) -> Iterator[str]:
    """Write a task's CSV and picture, and yield the paragraphs of its section.

    Args:
        rows: of `full`, one per seed.
        results: folder.
        stem: name of both files without its ending.
        task: named in the picture.
        limits: of the colours, the same for all tasks.
    """
    layers = _mean_table([row["change"]["layers"] for row in rows])
    layers.to_csv(results / f"{stem}.csv")
    plot_change(layers, results / f"{stem}.png", limits=limits, title=f"Full fine-tuning on {task}")
    components = _mean_table([row["change"]["components"] for row in rows])
    yield "\n".join(
        f"- {_on_top(measure, counted, _ranked(components, without)[measure], rows)}"
        for measure in MEASURES
        for counted, without in COUNTED.items()
    )
    body, every = _ranked(components, OF_THE_HEAD), _ranked(components)
    lines: list[list[object]] = []
    for component, parameter in list(every[MEASURES[0]])[:TOP]:
        line: list[object] = [_said(component, parameter)]
        for measure in MEASURES:
            rank, _ = body[measure].get((component, parameter), (None, None))
            _, value = every[measure].get((component, parameter), (None, None))
            if value is None:
                line.append(NONE)
            else:
                line.append(f"{value:.4f}" if rank is None else f"{value:.4f} ({_ordinal(rank)})")
        lines.append(line)
    yield markdown(("component", *(MEASURED[measure] for measure in MEASURES)), lines)
    yield f"Each layer: [{stem}.csv]({stem}.csv), and as a picture:\n\n![Mean change on {task}]({stem}.png)"


def change_limits(rows: Mapping[str, Sequence[Row]]) -> tuple[float, float] | None:
    """Return the smallest and largest mean change of any component and layer on any task, for one range of colours."""
    tables = [_mean_table([row["change"]["layers"] for row in each]) for each in rows.values() if each]
    values = [value for table in tables for value in table.column(MEASURES[0]) if value]
    return (min(values), max(values)) if values else None


Ranked = dict[str, dict[tuple[str, str], tuple[int, float]]]


def _ranked(components: Table, without: Sequence[str] = ()) -> Ranked:
    """Measure -> component and parameter -> rank and value, the most changed first."""
    found: Ranked = {}
    for measure in MEASURES:
        table = components.sorted_by(measure, largest=True)
        names = zip(table.column("component"), table.column("parameter"), strict=True)
        values = [
            (name, value)
            for name, value in zip(names, table.column(measure), strict=True)
            if value is not None and name[0] not in without
        ]
        found[measure] = {name: (rank, value) for rank, (name, value) in enumerate(values, start=1)}
    return found


def _said(component: str, parameter: str) -> str:
    """Return a name in which the classifier, which `analysis` calls the head, is apart from the pooler."""
    name = "classifier" if component == "head" else component
    return f"{name} {parameter}{' (head)' if component in OF_THE_HEAD else ''}"


def _on_top(measure: str, counted: str, ranks: Mapping[tuple[str, str], tuple[int, float]], rows: Sequence[Row]) -> str:
    """Say what changes most, where the output norm is, and in how many seeds it is first."""
    said = f"{MEASURED[measure]}, {counted}"
    first = next(iter(ranks), None)
    if first is None:
        return f"{said}: nothing to rank."
    own = [f"{p} {_ordinal(rank)}" for (component, p), (rank, _) in ranks.items() if component == OUTPUT_NORM]
    return (
        f"{said}: first is {_said(*first)}; the output norm's {', '.join(own) or 'ranks: none'}, of {len(ranks)}; it "
        f"is first in {_times(measure, rows, COUNTED[counted])} of {len(rows)} runs."
    )


def _times(
    measure: str, rows: Sequence[Row], without: Sequence[str], parameters: Sequence[str] = ("weight", "bias")
) -> int:
    """Return in how many of the runs one of these parameters of the output norm changes most."""
    ranked = [_ranked(_mean_table([row["change"]["components"]]), without)[measure] for row in rows]
    own = [(OUTPUT_NORM, parameter) for parameter in parameters]
    return sum(next(iter(ranks), None) in own for ranks in ranked)


def _mean_table(tables: Sequence[Mapping[str, Any]]) -> Table:
    """The mean over seeds of tables of changes, without their ranks."""
    found = mean_table([Table(**table) for table in tables], MEASURES)
    kept = [number for number, column in enumerate(found.columns) if not column.startswith("rank_")]
    return Table([found.columns[n] for n in kept], [[row[n] for n in kept] for row in found.rows])


def _ordinal(rank: int) -> str:
    end = "th" if 10 <= rank % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{end}"


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
    settings = measured_settings(rows, scope.protocol, scope.tasks, scope.seeds, answers)
    parts = [_title(scope), *answer_section(settings), *_held(compared), *_arms(compared, scope)]
    parts += _masks(compared, scope)
    parts += _unions(found, scope)
    panels = [panel for task in scope.tasks if (panel := _panel(compared, scope, task)).groups]
    if panels:
        plot_dots(results / picture, panels, f"Accuracy after {scope.protocol.steps} steps")
        parts.append(f"![Accuracy by what is tuned, on {' and '.join(panel.title for panel in panels)}]({picture})")
        parts.append(f"{ABOUT_DOTS} {ABOUT_ACROSS}")
    full = {task: ran for task in scope.tasks if (ran := found.of(task, "full"))}
    if full:
        parts += ["## What full fine-tuning changes", CHANGE_NOTES]
    limits = change_limits(full)
    for task, of_task in full.items():
        name = stem(f"layernorm_change_{task}")
        parts += [f"### {task}", *write_change(of_task, results, name, task, limits)]
    missing = list(_not_run(compared, scope))
    parts += ["## Not run here", "\n".join(missing)] if missing else []
    (results / f"{stem(NAME)}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _with_change(compared: Comparison) -> list[Row]:
    """Return the rows of full that say what has changed; those of other benchmarks do not."""
    rows = [row for task in compared.tasks for row in FULL.rows(compared.found, task)]
    return [row for row in rows if "change" in row]


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


NEAR = f"within {NEAR_FULL:g} points of "
FRACTIONS = (0.01, 0.05, DENSITY)


def answers(compared: Comparison) -> list[Answer]:
    """Return what the rows say of each claim of the abstract."""
    rows = _with_change(compared)
    raw, *relative = [finding for finding in output_norm(rows) if "without the head" in finding.wanted]
    others = [Side("bitfit", "bitfit"), Side("lora", "lora")]
    small, chosen = [], []
    for density in FRACTIONS:
        said = f"{100 * density:g} %"
        fisher, chance = (Side(f"{name} at {said}", name, {"density": density}) for name in ("fisher", "random"))
        small.append(Bound(fisher, ALL, f"within {NEAR_ALL:g} point of all norms", -NEAR_ALL, operator.ge))
        chosen.append(Bound(fisher, chance, "above random of equal size"))

    def near(side: Side) -> Finding:
        return compared.asked(Bound(ALL, side, f"{NEAR}{side.said}", -NEAR_FULL, operator.ge))

    return [
        Answer("the output LayerNorm changes more than any other component", [raw]),
        Answer("the same, relative to the size or spread of the parameters (our control)", relative),
        Answer("tuning only the LayerNorm is comparable to full fine-tuning", [near(FULL)]),
        Answer("and comparable to other parameter-efficient methods", [near(side) for side in others]),
        Answer("a small portion of the LayerNorm suffices, with negligible loss", [*map(compared.asked, small)]),
        Answer("Fisher information finds the critical subset", [*map(compared.asked, chosen)]),
    ]


def _held(compared: Comparison) -> Iterator[str]:
    """Yield the bounds set beforehand and the table of differences."""
    yield "## What holds"
    full = _with_change(compared)
    found = [*map(compared.wanted, BOUNDS), *output_norm(full, compared.edges([FULL]))]
    yield listed(finding.line for finding in found)
    yield ABOUT_DIFFERENCES.format(also=", for masks of scores the same rows", tasks="the tasks")
    yield compared.difference_table(COMPARED)


# Tables.


def _arms(compared: Comparison, scope: Scope) -> Iterator[str]:
    yield "## Arms"
    yield of_what_ran(compared.header("arm"), [[SAID[arm], *compared.line(arm)] for arm in scope.arms])
    yield f"{ABOUT_HEAD} {ABOUT_RATES}"


def _masks(compared: Comparison, scope: Scope) -> Iterator[str]:
    yield "## Masks of equal size"
    lines: list[list[object]] = []
    for density in scope.densities:
        for mask in scope.masks:
            lines.append([SAID[mask], f"{100 * density:g} %", *compared.line(mask, density=density)])
    lines.append([SAID["ln"], "100 %", *compared.line("ln")])
    yield of_what_ran(compared.header("entries of", "density"), lines, names=2)
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
    ran = [line for line in lines if line[2] is not None]
    yield of_what_ran((*header, f"own Fisher at {AT}", "all norms"), ran, names=2)
    yield (
        f"The union of the other tasks' Fisher masks at {AT}, which has seen nothing of the task. Where only one other "
        "task has a mask, the union is that mask. It takes the rate of the task's own Fisher mask."
    )


# Plot.


def _sides(scope: Scope, task: str) -> dict[str, list[Side]]:
    """Return heading -> what stands under it in the plot."""
    found = {"": [Side(SAID[arm], arm) for arm in scope.arms]}
    for density in scope.densities:
        at = {"density": density}
        found[f"{100 * density:g} % of the entries"] = [Side(SAID[mask], mask, at) for mask in scope.masks]
    for name, others in scope.unions:
        if name == task:
            joined = Side(UNION_SAID, "union", {"density": DENSITY, "mask_tasks": list(others)})
            found.setdefault(f"{AT} of the entries", []).append(joined)
    return found


def _panel(compared: Comparison, scope: Scope, task: str) -> Panel:
    groups = {heading: compared.dots(task, sides) for heading, sides in _sides(scope, task).items()}
    drawn = {heading: dots for heading, dots in groups.items() if dots}
    return Panel(task, metric_of(task).along, drawn, across=("full", "head"))


def _not_run(compared: Comparison, scope: Scope) -> Iterator[str]:
    groups = {
        heading or "arms": [side for side in sides if side.arm != "union"]
        for heading, sides in _sides(scope, "").items()
    }
    yield from compared.not_run(groups)
    for task, others in scope.unions:
        if not compared.found.of(task, "union", density=DENSITY, mask_tasks=list(others)):
            yield f"- masks of other tasks, {task}: those of {', '.join(others)}."


UNION_SAID = "union of other tasks' masks"
ARM_NAMES = ("full", "bitfit", "ln", "ln-ffn", "ln-attention", "head")
FIRST_MASKS, MORE_MASKS = ("fisher", "random", "lowest-fisher"), ("magnitude", "change")
UNIONS = ("union", "random-union")
DTYPE = "float32"


@dataclass(frozen=True)
class Extent:
    """What a protocol runs where the command line says nothing: a Hub id (None: MiniLM), tasks, densities."""

    model: str | None
    tasks: tuple[str, ...]
    densities: tuple[float, ...]


CPU = Extent(None, ("sst2", "trec"), (0.01, 0.05, DENSITY))
EXTENTS = {
    "full": Extent("bert-large-cased", ("sst2", "cola", "mrpc", "rte"), (0.01, 0.02, 0.05, 0.1, DENSITY, 0.5)),
}


def stages(options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Return the coordinates of what is reported (arm, density, tasks of the masks), most informative first."""
    others = [density for density in options.densities if density != DENSITY]
    found: list[list[dict[str, Any]]] = [
        [{"arm": name} for name in ARM_NAMES],
        [{"arm": name, "density": DENSITY} for name in FIRST_MASKS],
        [{"arm": name, "density": density} for density in others for name in FIRST_MASKS],
        [{"arm": name, "density": density} for density in (DENSITY, *others) for name in MORE_MASKS],
    ]
    return [[at for at in stage if at["arm"] in options.arms] for stage in found]


def unions(options: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """Return the coordinates of a task's union masks: the Fisher masks of every other task, leaving this one out."""
    tasks = sorted(other for other in options.mask_tasks if other != task)
    # The union with itself of one mask has the density of that mask, so there is a random mask of its size already.
    names = UNIONS if len(tasks) > 1 else UNIONS[:1] if tasks else ()
    return [{"arm": name, "density": DENSITY, "mask_tasks": tasks} for name in names if name in options.arms]


def waves(options: argparse.Namespace, protocol: Protocol) -> list[list[Cell]]:
    """Return the cells most informative first; each stage searches its learning rates first."""
    planned = [[(task, at) for at in stage for task in options.tasks] for stage in stages(options)]
    planned.append([(task, at) for task in options.tasks for at in unions(options, task)])
    finals = [
        [cell for task, at in stage for cell in final_cells(protocol, task, dtype=DTYPE, seeds=options.seeds, **at)]
        for stage in planned
    ]
    # A mask of changes trains all norms at their rate, even in the search for its own.
    return search_first(protocol, finals, masked.needed_rates)


def run_cell(cell: Cell, protocol: Protocol, place: Place, rates: dict[Kind, float], folder: Path) -> Row:
    """Run one cell of any arm; a reported one of `full` also says what has changed."""
    tune = partial(masked.tune, protocol=protocol, place=place, rates=rates, folder=folder)
    inspect = partial(changed, cell=cell, protocol=protocol, place=place)
    wanted = cell["arm"] == "full" and cell["phase"] == "final"
    return classification.run_cell(cell, protocol, place, rates, tune, inspect if wanted else None)


def changed(model: Any, cell: Cell, protocol: Protocol, place: Place) -> Row:
    """Compare a trained model with its start: each component and layer, and each component with its layers pooled."""
    start = load_base(cell, protocol, place, load_task(cell["task"], place.data_dir, place.model))
    tables = {name: parameter_change(start, model, layers=name == "layers") for name in ("layers", "components")}
    return {"change": {name: as_row(table) for name, table in tables.items()}}


def shared_rows(results: Path) -> list[Row]:
    """Return rows of `accuracy.py` that count here too: cells are equal where protocol and model are.

    A row of `full` does not say there what has changed, so only its search is shared.
    """
    rows = Rows(results / "accuracy.jsonl")
    return [row for row in rows if row["cell"]["phase"] == "search" or row["cell"]["arm"] != "full"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    arms = (*ARM_NAMES, *FIRST_MASKS, *MORE_MASKS, *UNIONS)
    parser = experiment_parser("Is LayerNorm the key component, and which part of it?")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms)
    parser.add_argument("--densities", nargs="+", type=float, default=None, help="of masks; 1 is the arm ln")
    parser.add_argument("--mask-tasks", nargs="+", default=None, help="whose masks unions are of (default: --tasks)")
    options = parser.parse_args(arguments)
    extent = EXTENTS.get(options.protocol, CPU)
    options.tasks = options.tasks or extent.tasks
    options.mask_tasks = options.mask_tasks or options.tasks
    options.densities = options.densities or extent.densities
    refuse_unknown(parser, (*options.tasks, *options.mask_tasks), TEXT_COLUMNS)
    return options


def scope(options: argparse.Namespace, protocol: Protocol, rows: Rows) -> Scope:
    """Return what is reported: what the protocol plans, and what else has been asked for or run."""
    extent = EXTENTS.get(options.protocol, CPU)
    finals = reported(rows, protocol, DTYPE)
    masks = [cell["density"] for cell in finals if "density" in cell]
    joined = [(cell["task"], tuple(cell["mask_tasks"])) for cell in finals if cell["arm"] == "union"]
    planned = [(task, tuple(at["mask_tasks"])) for task in options.tasks for at in unions(options, task)[:1]]
    return Scope(
        protocol=protocol,
        tasks=tuple(dict.fromkeys((*extent.tasks, *(cell["task"] for cell in finals)))),
        arms=ARM_NAMES,
        masks=(*FIRST_MASKS, *MORE_MASKS),
        densities=tuple(sorted({*extent.densities, *masks})),
        unions=tuple(dict.fromkeys(joined or planned)),
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
        with tempfile.TemporaryDirectory() as folder:
            run = partial(run_cell, folder=Path(folder))
            planned = waves(options, protocol)
            failed = run_experiment(NAME, options, protocol, rows, planned, run, masked.needed_rates)
    if not options.list:
        write_report(rows, options.results, scope(options, protocol, rows))
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
