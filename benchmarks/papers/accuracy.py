"""How well does each way of tuning learn, at equal steps? Accuracy on sst2 and trec, float32 and bf16.

python -m benchmarks.papers.accuracy --data-dir <folder>
"""

import argparse
import operator
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness.claims import seeds_claim
from benchmarks.harness.classification import (
    PROTOCOLS,
    SEEDS,
    Protocol,
    experiment_parser,
    final_cells,
    run_experiment,
    search_first,
)
from benchmarks.harness.finals import Finals, differences, figures
from benchmarks.harness.models import default_model
from benchmarks.harness.plots import plot_against_size
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import markdown, mean_and_spread

# The bounds this project set itself before it measured, in points of accuracy.
NEAR_FULL = 2.0
ABOVE_HEAD = 10.0
NEAR_FLOAT32 = 1.0
DTYPES = ("float32", "bfloat16")
HEADER = ("arm", "tuned entries", "float32", "bf16 base", "rate", "rate, bf16", "moved", "moved, bf16")


def write_report(
    rows: Rows, results: Path, protocol: Protocol, tasks: Sequence[str], arms: Sequence[str], seeds: Sequence[int]
) -> None:
    """Write `accuracy.md` and `accuracy.png`, for another protocol than the CPU's with its name in them."""
    stem = protocol.stem("accuracy")
    parts = [
        f"# Accuracy in per cent: mean ± standard deviation over {len(seeds)} seeds",
        f"Protocol `{protocol.name}`: {protocol.steps} steps of {protocol.batch_size} rows for every arm.",
    ]
    found = Finals(rows, protocol, seeds)
    for task in tasks:
        parts += [f"## {task}", markdown(HEADER, [_line(found, task, arm) for arm in arms])]
        parts += ["\n".join(_wanted(found, task))]
    parts += [_notes()]
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{stem}.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    sizes = _sizes(found, tasks, arms)
    if sizes:
        panels = {
            task: {dtype: {arm: figures(found.of(task, arm, dtype)) for arm in arms} for dtype in DTYPES}
            for task in tasks
        }
        title = "Accuracy at equal steps: mean, worst and best seed"
        plot_against_size(results / f"{stem}.png", panels, sizes, title)


def _sizes(found: Finals, tasks: Iterable[str], arms: Sequence[str]) -> dict[str, int]:
    places = [(task, arm, dtype) for task in tasks for arm in arms for dtype in DTYPES]
    return {place[1]: row["num_method_params"] for place in places for row in found.of(*place)}


def _moved(rows: Sequence[Row]) -> str | None:
    shares = [row["metrics"]["moved"] for row in rows]
    if not shares:
        return None
    return "no own entries" if shares[0] is None else f"{100 * statistics.mean(shares):.1f} %"


def _line(found: Finals, task: str, arm: str) -> list[object]:
    rows = {dtype: found.of(task, arm, dtype) for dtype in DTYPES}
    entries = [f"{row['num_method_params']:,}" for each in rows.values() for row in each]
    return [
        arm,
        entries[0] if entries else None,
        *(mean_and_spread(figures(each), len(found.seeds)) for each in rows.values()),
        *(found.rate(task, arm, dtype) for dtype in DTYPES),
        *map(_moved, rows.values()),
    ]


def _wanted(found: Finals, task: str) -> list[str]:
    """Compare ours with the bounds set beforehand, seed by seed."""
    ours = found.of(task, "ln")
    near_full = list(differences(ours, found.of(task, "full")).values())
    above_head = list(differences(ours, found.of(task, "head")).values())
    wide = list(differences(found.of(task, "ln", "bfloat16"), ours).values())
    planned = len(found.seeds)
    near = f"ln over a bf16 base within {NEAR_FLOAT32:g} point of float32"
    return [
        seeds_claim(f"ln within {NEAR_FULL:g} points of full", near_full, planned, -NEAR_FULL, operator.ge),
        seeds_claim(f"ln at least {ABOVE_HEAD:g} points above head", above_head, planned, ABOVE_HEAD, operator.ge),
        seeds_claim(near, [-abs(value) for value in wide], planned, -NEAR_FLOAT32, operator.ge),
    ]


def _notes() -> str:
    return (
        "`rate` is the learning rate chosen on held-out training rows; `(edge)` marks the smallest or largest tried. "
        "`tuned entries` leaves the head out, which every arm trains, in float32 also over a bf16 base. "
        "`moved` is the share of the tuned entries that differ from their start after training."
    )


# Most informative first: a run that is cut off leaves the rows that answer most.
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
    """Return the cells most informative first; a wave may need the rows of the waves before it."""
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
