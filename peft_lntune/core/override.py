"""Override attributes of a module for the duration of a call.

Python looks in the instance's `__dict__` first and calls `nn.Module.__getattr__` only for names that are not there. An
entry in it therefore overrides a registered parameter, also under torch.compile and FSDP.

Where possible, the entries go into a shallow copy of the module, so that several threads can run one model.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.detour import forward_of
from peft_lntune.errors import UnsupportedError

__all__ = [
    "call_hooked",
    "check_not_computed",
    "copy_with",
    "forward_with",
    "is_of_class",
    "overridden",
    "runs_own_forward",
]

_MISSING = object()
_COMPUTED = (
    "the {name} of {module} is computed from other tensors in each call, so a change of it would be lost. Make it "
    "permanent before adding an adapter: torch.nn.utils.parametrize.remove_parametrizations, prune.remove, "
    "remove_weight_norm or remove_spectral_norm."
)


def call_hooked(
    norm: nn.Module, forward: Callable[..., Tensor], read: Mapping[str, Tensor | None], /, *args: Any, **kwargs: Any
) -> Tensor:
    """Call a module with another forward, so that the hooks on the module run around it.

    Args:
        norm: the module; afterwards it has its own forward again, also when `forward` raises. Not for two threads at
            once.
        forward: called in place of the module's, as `forward(*args, **kwargs)`; it finds the module's own parameters.
        read: what hooks find as parameters of the module, by name, rounded to their dtypes; where the module has no
            parameter of a name, or none is given, nothing changes.
        *args: passed on.
        **kwargs: passed on.

    Returns:
        The output of `forward`, as the hooks leave it.

    Example:
        >>> call_hooked(nn.LayerNorm(2), lambda x: x + 1, {}, torch.zeros(2))
        tensor([1., 1.])
    """
    # A parameter that a hook makes anew in each call, or that FSDP puts into the instance, stays what they make it.
    own, seen = {}, {}
    for name, value in read.items():
        parameter = None if name in norm.__dict__ else norm._parameters.get(name)
        if value is not None and parameter is not None:
            own[name], seen[name] = parameter, value.to(parameter.dtype)

    def inside(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = overridden(norm, own, forward, *args, **kwargs)
        return result

    result: Tensor = overridden(norm, {"forward": inside if own else forward, **seen}, norm, *args, **kwargs)
    return result


def forward_with(
    module: nn.Module, entries: Mapping[str, Any], own: Callable[..., Tensor], /, *args: Any, **kwargs: Any
) -> Tensor:
    """Run a module's forward with other attributes; hooks do not run.

    Args:
        module: the module; afterwards it is as it was.
        entries: attributes by name, usually parameters.
        own: its forward. Where this is not the forward of its class (accelerate puts another into the instance), or
            while torch.compile traces, the module itself is changed for the call: not for two threads at once.
        *args: passed on.
        **kwargs: passed on.

    Returns:
        The output of the forward.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> forward_with(norm, {"bias": torch.ones(2)}, norm.forward, torch.zeros(1, 2)).tolist()
        [[1.0, 1.0]]
    """
    if not is_of_class(module, own) or torch.compiler.is_compiling():
        return overridden(module, entries, own, *args, **kwargs)
    return type(module).forward(copy_with(module, entries), *args, **kwargs)


def copy_with(module: nn.Module, entries: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of a module with other attributes.

    Args:
        module: the module; the copy shares its tensors and children.
        entries: attributes by name.

    Returns:
        The copy.

    Raises:
        UnsupportedError: an attribute is a property, which would hide the entry.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> copy = copy_with(norm, {"eps": 1.0})
        >>> copy.eps, copy.weight is norm.weight
        (1.0, True)
    """
    _refuse_properties(module, entries)
    copy = object.__new__(type(module))
    state = copy.__dict__
    state.update(module.__dict__)
    state.update(entries)
    return copy


def overridden(
    module: nn.Module, entries: Mapping[str, Any], function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call a function while a module has other attributes.

    The entries go into the instance's `__dict__`, where Python looks first. Registered parameters are not touched.

    Args:
        module: afterwards it is as it was, also when `function` raises. Not for two threads at once.
        entries: attributes by name.
        function: called as `function(*args, **kwargs)`; usually the module itself, or its forward.
        *args: passed on.
        **kwargs: passed on.

    Returns:
        What `function` returns.

    Raises:
        UnsupportedError: an attribute is a property, which would hide the entry, or was replaced during the call.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> overridden(norm, {"bias": torch.ones(2)}, norm, torch.zeros(1, 2))
        tensor([[1., 1.]], grad_fn=<NativeLayerNormBackward0>)
    """
    _refuse_properties(module, entries)
    state = module.__dict__
    before = {key: state.get(key, _MISSING) for key in entries}
    try:
        state.update(entries)
        result = function(*args, **kwargs)
        for key, value in entries.items():
            if state.get(key, _MISSING) is not value:
                raise UnsupportedError(_COMPUTED.format(name=key, module=f"a {type(module).__name__}"))
        return result
    finally:
        for key, value in before.items():
            if value is _MISSING:
                state.pop(key, None)
            else:
                state[key] = value


def check_not_computed(module: nn.Module, name: str, label: str) -> None:
    """Check that a tensor of a module is not made from others, by a parametrization or by a hook before each call.

    Args:
        module: the module.
        name: the attribute that holds the tensor, a parameter or a buffer.
        label: the name of the module, for the message.

    Raises:
        UnsupportedError: it is a tensor, but neither a parameter nor a buffer of the module.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> check_not_computed(layer, "bias", "layer")
        >>> check_not_computed(layer, "weight", "layer")
        Traceback (most recent call last):
        peft_lntune.errors.UnsupportedError: the weight of layer (ParametrizedLinear) is computed from other tensors ...
    """
    held = name in module._parameters or name in module._buffers
    if not held and isinstance(getattr(module, name, None), Tensor):
        raise UnsupportedError(_COMPUTED.format(name=name, module=f"{label} ({type(module).__name__})"))


def _refuse_properties(module: nn.Module, names: Iterable[str]) -> None:
    """Refuse what torch.nn.utils.parametrize computes: it makes a property of the class, which Python reads first."""
    kind = type(module)
    for name in names:
        if isinstance(getattr(kind, name, None), property):
            raise UnsupportedError(_COMPUTED.format(name=name, module=f"a {kind.__name__}"))


def runs_own_forward(module: nn.Module) -> bool:
    """Whether calling a module does no more than run the forward of its class.

    Args:
        module: the module. Detours are ignored.

    Returns:
        False where the module has hooks, or another forward in the instance.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> runs_own_forward(norm)
        True
        >>> norm.forward = lambda x: x
        >>> runs_own_forward(norm)
        False
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    # A copy of a module that had a detour has the forward of its class in the instance.
    return "forward" not in module.__dict__ or is_of_class(module, forward_of(module))


def is_of_class(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a forward is that of the module's class, bound to this module or to a copy of it.

    Args:
        module: the module.
        forward: a method, or any callable in its place.

    Returns:
        False for a function, a partial, or the method of another class.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> is_of_class(norm, norm.forward), is_of_class(norm, lambda x: x)
        (True, False)
    """
    return getattr(forward, "__func__", None) is type(module).forward
