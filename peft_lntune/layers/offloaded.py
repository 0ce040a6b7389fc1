"""Modules offloaded by accelerate: their parameters are on meta, except while their forward runs.

accelerate puts a forward of its own into each such module, which loads the parameters, runs the module's forward and
offloads them again (`cpu_offload`, `disk_offload`, a `device_map` with "cpu" or "disk"). Code that reads the parameters
of such a module from outside must load them first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import named_module_tensors
from torch import Tensor, nn

from peft_lntune.core.module_tree import below
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
    """The accelerate hook that offloads the parameters of this module, or None."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:  # the fast path, taken in every forward pass
        return None
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((own for own in hooks if isinstance(own, AlignDevicesHook) and own.offload), None)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate offloads any module of a model."""
    return any(offload_hook(part) is not None for part in model.modules())


def device_of(module: nn.Module) -> torch.device | None:
    """The device on which this module computes: that of its parameters, also while they are offloaded.

    Args:
        module: any module.

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
    """Inside this context, the parameters of a module and of all modules inside it are loaded.

    Args:
        module: for example a tuner's layer with its adapters and the module it wraps.
        keep: whether values written to the parameters inside the context stay. They are then in CPU memory, even if
            they were offloaded to disk.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(onloaded(part, keep))
        yield


@contextmanager
def onloaded(module: nn.Module, keep: bool = False) -> Iterator[None]:
    """Inside this context, the parameters of a module are loaded on the device where it computes.

    Args:
        module: the module; the parameters of its children are not loaded. Not for two threads at once, like
            accelerate's own forward.
        keep: whether values written to the parameters inside the context stay. They are then in CPU memory, even if
            they were offloaded to disk.

    Yields:
        Nothing.
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
        module: the module; the parameters of its children are not loaded. Not for two threads at once.
        function: called as `function(*args, **kwargs)`; usually a layer around the module.
        args: positional arguments; moved to the module's device.
        kwargs: keyword arguments; moved to the module's device.

    Returns:
        The result of the function, on the device on which accelerate puts the module's output.
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
    """Check that no trained module is offloaded: its gradients would go to a temporary copy.

    Args:
        label: name of the module with the adapter, for the message.
        trained: modules of the adapter.

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
    """Read the values of offloaded tensors of a state dict from accelerate's storage.

    Args:
        model: the model of the state dict.
        tensors: entries of the state dict; those that are not on meta are skipped.

    Returns:
        The values by name, on the CPU.
    """
    found = {}
    wanted = {name for name, tensor in tensors.items() if tensor.is_meta}
    for path, module in model.named_modules() if wanted else ():
        hook = offload_hook(module)
        for name, _ in named_module_tensors(module, recurse=hook.place_submodules) if hook is not None else ():
            key = below(path, name)
            if key in wanted and hook is not None and hook.weights_map is not None:
                found[key] = hook.weights_map[name].to("cpu")
    return found


def _is_away(module: nn.Module) -> bool:
    return any(tensor is not None and tensor.is_meta for tensor in module._parameters.values())


@contextmanager
def _plain_forward(module: nn.Module) -> Iterator[None]:
    """Inside this context, the module has its own forward in place of accelerate's, which would load it again."""
    forward = module.__dict__["forward"]
    module.__dict__["forward"] = module._old_forward
    try:
        yield
    finally:
        module.__dict__["forward"] = forward
