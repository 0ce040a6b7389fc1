"""Is LayerNorm the key component, and which part of it? The experiments of arXiv 2403.20284.

python -m benchmarks.papers.layernorm_key_component --protocol full
python -m benchmarks.papers.layernorm_key_component --data-dir <folder>
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import classification, masked
from benchmarks.harness.classification import (
    PROTOCOLS,
    SEEDS,
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
from benchmarks.harness.finals import reported
from benchmarks.harness.masked import DENSITY
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import as_row
from benchmarks.harness.tasks import TEXT_COLUMNS, load_task
from benchmarks.papers.layernorm_key_component_report import Scope, write_report
from peft_lntune.analysis import parameter_change

NAME = "layernorm_key_component"
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
    "cpu": CPU,
    "cpu-600": CPU,
    "full": Extent("bert-large-cased", ("sst2", "cola", "mrpc", "rte"), (0.01, 0.02, 0.05, 0.1, DENSITY, 0.5)),
}


def stages(options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Return the coordinates of what is reported (arm, density, tasks of the masks), in order of worth."""
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
    """Return the cells in order of worth; each stage searches its learning rates first."""
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
    extent = EXTENTS[options.protocol]
    options.tasks = options.tasks or extent.tasks
    options.mask_tasks = options.mask_tasks or options.tasks
    options.densities = options.densities or extent.densities
    refuse_unknown(parser, (*options.tasks, *options.mask_tasks), TEXT_COLUMNS)
    return options


def scope(options: argparse.Namespace, protocol: Protocol, rows: Rows) -> Scope:
    """Return what is reported: what the protocol plans, and what else has been asked for or run."""
    extent = EXTENTS[options.protocol]
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
        seeds=tuple(sorted({*SEEDS, *(cell["seed"] for cell in finals)})),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    usual = EXTENTS[options.protocol].model
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
