"""A copy of a model that shares its tensors, for runs that leave the model unchanged."""

import copy
from typing import Any

from torch import nn

__all__ = ["sharing_copy"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_WORKING = ("torch", "peft", "peft_lntune", "accelerate", "transformers")
"""Packages whose hooks take part in what a module computes; hooks of others usually only watch it."""


def sharing_copy(module: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """Copy a module so that it shares parameters and buffers, in evaluation mode and without users' hooks.

    Args:
        module: any module; it is not changed.

    Returns:
        The copy, and a dict from the `id` of each module inside the given one to its copy.

    Raises:
        Exception: any error of `copy.deepcopy`, where a part of the module cannot be copied.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> copied, inside = sharing_copy(nn.Sequential(norm))
        >>> copied[0] is norm, copied[0].weight is norm.weight, inside[id(norm)] is copied[0]
        (False, True, True)
    """
    memo: dict[int, Any] = {}
    for each in module.modules():
        shared = [*each._parameters.values(), *each._buffers.values()]
        memo |= {id(tensor): tensor for tensor in shared if tensor is not None}
        for kind in _HOOKS:
            # Users' hooks are shared, not copied, since they may hold large objects; they are removed below.
            memo |= {id(hook): hook for hook in getattr(each, kind).values() if not _works(hook)}
    copied = copy.deepcopy(module, memo)
    for each in copied.modules():
        for kind in _HOOKS:
            hooks = getattr(each, kind)
            for key in [key for key, hook in hooks.items() if not _works(hook)]:
                del hooks[key]
        if "_old_forward" in each.__dict__ and not _works(each.__dict__.get("_hf_hook")):
            each.__dict__["forward"] = each.__dict__["_old_forward"]  # accelerate's hooks, of users' own classes
    return copied.eval(), memo


def _works(hook: Any) -> bool:
    function = getattr(hook, "func", hook)  # of a partial
    place = getattr(function, "__module__", None) or type(function).__module__
    return place.partition(".")[0] in _WORKING
