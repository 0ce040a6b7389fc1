"""Modules that accelerate offloads: their parameters are on meta, except while their own forward runs.

accelerate puts a forward of its own into each such module, which loads the parameters, runs the module's forward and
takes them away again (`cpu_offload`, `disk_offload`, a `device_map` with "cpu" or "disk"). Code that reads the
parameters of such a module from outside must load them first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import named_module_tensors
from torch import Tensor, nn

from peft_lntune.errors import UnsupportedError

__all__ = [
    "all_onloaded",
    "call_onloaded",
    "check_trainable",
    "device_of",
    "is_offloaded",
    "offload_hook",
    "onloaded",
    "stored_tensors",
]


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook of accelerate that offloads the parameters of this module; None where none does."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:  # asked in every forward pass
        return None
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((own for own in hooks if isinstance(own, AlignDevicesHook) and own.offload), None)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate offloads any module of a model."""
    return any(offload_hook(part) is not None for part in model.modules())


def device_of(module: nn.Module) -> torch.device | None:
    """The device on which this module computes: that of its parameters, also while they are offloaded.

    Returns:
        The device; None where the module has neither parameters nor buffers.

    Example:
        >>> device_of(nn.Linear(1, 1))
        device(type='cpu')
    """
    for part in module.modules():
        hook = offload_hook(part)
        if hook is not None:
            return torch.device(hook.execution_device)
        for tensor in [*part._parameters.values(), *part._buffers.values()]:
            if tensor is not None:
                return tensor.device
    return None


@contextmanager
def all_onloaded(module: nn.Module, keep: bool = False) -> Iterator[None]:
    """`onloaded` for a module and all that it holds: a tuner's layer, say, with its adapters and what it wraps."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(onloaded(part, keep))
        yield


@contextmanager
def onloaded(module: nn.Module, keep: bool = False) -> Iterator[None]:
    """Inside this context the parameters of a module are where it computes; nothing happens where they are already.

    Args:
        module: a leaf, or a module whose own parameters are meant; its children are left alone. Not for two threads at
            once, as accelerate's own forward is not.
        keep: whether what is written to the parameters inside stays. They are in CPU memory from then on, also where
            accelerate had them on disk.
    """
    if offload_hook(module) is None or not _is_away(module):
        yield
        return
    hook: Any = module._hf_hook
    hook.pre_forward(module)
    try:
        with _plain_forward(module):
            yield
        if keep:
            own: Any = offload_hook(module)
            own.weights_map = {name: tensor.detach().to("cpu") for name, tensor in named_module_tensors(module)}
    finally:
        hook.post_forward(module, None)


def call_onloaded(module: nn.Module, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a function while the parameters of a module are loaded, with arguments on the module's device.

    Args:
        module: as in `onloaded`.
        function: called as `function(*args, **kwargs)`; usually a layer around the module.
        args: moved to the module's device.
        kwargs: moved to the module's device.

    Returns:
        What the function returns, where the module's own output would be.
    """
    if offload_hook(module) is None or not _is_away(module):
        return function(*args, **kwargs)
    hook: Any = module._hf_hook
    result = None
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    try:
        with _plain_forward(module):
            result = function(*args, **kwargs)
    finally:
        result = hook.post_forward(module, result)
    return result


def check_trainable(label: str, trained: Iterable[nn.Module]) -> None:
    """Raise where modules that are trained are offloaded: a gradient would reach a copy that is thrown away.

    Args:
        label: where they are, for the message.
        trained: what an adapter trains there.

    Raises:
        UnsupportedError: one of them requires gradients and is offloaded.
    """
    for part in (part for module in trained for part in module.modules()):
        if offload_hook(part) is not None and any(p.requires_grad for p in part.parameters(recurse=False)):
            raise UnsupportedError(
                f"the adapter's own values at {label} are offloaded, so training would not change them. Dispatch or "
                "offload the base model first, and call get_peft_model afterwards."
            )


def stored_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of those tensors of a state dict that are offloaded, read from where accelerate keeps them.

    Args:
        model: the model that the state dict is from.
        tensors: its entries that are wanted; those that are not on meta are passed over.

    Returns:
        The values by name, on the CPU.
    """
    found = {}
    wanted = {name for name, tensor in tensors.items() if tensor.is_meta}
    for path, module in model.named_modules() if wanted else ():
        hook = offload_hook(module)
        for name, _ in named_module_tensors(module, recurse=hook.place_submodules) if hook is not None else ():
            key = f"{path}.{name}" if path else name
            if key in wanted and hook is not None and hook.weights_map is not None:
                found[key] = hook.weights_map[name].to("cpu")
    return found


def _is_away(module: nn.Module) -> bool:
    return any(tensor is not None and tensor.is_meta for tensor in module._parameters.values())


@contextmanager
def _plain_forward(module: nn.Module) -> Iterator[None]:
    """Put the module's own forward in the place of accelerate's, which would load once more, and unload at its end."""
    forward = module.__dict__["forward"]
    module.__dict__["forward"] = module._old_forward
    try:
        yield
    finally:
        module.__dict__["forward"] = forward
