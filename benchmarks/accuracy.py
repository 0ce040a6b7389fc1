"""How well does each way of tuning learn, at equal steps? Accuracy on sst2 and trec, float32 and bf16.

python -m benchmarks.accuracy --data-dir <folder>
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.accuracy_report import write_report
from benchmarks.harness.classification import (
    Place,
    Protocol,
    best_rates,
    estimate,
    final_cells,
    kind,
    run_cell,
    search_cells,
)
from benchmarks.harness.environment import write_environment
from benchmarks.harness.models import default_model
from benchmarks.harness.rows import Cell, Rows
from benchmarks.harness.runner import base_parser, format_seconds, parse_device, run_cells, start_process

# In order of worth: a run that is cut off leaves the rows that answer most.
TIERS = (
    ("float32", ("ln", "head", "full")),
    ("float32", ("lora", "bitfit", "stock-ln")),
    ("bfloat16", ("ln", "stock-ln")),
    ("float32", ("ln-weight", "ln-bias")),
)
# Only in the long protocol: without bf16 instructions a CPU takes three times as long for a step as in float32.
LONG_TIERS = (*TIERS, ("bfloat16", ("lora", "bitfit", "full", "head", "ln-weight", "ln-bias")))
ARM_NAMES = tuple(dict.fromkeys(arm for _, arms in TIERS for arm in arms))
TASKS = ("sst2", "trec")
DTYPE_NAMES = ("float32", "bfloat16")
SEEDS = (0, 1, 2)
CPU = Protocol("cpu", steps=300, search_steps=200, batch_size=16, dropout=0.0)
FULL = Protocol("full", steps=3000, search_steps=3000, batch_size=32, dropout=None)


def waves(options: argparse.Namespace, protocol: Protocol) -> list[list[Cell]]:
    """Return the cells in order of worth; a wave may need the rows of the waves before it."""
    found: list[list[Cell]] = []
    for dtype, arms in LONG_TIERS if options.full else TIERS:
        kept = [arm for arm in arms if arm in options.arms and dtype in options.dtypes]
        kinds = [(task, arm, dtype) for arm in kept for task in options.tasks]
        found.append([cell for place in kinds for cell in search_cells(protocol, *place)])
        finals = [cell for place in kinds for cell in final_cells(protocol, *place, options.seeds)]
        found.append(sorted(finals, key=lambda cell: cell["seed"]))
    return [wave for wave in found if wave]


def run_all(options: argparse.Namespace, protocol: Protocol, rows: Rows) -> int:
    """Run what has no row yet, and return how many runs failed."""
    device = parse_device(options)
    place = Place(options.model, options.data_dir, options.device)
    start_process(threads=1 if options.jobs > 1 else torch.get_num_threads())
    if options.list:
        left = [cell for wave in waves(options, protocol) for cell in wave if cell not in rows]
        seconds = estimate(left, protocol, place) / options.jobs
        print(f"{len(left)} runs left; about {format_seconds(seconds)} with {options.jobs} processes side by side.")
        return 0
    write_environment(options.results / "environment.json", "accuracy", device, options.jobs)
    failed = 0
    for wave in waves(options, protocol):
        rates = best_rates(rows, protocol, {kind(cell) for cell in wave})
        ready = [cell for cell in wave if cell["phase"] == "search" or kind(cell) in rates]
        run = partial(run_cell, protocol=protocol, place=place, rates=rates)
        failed += run_cells(ready, rows, run, options.jobs, f"{wave[0]['dtype']} {wave[0]['phase']}")
    return failed


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = base_parser("Accuracy of each way of tuning at equal steps.")
    parser.add_argument("--data-dir", type=Path, help="folder of <task>/{train,validation}.jsonl (default: the Hub)")
    parser.add_argument("--model", default=None, help="folder or Hub id (default: the installed all-MiniLM-L6-v2)")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--arms", nargs="+", choices=ARM_NAMES, default=ARM_NAMES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPE_NAMES, default=DTYPE_NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args(arguments)
    options.model = options.model or default_model()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    protocol = FULL if options.full else CPU
    rows = Rows(options.results / "accuracy.jsonl")
    failed = 0 if options.report else run_all(options, protocol, rows)
    if not options.list:
        write_report(rows, options.results, protocol, TASKS, ARM_NAMES, SEEDS)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
