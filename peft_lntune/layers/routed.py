"""The stand-in for a parameter while every row of the batch has its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_lntune.errors import RoutingError

__all__ = ["RoutedParameter"]

# Attributes and methods that are the same for all rows. Everything else would compute with the value of one row.
_FACTS = {"size", "stride", "dim", "ndimension", "numel", "nelement", "__len__", "is_floating_point", "is_complex"}
_FACTS |= {"element_size", "is_contiguous", "get_device", "__hash__", "is_inference", "is_pinned", "type"}
_NO_FACTS = {"data", "T", "H", "mT", "mH", "real", "imag"}


class RoutedParameter(Tensor):
    """A parameter that differs per row: its shape, dtype and device can be read, any computation with it raises.

    torch's fused paths check for `__torch_function__` and, where a tensor has it, call the modules one by one, which is
    correct. Any other computation with it would use one adapter for all rows.
    """

    what: str

    @classmethod
    def like(cls, base: Tensor, what: str) -> "RoutedParameter":
        """Make a stand-in for a parameter.

        Args:
            base: tensor with the shape, dtype and device.
            what: name of the parameter, for the error.

        Returns:
            The stand-in.

        Example:
            >>> RoutedParameter.like(torch.ones(2), "the weight of norm").shape
            torch.Size([2])
        """
        found = base.detach().as_subclass(cls)
        found.what = what
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        getter = func.__name__ == "__get__"
        name = getattr(getattr(func, "__self__", None), "__name__", "") if getter else func.__name__
        if name not in _NO_FACTS if getter else name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        given += [part for found in given if type(found) in (list, tuple) for part in found]
        what = next((part.what for part in given if isinstance(part, cls)), "a parameter")
        raise RoutingError(
            f"{what} differs from row to row in this batch, but {name or func} computes with one value for all rows: "
            "some code reads the parameter instead of calling the layer, such as a fused kernel. Run this batch one "
            "adapter at a time with set_adapter, or apply the kernel to the module inside, layer.get_base_layer()."
        )
