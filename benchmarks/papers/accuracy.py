"""How well does each way of tuning learn, at equal steps? Accuracy on sst2 and trec, float32 and bf16.

python -m benchmarks.papers.accuracy --data-dir <folder>
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.harness.classification import (
    PROTOCOLS,
    SEEDS,
    Protocol,
    experiment_parser,
    final_cells,
    run_experiment,
    search_first,
)
from benchmarks.harness.models import default_model
from benchmarks.harness.rows import Cell, Rows
from benchmarks.papers.accuracy_report import write_report

# In order of worth: a run that is cut off leaves the rows that answer most.
TIERS = (
    ("float32", ("ln", "head", "full")),
    ("float32", ("lora", "bitfit", "stock-ln")),
    ("bfloat16", ("ln", "stock-ln")),
    ("float32", ("ln-weight", "ln-bias")),
)
# Only in the protocol for a GPU: without bf16 instructions a CPU takes three times as long for a step as in float32.
LONG_TIERS = (*TIERS, ("bfloat16", ("lora", "bitfit", "full", "head", "ln-weight", "ln-bias")))
ARM_NAMES = tuple(dict.fromkeys(arm for _, arms in TIERS for arm in arms))
TASKS = ("sst2", "trec")
DTYPE_NAMES = ("float32", "bfloat16")


def waves(options: argparse.Namespace, protocol: Protocol) -> list[list[Cell]]:
    """Return the cells in order of worth; a wave may need the rows of the waves before it."""
    stages: list[list[Cell]] = []
    for dtype, arms in LONG_TIERS if protocol.name == "full" else TIERS:
        kept = [arm for arm in arms if arm in options.arms and dtype in options.dtypes]
        kinds = [(task, arm, dtype) for arm in kept for task in options.tasks]
        stages.append([cell for place in kinds for cell in final_cells(protocol, *place, options.seeds)])
    return search_first(protocol, stages)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = experiment_parser("Accuracy of each way of tuning at equal steps.")
    parser.add_argument("--arms", nargs="+", choices=ARM_NAMES, default=ARM_NAMES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPE_NAMES, default=DTYPE_NAMES)
    options = parser.parse_args(arguments)
    options.model = options.model or default_model()
    options.tasks = options.tasks or TASKS
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    protocol = PROTOCOLS[options.protocol]
    rows = Rows(options.results / "accuracy.jsonl")
    failed = 0
    if not options.report:
        failed = run_experiment("accuracy", options, protocol, rows, waves(options, protocol))
    if not options.list:
        write_report(rows, options.results, protocol, TASKS, ARM_NAMES, SEEDS)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
