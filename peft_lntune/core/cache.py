"""What may be kept of a computation, and until when.

A value is kept only while nothing that it came from can be trained. Neither a fused optimizer nor a write through
`tensor.data` changes the version of a tensor, so nothing tells whether a tensor in training has changed. What cannot be
trained is compared too: it must be the same tensor, at the same address, in the same version.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["TensorState", "is_traced", "is_valid", "state_of", "states_of"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class TensorState(NamedTuple):
    """A tensor that a kept value came from, as it was then; `tensor` is None where nothing may be kept of it."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor | None
    data_ptr: int = 0
    version: int = 0


def state_of(module: nn.Module, name: str) -> TensorState:
    """The parameter or buffer `name` of `module` as it is now.

    Example:
        >>> norm = nn.LayerNorm(2).requires_grad_(False)
        >>> source = state_of(norm, "weight")
        >>> is_valid(source)
        True
        >>> is_valid(state_of(norm.requires_grad_(True), "weight"))  # it may be trained
        False
    """
    owner: Any = module._parameters if name in module._parameters else module._buffers
    tensor = owner.get(name)
    # Sharding or an outer layer may have put a tensor in the way; an inference tensor counts no versions; subclasses
    # (shards, fake tensors) have rules of their own.
    if name in module.__dict__ or type(tensor) not in _PLAIN or tensor.is_inference() or _can_be_trained(tensor):
        return TensorState(owner, name, None)
    return TensorState(owner, name, tensor, tensor.data_ptr(), tensor._version)


def states_of(module: nn.Module) -> list[TensorState]:
    """Every parameter and buffer that a module itself has."""
    held = (*module._parameters.items(), *module._buffers.items())
    return [state_of(module, name) for name, tensor in held if tensor is not None]


def is_valid(source: TensorState) -> bool:
    """Whether a source is the same tensor in the same memory, not written to since, and still cannot be trained."""
    owner, name, tensor, data_ptr, version = source
    return (
        tensor is not None
        and tensor._version == version
        and not _can_be_trained(tensor)
        and tensor.data_ptr() == data_ptr
        and owner.get(name) is tensor
    )


def _can_be_trained(tensor: Tensor) -> bool:
    # With a gradient at hand an optimizer would step, whatever the flag says by now.
    return tensor.requires_grad or tensor.grad is not None


def is_traced() -> bool:
    """Whether operations of this thread are compiled, exported, traced, faked or transformed just now.

    Example:
        >>> is_traced()
        False
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    mode, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    if mode(keys.FAKE) is not None or mode(keys.PROXY) is not None or mode(keys.FUNCTIONAL) is not None:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None
