"""What a whole training step costs, in time and in memory: the candidates take turns."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.harness.counting import peak_bytes
from benchmarks.harness.splits import Batch
from benchmarks.harness.timing import Call, summary, take_turns
from benchmarks.harness.training import make_optimizer, train_step


def training_call(model: nn.Module, batch: Batch) -> Call:
    """Return a whole training step: forward, backward, AdamW."""
    model.train()
    return partial(train_step, model, batch, make_optimizer(model, 1e-5))


def in_turns(
    calls: Mapping[str, Call], rounds: int, device: torch.device, box: float | None = None, warm_up: int = 2
) -> dict[str, dict[str, Any]]:
    """Time calls in turns and weigh each of them.

    Args:
        calls: name -> what is measured; ratios are to the first.
        rounds: how often.
        device: where they run.
        box: seconds after which no round begins, see `timing.take_turns`.
        warm_up: rounds that are not counted.

    Returns:
        name -> `seconds` and `ratio` as of `timing.summary`, `rounds`, the number of rounds that were counted, and
        `accelerator_memory_max` in bytes.
    """
    seconds = take_turns(calls, rounds, device, warm_up, box)
    found = summary(seconds, next(iter(calls)))
    for name, call in calls.items():
        found[name]["rounds"] = len(seconds[name])
        found[name]["accelerator_memory_max"] = peak_bytes(call, device)
    return found
