"""Is every module a winning ticket, norms the best one, and because of their size? arXiv 2302.00378's experiments.

python -m benchmarks.papers.winning_tickets --protocol full
python -m benchmarks.papers.winning_tickets --data-dir <folder>
python -m benchmarks.papers.winning_tickets --data-dir <folder> --arms components layers
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from benchmarks.harness import classification, masked
from benchmarks.harness.arms import ALONE
from benchmarks.harness.classification import (
    PROTOCOLS,
    SEEDS,
    Kind,
    Place,
    Protocol,
    choose_model,
    experiment_parser,
    final_cells,
    refuse_unknown,
    run_experiment,
    search_first,
)
from benchmarks.harness.finals import reported
from benchmarks.harness.magnitude import mean_magnitude
from benchmarks.harness.models import classes
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tasks import TEXT_COLUMNS
from benchmarks.papers.winning_tickets_claims import CONTROLS, LAYER, NORM_WAYS, OTHER_WAYS, Scope, Shape
from benchmarks.papers.winning_tickets_report import NAME, write_report
from peft_lntune import LNTuningConfig, ModuleTuningConfig, plan
from peft_lntune.core.delta import PARAMETERS
from peft_lntune.errors import NoMatchError, UnsupportedError

DTYPE = "float32"
# What a protocol runs where the command line says nothing: a Hub id (None: MiniLM), and tasks.
MODELS = {"cpu": None, "cpu-600": None, "full": "bert-base-uncased"}
TASKS = {"cpu": ("sst2", "trec"), "cpu-600": ("sst2", "trec"), "full": ("sst2", "cola", "mrpc", "rte")}
COUNTS = (768, 48, 192, 3072)  # in order of worth
FIRST = 2  # of the counts, that come before other modules
GROUPS = {
    "components": (*CONTROLS, *ALONE),
    "layers": (LAYER,),
    "magnitude": tuple(NORM_WAYS),
    "others": tuple(OTHER_WAYS),
}
ARM_NAMES = tuple(arm for arms in GROUPS.values() for arm in arms)


def shape_of(model: str) -> Shape:
    """Return what of the experiments a model has room for, from its config alone."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        empty = classes(2).auto_class.from_config(config)
    norms = {parameter: _entries(empty, LNTuningConfig(tune=parameter)) for parameter in PARAMETERS}
    there = tuple(name for name in ALONE if _entries(empty, ModuleTuningConfig(components=[name])))
    return Shape(there, config.num_hidden_layers, {name: size for name, size in norms.items() if size})


def _entries(model: nn.Module, config: LNTuningConfig | ModuleTuningConfig) -> int:
    try:
        return plan(model, config).entries
    except (NoMatchError, UnsupportedError):
        return 0


def stages(options: argparse.Namespace, shape: Shape) -> list[list[dict[str, Any]]]:
    """Return the coordinates of what is reported (arm, layer, count, parameter), in order of worth."""
    first, rest = options.counts[:FIRST], options.counts[FIRST:]

    def norms(counts: Sequence[int], parameter: str) -> list[dict[str, Any]]:
        kept = [count for count in counts if count <= shape.norms[parameter]]
        return [{"arm": arm, "count": count, "parameter": parameter} for count in kept for arm in NORM_WAYS]

    def others(counts: Sequence[int]) -> list[dict[str, Any]]:
        return [{"arm": arm, "count": count} for count in counts for arm in OTHER_WAYS]

    found: list[list[dict[str, Any]]] = [
        [{"arm": arm} for arm in (*CONTROLS, *shape.components)],
        [{"arm": LAYER, "layer": layer} for layer in range(shape.layers)],
        *(norms(first, parameter) for parameter in shape.norms),
        others(first),
        *(norms(rest, parameter) for parameter in shape.norms),
        others(rest),
    ]
    return [[at for at in stage if at["arm"] in options.arms] for stage in found]


def waves(options: argparse.Namespace, protocol: Protocol, shape: Shape) -> list[list[Cell]]:
    """Return the cells in order of worth; each stage searches its learning rates first."""
    finals = partial(final_cells, protocol, dtype=DTYPE, seeds=options.seeds)
    planned = [[(task, at) for at in stage for task in options.tasks] for stage in stages(options, shape)]
    return search_first(protocol, [[cell for task, at in stage for cell in finals(task, **at)] for stage in planned])


def run_cell(cell: Cell, protocol: Protocol, place: Place, rates: dict[Kind, float]) -> Row:
    """Run one cell of any arm; a reported one of few entries also says how large they were before."""
    tune = partial(masked.tune, protocol=protocol, place=place, rates=rates)
    wanted = cell["arm"] in masked.CHOICES and cell["phase"] == "final"
    return classification.run_cell(cell, protocol, place, rates, tune, _sized if wanted else None)


def _sized(model: nn.Module) -> Row:
    return {"mean_magnitude": float(f"{mean_magnitude(model):.6g}")}


def shared_rows(results: Path) -> list[Row]:
    """Return rows of other benchmarks that count here too: cells are equal where protocol, model and arm are."""
    names = ("accuracy", "layernorm_key_component", "unified_framework")
    return [row for name in names for row in Rows(results / f"{name}.jsonl")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = experiment_parser("Is every module a winning ticket, and norms because of their size?")
    known = (*GROUPS, *ARM_NAMES)
    parser.add_argument("--arms", nargs="+", choices=known, default=[*GROUPS], help="groups of arms, or arms")
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="of entries, the most valuable first")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or TASKS[options.protocol]
    options.arms = [arm for name in options.arms for arm in GROUPS.get(name, (name,))]
    refuse_unknown(parser, options.tasks, TEXT_COLUMNS)
    return options


def scope(options: argparse.Namespace, protocol: Protocol, shape: Shape, rows: Rows) -> Scope:
    """Return what is reported: what the protocol plans, and what else has been asked for or run."""
    run = [cell for cell in reported(rows, protocol, DTYPE) if cell["arm"] in ARM_NAMES]
    counts = [cell["count"] for cell in run if "count" in cell]
    return Scope(
        protocol=protocol,
        tasks=tuple(dict.fromkeys((*TASKS[options.protocol], *options.tasks, *(cell["task"] for cell in run)))),
        shape=shape,
        counts=tuple(sorted({*options.counts, *counts})),
        first=tuple(options.counts[:FIRST]),
        seeds=tuple(sorted({*SEEDS, *(cell["seed"] for cell in run)})),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    options.model, protocol = choose_model(options.model, MODELS[options.protocol], PROTOCOLS[options.protocol])
    shape = shape_of(options.model)
    rows = Rows(options.results / f"{NAME}.jsonl")
    rows.adopt(shared_rows(options.results))
    failed = 0
    if not options.report:
        failed = run_experiment(NAME, options, protocol, rows, waves(options, protocol, shape), run_cell)
    if not options.list:
        write_report(rows, options.results, scope(options, protocol, shape, rows))
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
