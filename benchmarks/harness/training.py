"""One plain training loop, the same for every arm."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.harness.arms import own_parameters
from benchmarks.harness.models import HEADS, head_modules
from benchmarks.harness.splits import Batch
from peft_lntune.tuner.parameter_groups import parameter_groups

WARM_UP = 0.06
CLIP = 1.0  # largest norm of all gradients together, the default of transformers' Trainer


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    clip: float = CLIP
    head_rate: float | None = None  # of the head, where it is not that of the rest
    part_rates: Mapping[str, float] = field(default_factory=dict)  # of the parts that have their own


def rate_factor(step: int, steps: int) -> float:
    """Return the share of the learning rate used at a step: linear warm-up, then linear decay to zero.

    Example:
        >>> [rate_factor(step, 100) for step in (2, 5, 53)]
        [0.5, 1.0, 0.5]
    """
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (steps - step) / max(1, steps - warm_up)


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    head_rate: float | None = None,
    part_rates: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """Return AdamW without weight decay over what the arm trains, by one rate or with those of head and parts."""
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if head_rate is not None or part_rates:
        heads = list(head_modules(model))
        groups = parameter_groups(model, learning_rate, head_rate, part_rates, heads=heads)
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0, fused=True)


def train_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, clip: float = CLIP) -> float:
    """Make one step and return its loss."""
    return launch_step(model, batch, optimizer, clip).item()


def launch_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, clip: float = CLIP) -> Tensor:
    """Make one step without waiting for the device, and return its loss, detached."""
    loss: Tensor = model(**batch).loss
    loss.backward()
    if clip:
        tuned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(tuned, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def train(
    model: nn.Module, data: Iterable[Batch], schedule: Schedule, midway: Callable[[], object] | None = None
) -> dict[str, Any]:
    """Train a model in place.

    Args:
        model: with the parameters to train.
        data: as many batches as the schedule has steps.
        schedule: how long and how fast.
        midway: called after half of the steps; not part of the time.

    Returns:
        `train_time` in seconds, `train_loss` (mean over the last tenth of the steps; None where it is not finite)
        and `moved`, the share of the arm's own entries (without the head) that differ from their start.
    """
    model.train()
    optimizer = make_optimizer(model, schedule.learning_rate, schedule.head_rate, schedule.part_rates)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, schedule.steps))
    start = {name: parameter.detach().clone() for name, parameter in own_parameters(model).items()}
    losses, seconds = [], 0.0
    for step, batch in enumerate(data, start=1):
        begin = time.perf_counter()
        losses.append(train_step(model, batch, optimizer, schedule.clip))
        scheduler.step()
        seconds += time.perf_counter() - begin
        if midway is not None and step == schedule.steps // 2:
            midway()
            model.train()
    tail = losses[-max(1, len(losses) // 10) :]
    loss = sum(tail) / len(tail)
    return {
        "train_time": round(seconds, 2),
        "train_loss": round(loss, 5) if math.isfinite(loss) else None,
        "moved": _moved(start, own_parameters(model)),
    }


def counts(model: nn.Module) -> dict[str, int]:
    """Count parameters by PEFT's names: trained, those of the method without the head, and all."""
    return {
        "num_trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "num_method_params": sum(p.numel() for p in own_parameters(model).values()),
        "num_total_params": sum(p.numel() for p in model.parameters()),
    }


def saved_bytes(model: nn.Module, with_head: bool = True) -> int:
    """Return the size of the safetensors file that holds what the arm trains.

    Where the arm is a PEFT model this is the file that PEFT writes; for plain arms a file of the trained tensors.
    """
    import peft

    if isinstance(model, peft.PeftModel):
        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = {name: tensor for name, tensor in tensors.items() if with_head or not HEADS & set(name.split("."))}
    return len(save({name: tensor.detach().contiguous() for name, tensor in kept.items()}))


@torch.no_grad()
def _moved(start: dict[str, Tensor], end: dict[str, Tensor]) -> float | None:
    """Return the share of entries that changed, or None where the arm has none beside the head."""
    total = sum(tensor.numel() for tensor in start.values())
    if total == 0:
        return None
    changed = sum(int((end[name] != tensor).sum()) for name, tensor in start.items())
    return round(changed / total, 4)
