"""How fine can fine-tuning be: how far do models move, what need not, and do zeros alone do? arXiv 2004.14129.

python -m benchmarks.papers.how_fine --protocol full
python -m benchmarks.papers.how_fine --data-dir <folder>
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks.harness import classification, sparse
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
    run_experiment,
    search_first,
)
from benchmarks.harness.finals import reported
from benchmarks.harness.models import head_modules
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import as_row
from benchmarks.harness.tasks import TEXT_COLUMNS, Task, load_task
from benchmarks.papers.how_fine_report import CONTROLS, FULL, HEAD, L0, Scope, write_report
from peft_lntune.analysis import closeness

NAME = "how_fine"
DTYPE = "float32"
FIRST_SPARSITIES, MORE_SPARSITIES = (0.0, 0.2, 0.4), (0.6, 0.8)
ARM_NAMES = (FULL.arm, HEAD.arm, *L0, *CONTROLS, *sparse.SPARSE)


@dataclass(frozen=True)
class Extent:
    """What a protocol runs where the command line says nothing: a Hub id (None: MiniLM), and tasks."""

    model: str | None
    tasks: tuple[str, ...]


CPU = Extent(None, ("sst2", "trec"))
EXTENTS = {"cpu": CPU, "cpu-600": CPU, "full": Extent("bert-base-uncased", ("sst2", "cola", "mrpc", "rte"))}


def stages(options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Return the coordinates of what is reported, in order of worth."""
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
    """Return the cells in order of worth; each stage searches its learning rates first."""
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
    options.tasks = options.tasks or EXTENTS[options.protocol].tasks
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
    tasks = (*EXTENTS[options.protocol].tasks, *options.tasks, *(c["task"] for c in finals if c["arm"] != HEAD.arm))
    return Scope(
        protocol=protocol,
        tasks=tuple(dict.fromkeys(tasks)),
        sparsities=tuple(sorted({*planned, *(cell["sparsity"] for cell in finals if "sparsity" in cell)})),
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
        failed = run_experiment(NAME, options, protocol, rows, waves(options, protocol), run_cell)
    if not options.list:
        write_report(rows, options.results, scope(options, protocol, rows))
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
