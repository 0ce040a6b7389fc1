"""What an optimizer does with a parameter, as far as it can be read from its groups and state."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.doctor.places import local

__all__ = ["Group", "Holdings", "has_master", "holdings"]


@dataclass(frozen=True)
class Group:
    """The settings of a parameter's group.

    Attributes:
        learning_rate: now; None if the optimizer chooses it itself, as Adafactor can.
        peak: the largest of the present learning rate and the one that the schedule starts from.
        weight_decay: its coefficient.
        momentum: of SGD, 0 for others.
        epsilon: what is added to the denominator; 0 without one.
        by_gradient: whether the step grows with the gradient (SGD). Other optimizers divide by its magnitude.
        smallest_size: where a step is the rate times the root mean square of a parameter's values (Adafactor), what
            takes its place while it is smaller; None for other optimizers.
    """

    learning_rate: float | None
    peak: float | None
    weight_decay: float
    momentum: float
    epsilon: float
    by_gradient: bool
    smallest_size: float | None = None

    def step(self, rate: float | None, gradient: float) -> float | None:
        """The largest step that the optimizer takes for entries with gradients up to this magnitude.

        SGD with momentum m sums up to `rate * gradient / (1 - m)`. Adam and its kin divide the gradient by its own
        magnitude plus epsilon: `rate * gradient / (gradient + epsilon)`, which is at most the rate. Where the
        gradients of an entry come in rare bursts, Adam's first step after a pause may be a few times as large.

        Args:
            rate: the learning rate.
            gradient: largest absolute gradient, 0 or more; infinity for the bound over all gradients.

        Returns:
            The step; None if the rate is not known, or if SGD's step has no bound.
        """
        if rate is None:
            return None
        if self.by_gradient:
            return None if gradient == float("inf") else rate * gradient / max(1 - self.momentum, 1e-3)
        if gradient == float("inf"):
            return rate
        return rate * gradient / (gradient + self.epsilon) if gradient > 0 else 0.0


@dataclass(frozen=True)
class Holdings:
    """The parameters that an optimizer holds.

    Attributes:
        groups: settings by `id` of the parameter.
        foreign: parameters of the optimizer that are not in the model: replaced ones, or masters.
        sees_model: whether the optimizer holds any parameter of the model.
    """

    groups: Mapping[int, Group]
    foreign: tuple[Tensor, ...]
    sees_model: bool

    def master_of(self, parameter: Tensor) -> bool:
        """Whether a foreign tensor is a float32 copy of a parameter in half precision."""
        return any(_is_master(other, parameter) for other in self.foreign)


def holdings(optimizer: Any, model: nn.Module) -> Holdings:
    """Read which parameters an optimizer holds, and their settings.

    Args:
        optimizer: any object with `param_groups` as torch's optimizers have them, accelerate's wrapper included.
        model: the model.

    Returns:
        What it holds.
    """
    inner = optimizer
    while getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    by_gradient = "sgd" in type(inner).__name__.lower()
    own = {id(parameter) for parameter in model.parameters()}
    groups: dict[int, Group] = {}
    foreign = []
    for group in optimizer.param_groups:
        rate = _number(group.get("lr"))
        first = _number(group.get("initial_lr"))
        settings = Group(
            learning_rate=rate,
            peak=max(rate, first or 0.0) if rate is not None else None,
            weight_decay=_number(group.get("weight_decay")) or 0.0,
            momentum=(_number(group.get("momentum")) or 0.0) if by_gradient else 0.0,
            epsilon=_epsilon(group.get("eps")),
            by_gradient=by_gradient,
            smallest_size=_smallest_size(group),
        )
        for parameter in group["params"]:
            groups[id(parameter)] = settings
            if id(parameter) not in own:
                foreign.append(parameter)
    return Holdings(groups, tuple(foreign), any(key in own for key in groups))


def has_master(optimizer: Any, parameter: Tensor) -> bool:
    """Whether an optimizer's state for a parameter has a float32 copy of it, which takes the small steps.

    Args:
        optimizer: the optimizer.
        parameter: the parameter.

    Returns:
        True if some tensor of the state, rounded to the dtype of the parameter, equals the parameter.
    """
    state = getattr(optimizer, "state", None)
    own: Any = state.get(parameter, {}) if isinstance(state, Mapping) else {}
    return any(_is_master(value, parameter) for value in _tensors(own))


def _tensors(state: Any) -> Iterable[Tensor]:
    values = state.values() if isinstance(state, Mapping) else ()
    return [value for value in values if isinstance(value, torch.Tensor)]


def _is_master(other: Tensor, parameter: Tensor) -> bool:
    value, copy = local(parameter), local(other)
    if value.dtype.itemsize >= 4 or copy.dtype != torch.float32 or copy.numel() != value.numel() or not value.any():
        return False
    return torch.equal(copy.reshape(-1).to(value.device, value.dtype), value.reshape(-1))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _epsilon(value: Any) -> float:
    return float(value) if isinstance(value, (int, float, torch.Tensor)) else 0.0  # Adafactor has a pair


def _smallest_size(group: Mapping[str, Any]) -> float | None:
    """The second epsilon of Adafactor, torch's (which alone has a beta2_decay) or transformers' with its option."""
    if not (group.get("scale_parameter") or "beta2_decay" in group):
        return None
    return float(group["eps"][1])
