"""Whether a value computed from tensors may be cached, and for how long.

A value is cached only while none of its source tensors can be trained, because a fused optimizer does not change the
version of a tensor. Frozen sources are compared: each must be the same tensor, at the same address, in the same
version. A write through `tensor.data`, by which a teacher follows its student, does not change the version either. So a
parameter from which a value was computed counts how often its `data` is asked for.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["ORDINARY", "TensorState", "is_traced", "is_valid", "stamp", "state_of", "states_of", "unwatch"]

_DATA: Any = Tensor.data


class _Watched(nn.Parameter):
    """A parameter that counts how often its `data` is read or replaced; `stamp` turns ordinary ones into it.

    Copies and pickles are ordinary parameters.
    """

    _lntune_reads = 0

    @property
    def data(self) -> Tensor:
        self._lntune_reads += 1
        found: Tensor = _DATA.__get__(self)
        return found

    @data.setter
    def data(self, value: Tensor) -> None:
        self._lntune_reads += 1
        _DATA.__set__(self, value)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self._ordinary(self.detach()))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        found: nn.Parameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._ordinary(self.detach()).__reduce_ex__(protocol)

    def _ordinary(self, values: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(values, self.requires_grad)
        parameter.__dict__.update({key: value for key, value in self.__dict__.items() if key != "_lntune_reads"})
        return parameter


ORDINARY = (Tensor, nn.Parameter, _Watched, nn.Buffer)
"""The types of tensors that are no subclass with rules of its own, such as shards and fake tensors."""


def stamp(tensor: Tensor) -> tuple[int, int, int]:
    """What changes whenever a frozen tensor is written. From now on, a parameter counts how often `data` is asked for.

    Args:
        tensor: a tensor of one of the `ORDINARY` types, made outside of inference mode.

    Returns:
        Its address, its version, and how often its `data` was asked for; 0 for tensors that are no parameters.

    Example:
        >>> weight = nn.Parameter(torch.ones(2), requires_grad=False)
        >>> before = stamp(weight)
        >>> weight.data.mul_(0.5)
        tensor([0.5000, 0.5000])
        >>> stamp(weight) == before
        False
    """
    if type(tensor) is nn.Parameter:
        tensor.__class__ = _Watched
    return tensor.data_ptr(), tensor._version, getattr(tensor, "_lntune_reads", 0)


def unwatch(tensor: Tensor) -> None:
    """Turn a parameter back into an ordinary one, as it can be trained now: torch's optimizers ask for its exact type.

    Args:
        tensor: any tensor; only what `stamp` changed is changed back. Values computed from it are no longer valid.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> _ = stamp(weight)
        >>> unwatch(weight)
        >>> type(weight) is nn.Parameter
        True
    """
    if type(tensor) is _Watched:
        tensor._lntune_reads += 1
        tensor.__class__ = nn.Parameter  # type: ignore[assignment]  # it is narrowed to the class it has now


class TensorState(NamedTuple):
    """A tensor of a module, in its state when a value was computed from it.

    Attributes:
        owner: the dict of the module that holds the tensor, `_parameters` or `_buffers`.
        name: its name there.
        tensor: the tensor; None where no value computed from it may be cached.
        data_ptr: its address at the time.
        version: its version at the time.
        reads: how often its `data` had been asked for, see `stamp`.
    """

    owner: dict[str, Any]
    name: str
    tensor: Tensor | None
    data_ptr: int = 0
    version: int = 0
    reads: int = 0


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
    known = type(tensor) in ORDINARY and name not in module.__dict__ and not tensor.is_inference()
    # An optimizer steps where there is a gradient, even if `requires_grad` is off by now.
    if not known or tensor.requires_grad or tensor.grad is not None:
        return TensorState(owner, name, None)
    return TensorState(owner, name, tensor, *stamp(tensor))


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
    for owner, name, tensor, data_ptr, version, reads in states:  # a plain loop: it runs in every call of every layer
        if (
            tensor is None
            or tensor._version != version
            or tensor.requires_grad
            or tensor.grad is not None
            or tensor.data_ptr() != data_ptr
            or getattr(tensor, "_lntune_reads", 0) != reads
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
