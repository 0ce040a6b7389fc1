"""What does a method cost in dispatched operations? Deterministic, so one run is enough.

python -m benchmarks.costs.operations
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.costs.operations_report import page
from benchmarks.harness.arms import find_arm, norm_names, own_parameters
from benchmarks.harness.counting import count_operations
from benchmarks.harness.made import made_inputs
from benchmarks.harness.mixed import mixed_call
from benchmarks.harness.models import load_body, load_classifier, tiny_llama
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_script, stamp

ARM_NAMES = ("ln", "plain", "stock-ln", "lora", "road", "bitfit", "full")
MIXED_ARMS = ("ln", "lora", "road")  # the others cannot serve a row of the batch by its own adapter
MODELS = ("minilm", "tiny-llama")
ADAPTERS = (1, 8, 32, 64)
BATCH, TOKENS = 64, 2  # how many tokens there are changes no count


def cells() -> list[Cell]:
    """Return everything that is counted."""
    found: list[Cell] = []
    for model in MODELS:
        found += [{"measure": "evaluation", "model": model, "arm": arm} for arm in ("base", *ARM_NAMES)]
        found += [{"measure": "trainable", "model": model, "arm": arm} for arm in ARM_NAMES]
        found += [{"measure": "training", "model": model, "arm": arm} for arm in ARM_NAMES]
        mixed = {"measure": "mixed", "model": model}
        found += [{**mixed, "arm": arm, "adapters": number} for arm in MIXED_ARMS for number in ADAPTERS]
    return found


def run_cell(cell: Cell, checkpoint: str) -> Row:
    """Count the operations of one cell: of the first call, and of a later one, when everything kept has been made."""
    measures = {"evaluation": _evaluation, "trainable": _trainable, "training": _training, "mixed": _mixed}
    measure = measures[cell["measure"]]
    model = _load(cell, checkpoint)
    facts = {"norms": len(norm_names(model))}
    if cell["arm"] != "base":
        model = find_arm(cell["arm"]).tune(model)
        facts["tuned_tensors"] = len(own_parameters(model))
        facts["num_method_params"] = sum(parameter.numel() for parameter in own_parameters(model).values())
        if not facts["tuned_tensors"]:
            return {**facts, **stamp(torch.device("cpu")), "status": "nothing to tune"}
    call = measure(model, cell)
    first, later = count_operations(call), count_operations(call)
    return {"operations": later, "operations_first": first, **facts, **stamp(torch.device("cpu"))}


def _load(cell: Cell, checkpoint: str) -> nn.Module:
    """Return the model of a cell: with a head to train, without one to evaluate."""
    if cell["model"] == "minilm":
        if cell["measure"] == "training":
            return load_classifier(checkpoint, num_labels=2, dtype="float32", seed=0, dropout=None)
        return load_body(checkpoint)
    llama: Any = tiny_llama()
    return llama if cell["measure"] == "training" else llama.model


def _evaluation(model: nn.Module, cell: Cell) -> Callable[[], object]:
    """Return a forward pass without gradients as one that serves runs it: nothing can be trained."""
    return _trainable(model.requires_grad_(False), cell)


def _trainable(model: nn.Module, cell: Cell) -> Callable[[], object]:
    """Return a forward pass without gradients between two training steps."""
    model.eval()
    inputs = made_inputs(BATCH, TOKENS, torch.device("cpu"))
    return torch.no_grad()(lambda: model(**inputs))


def _training(model: nn.Module, cell: Cell) -> Callable[[], object]:
    """Return a forward and a backward pass; the optimizer's cost depends on the entries alone and is left out."""
    model.train()
    inputs = made_inputs(BATCH, TOKENS, torch.device("cpu"))
    labels = inputs["input_ids"] if cell["model"] == "tiny-llama" else torch.zeros(BATCH, dtype=torch.long)

    def step() -> None:
        model(**inputs, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _mixed(model: nn.Module, cell: Cell) -> Callable[[], object]:
    """Return a forward pass whose rows use `cell["adapters"]` distinct adapters in turn, none of which is trained."""
    call = mixed_call(model, cell["adapters"], made_inputs(BATCH, TOKENS, torch.device("cpu")))
    model.requires_grad_(False)
    return call


def report(rows: Rows) -> str:
    """The tables."""
    return page(rows, MODELS, ARM_NAMES, MIXED_ARMS, ADAPTERS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    about = "Dispatched operations of each method."
    return run_script("operations", about, cells(), run_cell, report, arguments, checkpoint=True)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
