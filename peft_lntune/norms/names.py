"""What a norm itself calls its weight and its bias: `gamma` and `beta`, `scale` and `shift`, `a_2` and `b_2`.

Configs, files and tables say weight and bias; whoever reads a parameter of a norm asks its name here.
"""

from typing import Any

import torch
from torch import nn

from peft_lntune.core.delta import PARAMETERS

__all__ = ["is_usual", "own_name", "own_parameter", "role_of"]

# Beside these, a norm may call its parameters anything: then the first is taken for the weight, and a run must agree.
_NAMES = {
    "weight": ("scale", "gamma", "g", "gain", "a_2", "a", "w", "alpha"),
    "bias": ("shift", "beta", "b", "b_2", "offset"),
}


def own_name(norm: nn.Module, parameter: str) -> str:
    """The name by which a norm has its `"weight"` or `"bias"`.

    Args:
        norm: a leaf that may be a norm.
        parameter: one of `PARAMETERS`.

    Returns:
        The attribute's name; `parameter` itself where the norm has no such parameter.

    Example:
        >>> norm = nn.Module()
        >>> norm.gamma = nn.Parameter(torch.ones(4))
        >>> own_name(norm, "weight"), own_name(norm, "bias")
        ('gamma', 'bias')
    """
    held = norm._parameters
    if parameter in held or parameter in norm.__dict__:
        return parameter
    # FSDP takes parameters out of the registry while the forward runs, and leaves tensors in the instance.
    for name in _NAMES[parameter]:
        if held.get(name) is not None or isinstance(norm.__dict__.get(name), torch.Tensor):
            return name
    strange = [name for name, value in held.items() if value is not None and not is_usual(name)]
    if parameter == "bias" and own_name(norm, "weight") in strange:
        strange = strange[1:]
    return strange[0] if strange else parameter


def own_parameter(norm: nn.Module, parameter: str) -> Any:
    """The weight or bias of a norm, or None; typed loosely since torch types every attribute as tensor or module."""
    return getattr(norm, own_name(norm, parameter), None)


def role_of(norm: nn.Module, name: str) -> str:
    """The inverse of `own_name`: `"weight"` or `"bias"` for the norm's own name of it, and other names as they are."""
    return next((parameter for parameter in PARAMETERS if own_name(norm, parameter) == name), name)


def is_usual(name: str) -> bool:
    """Whether a norm's weight or bias often has this name."""
    return any(name == parameter or name in names for parameter, names in _NAMES.items())
