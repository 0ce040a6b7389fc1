"""Whether a value computed from tensors may be cached, and for how long.

A value is cached only while none of its source tensors can be trained. Neither a fused optimizer nor a write through
`tensor.data` changes the version of a tensor, so a change in training cannot be detected. Frozen sources are compared:
each must be the same tensor, at the same address, in the same version.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["TensorState", "is_traced", "is_valid", "state_of", "states_of"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class TensorState(NamedTuple):
    """A tensor of a module, in its state when a value was computed from it.

    Attributes:
        owner: the dict of the module that holds the tensor, `_parameters` or `_buffers`.
        name: its name there.
        tensor: the tensor; None where no value computed from it may be cached.
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
        The state. Its `tensor` is None where no value computed from the tensor may be cached: it can be trained, counts
        no versions, is of a tensor subclass (shards, fake tensors), or is overridden in the instance.

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
    # An optimizer steps where there is a gradient, even if `requires_grad` is off by now.
    if not known or tensor.requires_grad or tensor.grad is not None:
        return TensorState(owner, name, None)
    return TensorState(owner, name, tensor, tensor.data_ptr(), tensor._version)


def states_of(module: nn.Module) -> list[TensorState]:
    """Every parameter and buffer of a module, as it is now.

    Args:
        module: the module; tensors of its children are left out.

    Returns:
        One state per tensor, parameters first.

    Example:
        >>> [state.name for state in states_of(nn.LayerNorm(2))]
        ['weight', 'bias']
    """
    held = (*module._parameters.items(), *module._buffers.items())
    return [state_of(module, name) for name, tensor in held if tensor is not None]


def is_valid(*states: TensorState) -> bool:
    """Whether tensors are still the same, in the same memory, unchanged and frozen.

    Args:
        *states: states of the tensors when a value was computed from them.

    Returns:
        True where the value may be used again.

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
    """Whether operations of this thread are being compiled, exported, traced, faked or transformed.

    Returns:
        True where values are not real or belong to a graph, so that none of them may be cached.

    Example:
        >>> is_traced()
        False
    """
    # The cheapest call for each; exports without Dynamo are seen by their dispatch modes.
    if torch.compiler.is_dynamo_compiling() or torch._C._is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack():  # some mode is on, perhaps one that only counts operations
        mode, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
        if any(mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)):
            return True
    return torch._C._functorch.peek_interpreter_stack() is not None
