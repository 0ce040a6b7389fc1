"""Recompute a tensor in the backward pass from its sources, instead of saving it.

Recomputing `base + delta` costs one addition. Saved for the backward pass, it would take as much memory as the base.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lntune.core.cache import ORDINARY, is_traced

__all__ = ["can_rebuild", "is_plain", "rebuilt_in_backward", "unwritten"]


def can_rebuild() -> bool:
    """Whether a backward pass of the present operations may recompute tensors; compilers decide this themselves.

    Returns:
        True where gradients are on and nothing traces the operations or forbids hooks on saved tensors.

    Example:
        >>> can_rebuild()
        True
    """
    if is_traced() or not torch.is_grad_enabled():  # Dynamo does not support the next line
        return False
    hooks_allowed: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return hooks_allowed


def is_plain(module: nn.Module, name: str) -> bool:
    """Whether a module holds an ordinary parameter of this name, whose memory exists until the backward pass.

    Sharding replaces parameters by subclasses, or puts views into the module's `__dict__`.

    Args:
        module: the owner.
        name: name of the parameter.

    Returns:
        True where it is an ordinary parameter.

    Example:
        >>> is_plain(nn.LayerNorm(2), "weight")
        True
    """
    tensor = module._parameters.get(name)
    return (
        name not in module.__dict__
        and tensor is not None
        and type(tensor) in ORDINARY
        and not (tensor.is_meta or tensor.is_inference())
    )


def unwritten(tensor: Tensor) -> Callable[[], Tensor]:
    """Make a function that returns the values of a tensor, detached, and checks that they have not been overwritten.

    The check is that of autograd for saved tensors, and has the same limits: writes by fused optimizers and through
    `tensor.data` are not detected. After an assignment to `tensor.data` the function still returns the old values.

    Args:
        tensor: a tensor of any shape.

    Returns:
        A function without arguments. It raises a `RuntimeError` if the tensor has been overwritten.

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
    """A view of a tensor that is recomputed."""

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
    """Inside this context, operations save functions that recompute some tensors, instead of these tensors.

    This applies to views of the tensors too. Other tensors are saved as usual: by the hooks of an outer context
    (gradient checkpointing, `save_on_cpu`) or by autograd.

    Args:
        values: each tensor, which must not share its memory, with a function that returns an equal tensor. The function
            must refer to the sources of the tensor, not to the tensor itself; it is called without gradients whenever a
            backward pass needs the values.

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
    # autograd uses the hooks of the innermost context only.
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
