"""Arms that learn by zeros: supermasks over frozen weights, and magnitude pruning as their control."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness.arms import SPARSITY, arm, head, supermask
from benchmarks.harness.classification import by_name
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.models import head_modules
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.tasks import Task
from peft_lntune import select
from peft_lntune.architectures.components import find_components

DRAWS = 3  # sampled masks


@arm("pruned", rates=(1e-3, 3e-3, 1e-2), searched_at={"sparsity": SPARSITY})
@torch.no_grad()
def pruned(model: nn.Module, sparsity: float = SPARSITY) -> nn.Module:
    """Set the smallest weights of every matrix in the layers to zero, and train the head alone."""
    parameters, heads = dict(model.named_parameters()), tuple(f"{name}." for name in head_modules(model))
    places = find_components(parameters)
    sizes = {
        name: value.abs()
        for name, value in parameters.items()
        if places[name].layer is not None and value.dim() > 1 and not name.startswith(heads)
    }
    if sparsity:
        for name, smallest in select(sizes, density=sparsity, scope="tensor", largest=False).items():
            parameters[name].masked_fill_(smallest, 0)
    return head(model)


SPARSE: dict[str, Callable[..., nn.Module]] = {"supermask": supermask, "pruned": pruned}


def tune(model: nn.Module, cell: Cell, task: Task) -> nn.Module:
    """Make a model ready for a cell of any arm, with zeros or not."""
    if cell["arm"] not in SPARSE:
        return by_name(model, cell, task)
    return SPARSE[cell["arm"]](model, sparsity=cell["sparsity"])


def measure_masks(model: Any, task: Task, device: torch.device) -> Row:
    """Return the zeros of a trained supermask, and how well masks do that are drawn by its scores.

    Returns:
        Of all masked entries `sparsity` (share that is zero), `dropped` and `revived` (shares that have become zero,
        and are so no longer); and `sampled`, the score of each draw, in which every batch has a mask of its own.
    """
    from peft_lntune.tuner.supermasks import keep_masks, sampled_masks, start_masks

    start, end = start_masks(model), keep_masks(model)
    entries = sum(mask.numel() for mask in end.values())
    pairs = [(start[name], mask) for name, mask in end.items()]
    counts = {
        "sparsity": sum(int((~mask).sum()) for mask in end.values()),
        "dropped": sum(int((before & ~after).sum()) for before, after in pairs),
        "revived": sum(int((~before & after).sum()) for before, after in pairs),
    }
    with sampled_masks(model):
        sampled = [task.score(model, device)[metric_of(task.name).name] for _ in range(DRAWS)]
    shares = {name: round(count / entries, 6) for name, count in counts.items()}
    return {"masks": {**shares, "sampled": [round(score, 5) for score in sampled]}}
