"""Which parts go together: prefix, adapters, LoRA and LayerNorm, alone and combined? arXiv 2211.08682's experiments.

python -m benchmarks.papers.unified_framework --protocol full
python -m benchmarks.papers.unified_framework --data-dir <folder>
python -m benchmarks.papers.unified_framework --data-dir <folder> --model <a causal LM> --tasks tinyshakespeare e2e_nlg
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import classification, questions, tagging, texts
from benchmarks.harness.arms import find_arm
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
from benchmarks.harness.costs import in_turns, training_call
from benchmarks.harness.finals import reported
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_cells, stamp
from benchmarks.harness.splits import ordered
from benchmarks.harness.tasks import LOADERS, SIMILARITY, TEXT_COLUMNS, load_task
from benchmarks.papers.unified_framework_report import ABLATIONS, COMBINED, FIRST, Scope, write_report

NAME = "unified_framework"
DTYPE = "float32"
MODELS = {"cpu": None, "cpu-600": None, "full": "bert-large-cased"}
MAIN = ("sst2", "trec")
OTHERS = (*SIMILARITY, tagging.NAME, questions.NAME)
CAUSAL = tuple(texts.TEXTS)
ARM_NAMES = (*FIRST, *ABLATIONS, *COMBINED)
COST_ROUNDS = 10


def waves(options: argparse.Namespace, protocol: Protocol) -> list[list[Cell]]:
    """Return the cells in order of worth; each stage searches its learning rates first."""
    main = [task for task in options.tasks if task not in OTHERS]
    others = [[task] for task in options.tasks if task in OTHERS]
    stages = [(arms, main) for arms in (FIRST, ABLATIONS, COMBINED)]
    stages += [(FIRST, tasks) for tasks in others]
    stages += [((*ABLATIONS, *COMBINED), tasks) for tasks in others]
    finals: list[list[Cell]] = []
    for arms, tasks in stages:
        kinds = [(task, arm, DTYPE) for arm in arms if arm in options.arms for task in tasks]
        finals.append([cell for kind in kinds for cell in final_cells(protocol, *kind, options.seeds)])
    return search_first(protocol, finals)


def cost_cell(options: argparse.Namespace, protocol: Protocol) -> Cell:
    """Return the one cell that times and weighs a training step of every arm but the ablations."""
    arms = [arm for arm in ("full", "full again", *FIRST, *COMBINED) if arm in options.possible or arm == "full again"]
    task = CAUSAL[0] if set(options.tasks) <= set(CAUSAL) else MAIN[0]  # one table, whatever tasks are asked for
    place = {"protocol": protocol.name, "phase": "cost", "task": task, "dtype": DTYPE}
    return {**place, "arms": list(dict.fromkeys(arms)), "rounds": COST_ROUNDS}


def run_costs(cell: Cell, protocol: Protocol, place: Place) -> Row:
    """Time and weigh a training step of every arm, on the batch of the longest training rows."""
    task, device = load_task(cell["task"], place.data_dir, place.model), torch.device(place.device)
    *_, longest = (rows for rows in ordered(task.train, protocol.batch_size) if len(rows) == protocol.batch_size)
    batch = task.train.batch(longest, device)
    calls: dict[str, Callable[[], object]] = {}
    for name in cell["arms"]:
        model = load_base({**cell, "seed": 0}, protocol, place, task)
        calls[name] = training_call(find_arm(name.removesuffix(" again")).tune(model).to(device), batch)
    shape = {"rows": len(longest), "tokens": batch["input_ids"].shape[1]}
    return {"arms": in_turns(calls, cell["rounds"], device), **shape, **stamp(device)}


def run_cell(cell: Cell, protocol: Protocol, place: Place, rates: dict[Kind, float]) -> Row:
    """Run one cell; in a fresh process, importing this brings the loaders of all tasks."""
    return classification.run_cell(cell, protocol, place, rates)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = experiment_parser("Prefix, adapters, LoRA and LayerNorm, alone and combined.")
    parser.add_argument("--arms", nargs="+", choices=ARM_NAMES, default=ARM_NAMES)
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or [*MAIN, *OTHERS]
    known = (*TEXT_COLUMNS, *SIMILARITY, *LOADERS)
    refuse_unknown(parser, options.tasks, known)
    causal = [task for task in options.tasks if task in CAUSAL]
    if causal and (len(causal) < len(options.tasks) or options.model is None or options.data_dir is None):
        parser.error(f"{causal[0]} is a task of causal LMs: give --model with one, --data-dir, and no other tasks.")
    # A causal LM is tuned as it is: there is no new head to train alone.
    options.possible = tuple(arm for arm in ARM_NAMES if not (causal and arm == "head"))
    options.arms = [arm for arm in options.arms if arm in options.possible]
    if not options.arms:
        parser.error("a causal LM gets no head, so there is nothing that the arm head would train.")
    return options


def scope(options: argparse.Namespace, protocol: Protocol, rows: Rows) -> Scope:
    """Return what is reported: what the protocol plans, and what else has been asked for or run."""
    run = [cell for cell in reported(rows, protocol, DTYPE) if cell["arm"] in ARM_NAMES]
    planned = options.tasks if set(options.tasks) <= set(CAUSAL) else (*MAIN, *OTHERS, *options.tasks)
    return Scope(
        protocol=protocol,
        tasks=tuple(dict.fromkeys((*planned, *(cell["task"] for cell in run)))),
        arms=options.possible,
        seeds=tuple(sorted({*SEEDS, *(cell["seed"] for cell in run)})),
        cost=rows.get(cost_cell(options, protocol)),
    )


def shared_rows(results: Path) -> list[Row]:
    """Return rows of two other benchmarks that count here too: cells are equal where protocol, model and arm are."""
    return [row for name in ("accuracy", "layernorm_key_component") for row in Rows(results / f"{name}.jsonl")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    options.model, protocol = choose_model(options.model, MODELS[options.protocol], PROTOCOLS[options.protocol])
    rows = Rows(options.results / f"{NAME}.jsonl")
    rows.adopt(shared_rows(options.results))
    cost, failed = cost_cell(options, protocol), 0
    if not options.report:
        failed = run_experiment(NAME, options, protocol, rows, waves(options, protocol), run_cell)
        if options.list:
            print("The table of costs is there." if cost in rows else "The table of costs comes last, in 2 min.")
            return failed
        place = Place(options.model, options.data_dir, options.device)
        failed += run_cells([cost], rows, partial(run_costs, protocol=protocol, place=place), 1, "costs")
    write_report(rows, options.results, scope(options, protocol, rows))
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
