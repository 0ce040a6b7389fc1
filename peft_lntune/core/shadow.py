"""Let something else stand in place of a module's attributes for the length of a call.

The instance's `__dict__` is where Python looks first; `nn.Module.__getattr__` is asked only when a name is not there.
So an entry in it shadows a registered parameter, in one graph of torch.compile too, and where FSDP keeps entries.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["call_hooked", "shadowed"]

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
    return shadowed(norm, {"forward": forward}, norm, x, *args, **kwargs)


def shadowed(
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
        >>> shadowed(norm, {"bias": torch.ones(2)}, norm, torch.zeros(1, 2))
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
