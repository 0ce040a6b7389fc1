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
    """A tensor of a module, as it was when a value was made of it.

    Attributes:
        owner: the dict of the module that holds the tensor, `_parameters` or `_buffers`.
        name: its name there.
        tensor: the tensor; None where nothing made of it may be kept.
        data_ptr: its address at the time.
        version: its version at the time.
    """

    owner: dict[str, Any]
    name: str
    tensor: Tensor | None
    data_ptr: int = 0
    version: int = 0


def state_of(module: nn.Module, name: str) -> TensorState:
    """A parameter or buffer of a module, as it is now.

    Args:
        module: the module that holds it.
        name: name of the parameter or buffer in the module.

    Returns:
        The state, whose `tensor` is None where nothing made of the tensor may be kept: it may be trained, counts no
        versions, is of a subclass with rules of its own (shards, fake tensors), or something stands in its place.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> state_of(norm, "weight").tensor is None  # it may be trained
        True
        >>> state_of(norm.requires_grad_(False), "weight").tensor is norm.weight
        True
    """
    owner: Any = module._parameters if name in module._parameters else module._buffers
    tensor = owner.get(name)
    known = type(tensor) in _PLAIN and name not in module.__dict__ and not tensor.is_inference()
    # With a gradient at hand an optimizer would step, whatever the flag says by now.
    if not known or tensor.requires_grad or tensor.grad is not None:
        return TensorState(owner, name, None)
    return TensorState(owner, name, tensor, tensor.data_ptr(), tensor._version)


def states_of(module: nn.Module) -> list[TensorState]:
    """Every parameter and buffer of a module, as it is now.

    Args:
        module: its own tensors are meant, not those of its children.

    Returns:
        One state per tensor, parameters first.

    Example:
        >>> [state.name for state in states_of(nn.LayerNorm(2))]
        ['weight', 'bias']
    """
    held = (*module._parameters.items(), *module._buffers.items())
    return [state_of(module, name) for name, tensor in held if tensor is not None]


def is_valid(*states: TensorState) -> bool:
    """Whether tensors are the same, in the same memory, not written to since, and still cannot be trained.

    Args:
        *states: the tensors as they were when something was made of them.

    Returns:
        True where what was made of them may be used again.

    Example:
        >>> norm = nn.LayerNorm(2).requires_grad_(False)
        >>> state = state_of(norm, "weight")
        >>> is_valid(state)
        True
        >>> norm.weight.add_(1)
        Parameter containing:
        tensor([2., 2.])
        >>> is_valid(state)
        False
    """
    for owner, name, tensor, data_ptr, version in states:  # a plain loop: it runs in every call of every layer
        if (
            tensor is None
            or tensor._version != version
            or tensor.requires_grad
            or tensor.grad is not None
            or tensor.data_ptr() != data_ptr
            or owner.get(name) is not tensor
        ):
            return False
    return True


def is_traced() -> bool:
    """Whether operations of this thread are compiled, exported, traced, faked or transformed just now.

    Returns:
        True where values are not real, or belong to a graph, so that nothing made of them may be kept.

    Example:
        >>> is_traced()
        False
    """
    # Each in the one call that costs least; what exports without Dynamo has modes on.
    if torch.compiler.is_dynamo_compiling() or torch._C._is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack():  # some mode is on, perhaps one that only counts operations
        mode, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
        if any(mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)):
            return True
    return torch._C._functorch.peek_interpreter_stack() is not None
