"""What do Fisher scores of all norms cost, in time and memory? Run it when nothing else runs.

python -m benchmarks.costs.fisher_cost
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.claims import claim, time_claim
from benchmarks.harness.counting import peak_bytes
from benchmarks.harness.made import made_batch
from benchmarks.harness.models import load_classifier
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_timed, stamp
from benchmarks.harness.splits import Batch
from benchmarks.harness.tables import NOT_RUN, cost_table
from benchmarks.harness.timing import summary, take_turns
from peft_lntune import find_norms, fisher_scores

# The bounds this project set itself before it measured.
OF_A_STEP = 1.15  # times an ordinary forward and backward pass, at most
OF_THE_LOOP = {"cpu": 2.0, "gpu": 20.0}  # times faster than one backward pass per sample, at least
PROTOCOLS = {
    "cpu": {"rounds": 9, "batches": 8, "batch": 32, "tokens": 64},
    "gpu": {"rounds": 20, "batches": 8, "batch": 32, "tokens": 128},
}


def cells(protocol: str) -> list[Cell]:
    """Return the one group that is timed, turn by turn."""
    return [{"protocol": protocol, "model": "minilm", "kind": "empirical"}]


def run_cell(cell: Cell, checkpoint: str, device: torch.device) -> Row:
    """Time and weigh three ways through the same batches, the first of them twice, and compare their scores."""
    protocol = PROTOCOLS[cell["protocol"]]
    model = load_classifier(checkpoint, num_labels=2, dtype="float32", seed=0, dropout=0.0).to(device).eval()
    norms = tuned_norms(model)
    data = make_batches(protocol, device)
    calls: dict[str, Callable[[], object]] = {
        "step": partial(step, model, data),
        "step again": partial(step, model, data),
        "fisher": partial(fisher_scores, model, data, cell["kind"], progress=False),
        "loop": partial(loop, model, norms, data),
    }
    seconds = take_turns(calls, protocol["rounds"], device)
    arms = summary(seconds, "step")
    for name, call in calls.items():
        arms[name]["accelerator_memory_max"] = peak_bytes(call, device)
    ours, theirs = fisher_scores(model, data, cell["kind"], progress=False), loop(model, norms, data)
    largest = max(float(scores.max()) for scores in theirs.values())
    return {
        "arms": arms,
        "loop_to_fisher": summary(seconds, "fisher")["loop"]["ratio"],
        "difference": max(float((ours[name] - scores).abs().max()) for name, scores in theirs.items()) / largest,
        **protocol,
        **stamp(device),
    }


def tuned_norms(model: nn.Module) -> dict[str, Tensor]:
    """Freeze all but the norms, as in LN tuning, and return their parameters by name."""
    norms = tuple(f"{name}." for name in find_norms(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(norms))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_batches(protocol: Mapping[str, int], device: torch.device) -> list[Batch]:
    """Return batches of random tokens without padding, which the loop would be spared."""
    generator = torch.Generator().manual_seed(0)
    size = protocol["batch"], protocol["tokens"]
    return [made_batch(*size, device, generator) for _ in range(protocol["batches"])]


def step(model: Any, data: Sequence[Batch]) -> None:
    """One ordinary forward and backward pass per batch, without the optimizer."""
    for batch in data:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)


def loop(model: Any, norms: Mapping[str, Tensor], data: Sequence[Batch]) -> dict[str, Tensor]:
    """One forward and backward pass per sample, as FISH does it: the mean of the squared gradients."""
    squares = {name: torch.zeros_like(parameter) for name, parameter in norms.items()}
    samples = 0
    for batch in data:
        for row in range(len(batch["labels"])):
            model(**{name: values[row : row + 1] for name, values in batch.items()}).loss.backward()
            for name, parameter in norms.items():
                if parameter.grad is not None:
                    squares[name] += parameter.grad.square()
            model.zero_grad(set_to_none=True)
            samples += 1
    return {name: total / samples for name, total in squares.items()}


def write_report(rows: Rows, results: Path, planned: Sequence[Cell], protocol: str) -> None:
    """Write `fisher_cost.md`, for another protocol than the CPU's with its name in it."""
    size = PROTOCOLS[protocol]
    parts = [
        "# What Fisher scores of all norms cost",
        f"all-MiniLM-L6-v2, {size['batches']} batches of {size['batch']} rows of {size['tokens']} tokens, float32. "
        "`step`: an ordinary forward and backward pass a batch, gradients of the norms alone, no optimizer; `again` is "
        "the same a second time: how far its ratio is from 1 is noise. `fisher`: this package, in whole, with what it "
        "looks up and checks once. `loop`: a forward and backward pass a sample. Arms are timed in turns; ratios are "
        "taken within a round.",
    ]
    for cell in planned:
        row = rows.get(cell)
        parts += [NOT_RUN] if row is None else [cost_table(row["arms"]), *_wanted(row, protocol)]
    results.mkdir(parents=True, exist_ok=True)
    stem = "fisher_cost" if protocol == "cpu" else f"fisher_cost_{protocol}"
    (results / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _wanted(row: Row, protocol: str) -> list[str]:
    noise, ours, faster = row["arms"]["step again"]["ratio"], row["arms"]["fisher"]["ratio"], row["loop_to_fisher"]
    least = OF_THE_LOOP[protocol]
    return [
        time_claim(f"fisher at most {OF_A_STEP:g} of step", ours, noise, OF_A_STEP)
        + "\n"
        + claim(f"at least {least:g} times faster than loop", _quartiles(faster), faster[1] >= least),
        f"The two ways to the scores differ by at most {row['difference']:.1e} of the largest score. Measured on "
        f"{row['device']}.",
    ]


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = values
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    description = "Time and memory of Fisher scores, against an ordinary pass and against one backward a sample."
    return run_timed("fisher_cost", description, tuple(PROTOCOLS), cells, run_cell, write_report, 5, arguments)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
