"""How well does each method tune a language model, at which learning rate, and at what cost?

python -m benchmarks.papers.llm --data-dir <folder> --model <SmolLM2-135M-Instruct>
python -m benchmarks.papers.llm --protocol llm-full --data-dir <folder>
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import classification
from benchmarks.harness.classification import (
    Kind,
    Place,
    Protocol,
    choose_model,
    experiment_parser,
    final_cells,
    kind,
    load_base,
    refuse_unknown,
    run_experiment,
    search_first,
)
from benchmarks.harness.finals import reported, seeds_of
from benchmarks.harness.generation import NEW_TOKENS, answer_row, load_prompts
from benchmarks.harness.method_costs import time_methods
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_cells, stamp
from benchmarks.harness.splits import batches
from benchmarks.harness.tasks import Task, load_task
from benchmarks.harness.texts import TEXTS
from benchmarks.papers.llm_report import Scope, write_report

NAME = "llm"
DTYPE = "float32"
USUAL = "smollm2"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
FISHER = "ln-64"
# In run order. Names are those of PEFT's method_comparison: method, model, variant.
EXPERIMENTS = {
    "ln": "lntune/{}-default",
    "lora": "lora/{}-rank8",
    "full": "full-finetuning/{}",
    FISHER: "lntune/{}-fisher-64-per-norm",
    "ia3": "ia3/{}-default",
    "road": "road/{}-default",
    "beft": "beft/{}-default",
    "lora+ln": "lntune/{}-lora-rank8+ln",
    "stock-ln-bf16": "ln_tuning/{}-bfloat16",
    "ln-bf16": "lntune/{}-bfloat16",
}


@dataclass(frozen=True)
class TextProtocol(Protocol):
    """What is equal for all methods.

    Attributes:
        searched_on: the task whose search chooses the rates of all tasks; None: each task has its own search.
        answers: prompts that are answered, per task.
    """

    searched_on: str | None = None
    answers: int = 200


TIMED = ("ln", FISHER, "lora", "lora+ln", "ia3", "road", "beft")
COST_ROUNDS, COST_TOKENS = 3, 64  # of the longest row
# Where to begin; a search goes on while the best rate is at the edge.
RATES = {
    "ln": (3e-3, 1e-2, 3e-2),
    "lora": (1e-3, 3e-3, 1e-2),
    "full": (3e-5, 1e-4, 3e-4),
    FISHER: (1e-2, 3e-2, 1e-1),
    "ia3": (1e-2, 3e-2, 1e-1),
    "road": (1e-2, 3e-2),
    "beft": (1e-2, 3e-2),
    "lora+ln": (3e-3, 1e-2),
    **dict.fromkeys(("stock-ln-bf16", "ln-bf16"), (1e-3, 1e-2)),
}
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        TextProtocol(
            USUAL,
            steps=40,
            search_steps=12,
            batch_size=4,
            dropout=0.0,
            mask_samples=16,
            rates=RATES,
            extensions=3,
            held_out=32,
            scored=96,
            model=SMOLLM2,
            model_type="llama",
            searched_on="tinyshakespeare",
            answers=32,
        ),
        TextProtocol(
            "llm-full",
            steps=2000,
            search_steps=500,
            batch_size=16,
            dropout=None,
            rates=RATES,
            extensions=5,
            autocast=True,
            model=SMOLLM2,
            model_type="llama",
        ),
    )
}


def searched(protocol: TextProtocol, cell: Cell) -> Kind:
    """Return whose search chooses the learning rate of a cell."""
    task, arm, dtype = kind(cell)
    return protocol.searched_on or task, arm, dtype


def needed(cell: Cell, protocol: TextProtocol) -> set[Kind]:
    """Return the searches that a cell needs."""
    return {searched(protocol, cell)} if cell["phase"] == "final" else set()


def base_cell(protocol: Protocol) -> Cell:
    """Return the cell of the model as it is, without its task."""
    return {"protocol": protocol.name, "phase": "base", "dtype": DTYPE, "seed": 0}


def waves(options: argparse.Namespace, protocol: TextProtocol) -> list[list[Cell]]:
    """Return the cells most informative first: searches, all methods on a task, the next task, then the next seed."""
    stages: list[list[Cell]] = []
    for seed in options.seeds:
        for task in options.tasks:
            stages += [[{**base_cell(protocol), "task": task}]] * (seed == options.seeds[0])
            stages.append([cell for arm in options.arms for cell in final_cells(protocol, task, arm, DTYPE, [seed])])
    return search_first(protocol, stages, partial(needed, protocol=protocol))


def tune(model: nn.Module, cell: Cell, task: Task, protocol: Protocol) -> nn.Module:
    """Apply the method of a cell; the entries of `ln-64` are chosen by training rows."""
    from peft_lntune import fit_fisher_masks

    tuned: Any = classification.by_name(model, cell, task)
    if cell["arm"] == FISHER:
        tuned.peft_config["default"].num_samples = protocol.mask_samples
        size, device = protocol.batch_size, next(model.parameters()).device
        data = batches(task.train, size, math.ceil(protocol.mask_samples / size), cell["seed"], device)
        fit_fisher_masks(tuned, data)
    return tuned


def run_cell(cell: Cell, protocol: TextProtocol, place: Place, rates: dict[Kind, float]) -> Row:
    """Run one cell: train and score, or score the model as it is."""
    answer = partial(answers, cell=cell, protocol=protocol, place=place)
    if cell["phase"] == "base":
        device = torch.device(place.device)
        task = load_task(cell["task"], place.data_dir, place.model).first(protocol.scored)
        model = load_base(cell, protocol, place, task).to(device)
        metrics = {name: round(value, 5) for name, value in task.score(model, device).items()}
        return {"metrics": metrics, **answer(model), **stamp(device)}
    final = cell["phase"] == "final"
    own = {kind(cell): rates[searched(protocol, cell)]} if final else {}
    row = classification.run_cell(
        cell, protocol, place, own, partial(tune, protocol=protocol), inspect=answer if final else None
    )
    return {"experiment_name": experiment(cell["arm"], protocol), **row}


def answers(model: nn.Module, cell: Cell, protocol: TextProtocol, place: Place) -> Row:
    """Return what a row says of generated answers; nothing of a task without prompts."""
    from training import load_tokenizer

    if cell["task"] not in NEW_TOKENS or place.data_dir is None:
        return {}
    tokenizer = load_tokenizer(place.model)
    prompts = load_prompts(cell["task"], place.data_dir, tokenizer, protocol.answers)
    return answer_row(model, cell["task"], prompts, tokenizer)


def experiment(arm: str, protocol: Protocol) -> str:
    """Return what PEFT's method_comparison would call a run."""
    return EXPERIMENTS[arm].format(Path(protocol.model or protocol.name).name)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = experiment_parser("Methods for language models, at equal steps.", tuple(PROTOCOLS))
    parser.add_argument("--arms", nargs="+", choices=tuple(EXPERIMENTS), default=tuple(EXPERIMENTS))
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or list(TEXTS)
    refuse_unknown(parser, options.tasks, TEXTS)
    if options.data_dir is None and not options.report:
        parser.error("texts are read from a folder alone; give --data-dir.")
    return options


def cost_cell(protocol: TextProtocol) -> Cell:
    """Return the one cell that times and weighs a training step of the methods, whichever tasks were asked for."""
    task = protocol.searched_on or next(iter(TEXTS))
    place = {"protocol": protocol.name, "phase": "cost", "task": task, "dtype": DTYPE}
    return {**place, "arms": ["full", "full again", *TIMED], "rounds": COST_ROUNDS, "tokens": COST_TOKENS}


def scope(protocol: TextProtocol, rows: Rows) -> Scope:
    """Return what is reported: what the protocol plans, and the seeds that were run beside it."""
    base = {task: rows.get({**base_cell(protocol), "task": task}) for task in TEXTS}
    asked = "" if protocol.name == USUAL else f" --protocol {protocol.name}"
    return Scope(
        protocol=protocol,
        tasks=tuple(TEXTS),
        arms={arm: experiment(arm, protocol) for arm in EXPERIMENTS},
        seeds=seeds_of(reported(rows, protocol, DTYPE)),
        searched_on=protocol.searched_on,
        base={task: row for task, row in base.items() if row is not None},
        cost=rows.get(cost_cell(protocol)),
        command=f"python -m benchmarks.papers.llm{asked} --data-dir <folder> --model <folder>",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    options.model, protocol = choose_model(options.model, None, PROTOCOLS[options.protocol])
    rows, failed = Rows(options.results / f"{NAME}.jsonl"), 0
    if not options.report:
        needs = partial(needed, protocol=protocol)
        failed = run_experiment(NAME, options, protocol, rows, waves(options, protocol), run_cell, needs)
        if options.list:
            return failed
        place = Place(options.model, options.data_dir, options.device)
        one = partial(time_methods, protocol=protocol, place=place, tune=partial(tune, protocol=protocol), warm_up=1)
        failed += run_cells([cost_cell(protocol)], rows, one, 1, "costs")
    stem = NAME if protocol.name == USUAL else f"{NAME}_{protocol.name}"
    write_report(rows, options.results, scope(protocol, rows), stem)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
