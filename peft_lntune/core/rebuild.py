"""Keep for the backward pass what a tensor is made from, and make it again there, instead of keeping the tensor.

`base + delta` costs one addition to make again. Kept for the backward pass, it would take as much memory as the base.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lntune.core.cache import is_traced

__all__ = ["can_rebuild", "is_plain", "rebuilt_in_backward", "unwritten"]


def can_rebuild() -> bool:
    """Whether operations run now for a backward pass that may make tensors again; compilers decide that themselves.

    Example:
        >>> can_rebuild()
        True
    """
    if is_traced() or not torch.is_grad_enabled():  # what follows, Dynamo does not know
        return False
    hooks_allowed: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return hooks_allowed


def is_plain(module: nn.Module, name: str) -> bool:
    """Whether a module holds an ordinary parameter of this name, whose memory will be there in a backward pass.

    Sharding puts subclasses in its place, or views into the module's `__dict__`.

    Args:
        module: the owner.
        name: of the parameter.

    Example:
        >>> is_plain(nn.LayerNorm(2), "weight")
        True
    """
    tensor = module._parameters.get(name)
    return (
        name not in module.__dict__
        and tensor is not None
        and type(tensor) in (Tensor, nn.Parameter)
        and not (tensor.is_meta or tensor.is_inference())
    )


def unwritten(tensor: Tensor) -> Callable[[], Tensor]:
    """A function that returns the values of a tensor, detached, while nothing has written to them.

    As autograd does with the tensors that it saves. An assignment to `tensor.data` leaves the values of before to this
    function. What no version counts is not seen, as by autograd: fused optimizers, and writes through `tensor.data`.

    Args:
        tensor: any shape.

    Returns:
        A function without arguments. It raises a `RuntimeError` after the tensor has been written to.

    Example:
        >>> values = torch.zeros(2)
        >>> read = unwritten(values)
        >>> read()
        tensor([0., 0.])
    """
    alias = tensor.detach()
    version = alias._version

    def read() -> Tensor:
        if alias._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(alias.shape)} is at version {alias._version}, and was at {version} in the "
                "forward pass. Call backward before the optimizer's step."
            )
        return alias

    return read


class _View(NamedTuple):
    """A tensor in the memory of one that is made again."""

    make: Callable[[], Tensor]
    made_stride: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def tensor(self) -> Tensor:
        with torch.no_grad():
            made = self.make()
            if made.stride() != self.made_stride:
                other = torch.empty_strided(made.shape, self.made_stride, dtype=made.dtype, device=made.device)
                made = other.copy_(made)
        return made.as_strided(self.size, self.stride, self.offset)


@contextmanager
def rebuilt_in_backward(values: Iterable[tuple[Tensor, Callable[[], Tensor]]]) -> Iterator[None]:
    """Operations in this context save some tensors, and views of them, as functions that make them again.

    Everything else is saved as it would be without: by the hooks of a context around this one (gradient checkpointing,
    `save_on_cpu`), or as autograd does.

    Args:
        values: each tensor, the only one in its memory, with a function that returns one of the same values. It holds
            on to what the tensor is made from, not to the tensor, and is called without gradients whenever a backward
            pass needs the values.

    Example:
        >>> x, base = torch.ones(2, requires_grad=True), torch.tensor([1.0, 2.0])
        >>> doubled = base * 2
        >>> with rebuilt_in_backward([(doubled, lambda: base * 2)]):
        ...     y = (x * doubled).sum()
        >>> y.backward()
        >>> x.grad
        tensor([2., 4.])
    """
    makes = {value.untyped_storage()._cdata: (make, value.stride()) for value, make in values}
    # Of several contexts, autograd asks the innermost alone.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: Tensor) -> Any:
        if type(tensor) is Tensor and tensor.layout is torch.strided:
            found = makes.get(tensor.untyped_storage()._cdata)
            if found is not None:
                return _View(*found, tensor.size(), tensor.stride(), tensor.storage_offset())
        return unwritten(tensor) if outer is None else outer[0](tensor)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _View):
            return packed.tensor()
        found: Tensor = packed() if outer is None else outer[1](packed)
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
