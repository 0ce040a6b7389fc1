"""What do a training step, an evaluation and a generation cost in time and memory? Run it when nothing else runs.

python -m benchmarks.costs.speed
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.costs.speed_report import write_report
from benchmarks.harness.arms import find_arm, own_parameters
from benchmarks.harness.costs import in_turns, training_call
from benchmarks.harness.made import made_inputs
from benchmarks.harness.models import load_classifier, tiny_llama
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.runner import run_timed, stamp

# The first of each list is what the others are compared with; the second is the same again, to see the noise.
TRAINED = ("plain", "plain again", "ln", "stock-ln", "lora", "road", "bitfit", "full")
SERVED = ("base", "base again", "ln", "stock-ln", "lora", "road")
PROTOCOLS = {
    "cpu": {"rounds": 30, "batch": 16, "tokens": 32, "new_tokens": 16, "layers": 12, "width": 64, "dtype": "float32"},
    "full": {
        "rounds": 50,
        "batch": 32,
        "tokens": 128,
        "new_tokens": 64,
        "layers": 16,
        "width": 2048,
        "dtype": "bfloat16",
    },
}


def cells(protocol: str) -> list[Cell]:
    """Return the groups that are timed together, turn by turn."""
    pairs = (("minilm", "training"), ("tiny-llama", "training"), ("minilm", "evaluation"), ("tiny-llama", "generation"))
    return [{"protocol": protocol, "model": model, "measure": measure} for model, measure in pairs]


def run_cell(cell: Cell, checkpoint: str, device: torch.device) -> Row:
    """Time and weigh all arms of one group."""
    protocol: dict[str, Any] = PROTOCOLS[cell["protocol"]]
    calls: dict[str, Callable[[], object]] = {}
    for name in TRAINED if cell["measure"] == "training" else SERVED:
        arm = name.removesuffix(" again")
        model = _load(cell, checkpoint).to(device)
        if arm != "base":
            model = find_arm(arm).tune(model)
            if not own_parameters(model):
                continue  # a Llama has no biases
        make = {"training": _training, "evaluation": _evaluation, "generation": _generation}[cell["measure"]]
        calls[name] = make(model, cell, protocol, device)
    arms = in_turns(calls, protocol["rounds"], device)
    return {"arms": arms, "rounds": protocol["rounds"], **stamp(device)}


def _load(cell: Cell, checkpoint: str) -> nn.Module:
    protocol: dict[str, Any] = PROTOCOLS[cell["protocol"]]
    if cell["model"] == "minilm":
        return load_classifier(checkpoint, num_labels=2, dtype=protocol["dtype"], seed=0, dropout=None)
    return tiny_llama(protocol["layers"], protocol["width"], protocol["dtype"])


def _training(model: nn.Module, cell: Cell, protocol: dict[str, Any], device: torch.device) -> Callable[[], object]:
    """Return a whole training step: forward, backward, AdamW."""
    batch = made_inputs(protocol["batch"], protocol["tokens"], device)
    batch["labels"] = batch["input_ids"] if cell["model"] == "tiny-llama" else batch["input_ids"][:, 0] % 2
    return training_call(model, batch)


def _evaluation(model: nn.Module, cell: Cell, protocol: dict[str, Any], device: torch.device) -> Callable[[], object]:
    """Return a forward pass without gradients."""
    model.eval()
    inputs = made_inputs(protocol["batch"], protocol["tokens"], device)
    return torch.no_grad()(lambda: model(**inputs))


def _generation(model: Any, cell: Cell, protocol: dict[str, Any], device: torch.device) -> Callable[[], object]:
    """Return a greedy generation of a fixed number of tokens."""
    model.eval()
    length = {"min_new_tokens": protocol["new_tokens"], "max_new_tokens": protocol["new_tokens"]}
    return partial(
        model.generate, **made_inputs(protocol["batch"], protocol["tokens"], device), **length, do_sample=False
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    description = "Time and memory of each method, against plain requires_grad lines and the base model."
    return run_timed("speed", description, tuple(PROTOCOLS), cells, run_cell, write_report, 5, arguments)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
