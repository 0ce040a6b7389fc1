"""What a layer keeps while gradients are off: a call with effective parameters, and what that call is true of."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Kept", "Source", "source_of", "unchanged"]


class Source(NamedTuple):
    """A tensor that kept sums came from, and how it was then; `tensor` is None where that cannot be told."""

    owner: dict[str, Any]
    name: str
    tensor: Tensor | None
    data_ptr: int = 0
    version: int = 0


class Kept(NamedTuple):
    """A call with effective parameters, and what they are true of."""

    adapters: list[str]
    sources: list[Source]
    call: Callable[..., Tensor] | None


def source_of(module: nn.Module, name: str) -> Source:
    """The parameter `name` of `module` as it is now."""
    owner: Any = module._parameters if name in module._parameters else module._buffers
    tensor = owner.get(name)
    # Sharding or an outer layer may have put a tensor in the way, nobody's to keep; inference tensors have no version.
    if name in module.__dict__ or tensor is None or tensor.is_inference():
        return Source(owner, name, None)
    return Source(owner, name, tensor, tensor.data_ptr(), tensor._version)


def unchanged(source: Source) -> bool:
    """Whether a parameter is the same tensor in the same memory, not written to since; a few dict reads."""
    owner, name, tensor, data_ptr, version = source
    return (
        tensor is not None
        and tensor._version == version
        and tensor.data_ptr() == data_ptr
        and owner.get(name) is tensor
    )
