"""Let something else stand in place of a module's attributes for the length of a call.

The instance's `__dict__` is where Python looks first; `nn.Module.__getattr__` is asked only when a name is not there.
So an entry in it shadows a registered parameter, in one graph of torch.compile too, and where FSDP keeps entries.

The entry is put into a twin that shares everything else with the module, so that several threads may run one model.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.detour import forward_of

__all__ = ["call_hooked", "forward_with", "is_of_class", "overridden", "runs_own_forward", "twin"]

_MISSING = object()


def call_hooked(norm: nn.Module, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a module with another forward, so that the hooks on the module run around it.

    Args:
        norm: the module; afterwards its forward is its own again, also when `forward` raises.
        forward: called in place of the module's, as `forward(x, *args, **kwargs)`.
        x: the input.
        *args: passed on.
        **kwargs: passed on.

    Example:
        >>> call_hooked(nn.LayerNorm(2), lambda x: x + 1, torch.zeros(2))
        tensor([1., 1.])
    """
    return overridden(norm, {"forward": forward}, norm, x, *args, **kwargs)


def forward_with(
    module: nn.Module, entries: Mapping[str, Any], own: Callable[..., Tensor], /, *args: Any, **kwargs: Any
) -> Tensor:
    """Run a module's forward with other attributes, without touching the module.

    Args:
        module: the module.
        entries: attributes by name, usually parameters.
        own: its forward. Where that is not the one of its class (accelerate puts another into the instance), or while
            torch.compile traces, the module itself is shadowed instead, which is not for two threads at once.
        *args: passed on.
        **kwargs: passed on.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> forward_with(norm, {"bias": torch.ones(2)}, norm.forward, torch.zeros(1, 2)).tolist()
        [[1.0, 1.0]]
    """
    if not is_of_class(module, own) or torch.compiler.is_compiling():
        return overridden(module, entries, own, *args, **kwargs)
    return type(module).forward(twin(module, entries), *args, **kwargs)


def twin(module: nn.Module, entries: Mapping[str, Any]) -> nn.Module:
    """A module that shares all with another one, but for `entries` in place of its attributes.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> twin(norm, {"eps": 1.0}).weight is norm.weight
        True
    """
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    other.__dict__.update(entries)
    return other


def overridden(
    module: nn.Module, entries: Mapping[str, Any], function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call a function while `entries` stand in place of a module's attributes.

    They are put in the instance's `__dict__`, which Python asks first: parameters and methods can be shadowed, and what
    is registered is never touched.

    Args:
        module: afterwards it is as it was, also when `function` raises. Not for two threads at once.
        entries: attributes by name.
        function: called as `function(*args, **kwargs)`; usually the module itself, or its forward.
        *args: passed on.
        **kwargs: passed on.

    Returns:
        What `function` returns.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> overridden(norm, {"bias": torch.ones(2)}, norm, torch.zeros(1, 2))
        tensor([[1., 1.]], grad_fn=<NativeLayerNormBackward0>)
    """
    state = module.__dict__
    before = {key: state.get(key, _MISSING) for key in entries}
    try:
        state.update(entries)
        return function(*args, **kwargs)
    finally:
        for key, value in before.items():
            if value is _MISSING:
                state.pop(key, None)
            else:
                state[key] = value


def runs_own_forward(norm: nn.Module) -> bool:
    """Whether nothing is attached to this module that a call of its function alone would skip."""
    hooks = norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks
    if any(hooks):
        return False
    # A copy of a module that had a detour has its class's forward in the instance: that is nothing of its own.
    return "forward" not in norm.__dict__ or is_of_class(norm, forward_of(norm))


def is_of_class(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a forward is the one of the module's class, bound to this module or to a twin of it."""
    return getattr(forward, "__func__", None) is type(module).forward
