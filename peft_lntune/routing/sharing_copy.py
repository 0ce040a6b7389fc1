"""A copy of a model that shares its tensors, to be run on the side: nothing that it does is seen by the model."""

import copy
from typing import Any

from torch import nn

__all__ = ["sharing_copy"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_WORKING = ("torch", "peft", "peft_lntune", "accelerate")
"""Packages whose hooks are a part of what a module computes; hooks of others watch it, as a rule."""


def sharing_copy(module: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of a module that shares its parameters and buffers, in evaluation mode and without the hooks of users.

    Args:
        module: of any kind; it is not changed.

    Returns:
        The copy, and from the `id` of each module inside the given one to its copy.

    Raises:
        Exception: whatever `copy.deepcopy` raises where something in the module cannot be copied.

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
            # Of users' hooks the copy gets the same ones, which are taken away below: they may hold what is large.
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
