"""A norm's own names for its weight and bias: `gamma` and `beta`, `scale` and `shift`, `a_2` and `b_2`.

Configs, files and tables say weight and bias; code that reads a parameter of a norm looks up the name here.
"""

from typing import Any

import torch
from torch import nn

from peft_lntune.core.delta import PARAMETERS

__all__ = ["is_usual", "own_name", "own_parameter", "role_of", "spellings"]

# A norm may use other names: then its first parameter is taken for the weight, which a run must confirm.
_NAMES = {
    "weight": ("scale", "gamma", "g", "gain", "a_2", "a", "w", "alpha"),
    "bias": ("shift", "beta", "b", "b_2", "offset"),
}


def own_name(norm: nn.Module, parameter: str) -> str:
    """The attribute that holds a norm's weight or bias.

    Args:
        norm: a leaf that may be a norm.
        parameter: `"weight"` or `"bias"`.

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
    # While the forward runs, FSDP removes parameters from the registry and puts tensors into the instance.
    for name in _NAMES[parameter]:
        if held.get(name) is not None or isinstance(norm.__dict__.get(name), torch.Tensor):
            return name
    strange = [name for name, value in held.items() if value is not None and not is_usual(name)]
    if parameter == "bias" and own_name(norm, "weight") in strange:
        strange = strange[1:]
    return strange[0] if strange else parameter


def own_parameter(norm: nn.Module, parameter: str) -> Any:
    """The weight or bias of a norm.

    Args:
        norm: a leaf that may be a norm.
        parameter: `"weight"` or `"bias"`.

    Returns:
        The tensor or None. The type is loose because torch types every attribute as tensor or module.
    """
    return getattr(norm, own_name(norm, parameter), None)


def role_of(norm: nn.Module, name: str) -> str:
    """Whether an attribute of a norm is its weight or its bias; the inverse of `own_name`.

    Args:
        norm: a leaf that may be a norm.
        name: the attribute's name.

    Returns:
        `"weight"` or `"bias"`; `name` itself where it is neither.
    """
    return next((parameter for parameter in PARAMETERS if own_name(norm, parameter) == name), name)


def is_usual(name: str) -> bool:
    """Whether a norm's weight or bias often has this name."""
    return any(name == parameter or name in names for parameter, names in _NAMES.items())


def spellings(parameter: str) -> tuple[str, ...]:
    """The usual names of a norm's weight or bias.

    Args:
        parameter: `"weight"` or `"bias"`.

    Returns:
        The parameter itself, then its other names.

    Example:
        >>> spellings("bias")[:3]
        ('bias', 'shift', 'beta')
    """
    return (parameter, *_NAMES[parameter])
