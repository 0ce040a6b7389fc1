"""How well does each way of tuning learn, at equal steps? Accuracy on sst2 and trec, float32 and bf16.

python -m benchmarks.papers.accuracy --data-dir <folder>
"""

import argparse
import operator
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness.claims import ABOUT_VERDICTS, Finding, listed, over_seeds
from benchmarks.harness.classification import (
    PROTOCOLS,
    Protocol,
    choose_model,
    experiment_parser,
    final_cells,
    refuse_unknown,
    run_experiment,
    search_first,
)
from benchmarks.harness.comparison import ABOUT_RATES
from benchmarks.harness.finals import Finals, differences, edge_note, figures, reported, seeds_of
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.plots import ABOUT_ACROSS, ABOUT_DOTS, Dot, Panel, plot_dots
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import mean_and_spread, of_what_ran, what_did_not_run
from benchmarks.harness.tasks import TEXT_COLUMNS

# The bounds this project set itself before it measured, in points of accuracy.
NEAR_FULL = 2.0
ABOVE_HEAD = 10.0
NEAR_FLOAT32 = 1.0
DTYPES, BASES = ("float32", "bfloat16"), ("float32 base", "bf16 base")


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
    results.mkdir(parents=True, exist_ok=True)
    panels = [panel for task in tasks if (panel := _panel(found, task, arms)).groups]
    if panels:
        plot_dots(results / f"{stem}.png", panels, f"Accuracy after {protocol.steps} steps", BASES)
        said = " and ".join(panel.title for panel in panels)
        parts += [f"![Accuracy of each arm on {said}]({stem}.png)", f"{ABOUT_DOTS} {ABOUT_ACROSS}"]
    for task in tasks:
        if any(found.of(task, arm, dtype) for arm in arms for dtype in DTYPES):
            parts.append(f"## {task}")
            parts += [of_what_ran(_header(said), lines) for said, lines in _tables(found, task, arms) if lines]
            parts.append(listed(finding.line for finding in _wanted(found, task)))
    missing = [f"- {said}, {line}" for said, line in _not_run(found, tasks, arms)]
    parts += [_notes(), *(["## Not run here", "\n".join(missing)] if missing else [])]
    (results / f"{stem}.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _panel(found: Finals, task: str, arms: Sequence[str]) -> Panel:
    dots = [
        Dot(arm, arm, scores, hollow=dtype != DTYPES[0])
        for arm in arms
        for dtype in DTYPES
        if (scores := figures(found.of(task, arm, dtype)))
    ]
    return Panel(task, metric_of(task).along, {"": dots} if dots else {}, across=("full", "head"))


def _header(said: str) -> tuple[str, ...]:
    return ("arm", "tuned entries", said, "rate", "moved")


def _tables(found: Finals, task: str, arms: Sequence[str]) -> Iterator[tuple[str, list[list[object]]]]:
    """Yield a table for each dtype of the base: its name, and a line for each arm that was run."""
    for dtype, said in zip(DTYPES, BASES, strict=True):
        lines = [_line(found, task, arm, dtype) for arm in arms]
        yield said, [line for line in lines if line[1] is not None]


def _line(found: Finals, task: str, arm: str, dtype: str) -> list[object]:
    rows = found.of(task, arm, dtype)
    entries = f"{rows[0]['num_method_params']:,}" if rows else None
    return [
        arm,
        entries,
        mean_and_spread(figures(rows), len(found.seeds)),
        found.rate(task, arm, dtype) if rows else None,
        _moved(rows),
    ]


def _moved(rows: Sequence[Row]) -> str | None:
    shares = [row["metrics"]["moved"] for row in rows]
    if not shares:
        return None
    return "no own entries" if shares[0] is None else f"{100 * statistics.mean(shares):.1f} %"


def _not_run(found: Finals, tasks: Sequence[str], arms: Sequence[str]) -> Iterator[tuple[str, str]]:
    for dtype, said in zip(DTYPES, BASES, strict=True):
        runs = {task: {arm: len(found.of(task, arm, dtype)) for arm in arms} for task in tasks}
        yield from ((said, line) for line in what_did_not_run(runs, len(found.seeds)))


def _wanted(found: Finals, task: str) -> list[Finding]:
    """Compare ours with the bounds set beforehand, seed by seed."""
    ours, planned = found.of(task, "ln"), len(found.seeds)
    near_full = {task: differences(ours, found.of(task, "full"))}
    above_head = {task: differences(ours, found.of(task, "head"))}
    apart = differences(found.of(task, "ln", "bfloat16"), ours)
    wide = {task: {seed: -abs(value) for seed, value in apart.items()}}
    near = f"ln over a bf16 base within {NEAR_FLOAT32:g} point of float32"

    def edges(**dtypes: str) -> str:
        return edge_note({arm: [task] if found.at_edge(task, arm, dtype) else [] for arm, dtype in dtypes.items()})

    both, above = (edges(ln=DTYPES[0], **{arm: DTYPES[0]}) for arm in ("full", "head"))
    return [
        over_seeds(f"ln within {NEAR_FULL:g} points of full", near_full, planned, -NEAR_FULL, operator.ge, both),
        over_seeds(
            f"ln at least {ABOVE_HEAD:g} points above head", above_head, planned, ABOVE_HEAD, operator.ge, above
        ),
        over_seeds(near, wide, planned, -NEAR_FLOAT32, operator.ge, edges(ln=DTYPES[1]) or edges(ln=DTYPES[0])),
    ]


def _notes() -> str:
    return (
        f"{ABOUT_RATES} `tuned entries` leaves the head out, which every arm trains, in float32 also over a bf16 base. "
        f"`moved` is the share of the tuned entries that differ from their start after training. {ABOUT_VERDICTS}"
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
    options.tasks = options.tasks or TASKS
    refuse_unknown(parser, options.tasks, TEXT_COLUMNS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    options.model, protocol = choose_model(options.model, None, PROTOCOLS[options.protocol])
    rows = Rows(options.results / "accuracy.jsonl")
    failed = 0
    if not options.report:
        failed = run_experiment("accuracy", options, protocol, rows, waves(options, protocol))
    if not options.list:
        run = [cell for cell in reported(rows, protocol) if cell["arm"] in ARM_NAMES]
        tasks = tuple(dict.fromkeys((*TASKS, *options.tasks, *(cell["task"] for cell in run))))
        write_report(rows, options.results, protocol, tasks, ARM_NAMES, seeds_of(run))
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
