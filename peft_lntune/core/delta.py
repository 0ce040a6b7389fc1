"""The formula of this package and the dtype it is computed in.

    effective = base + delta

The forward pass, merging, mixed batches and weighted sums all call these functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "PARAMETERS",
    "ParameterSlice",
    "delta_dtype",
    "effective",
    "never_narrowed",
    "pack_bits",
    "scatter",
    "unpack_bits",
]

PARAMETERS = ("weight", "bias")
"""The parameters of a module that can carry a delta."""


def delta_dtype(base_dtype: torch.dtype, override: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a delta: at least float32, whatever the dtype of the base model.

    Near 1 the spacing of bfloat16 is 2^-7, so an AdamW step of 1e-4 on a bfloat16 gain rounds to no step at all.
    A float32 delta keeps every such step.

    Args:
        base_dtype: dtype of the base parameter.
        override: dtype that the user asked for, or None.

    Returns:
        `override`, or the wider of `base_dtype` and float32.

    Example:
        >>> delta_dtype(torch.bfloat16), delta_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return override or torch.promote_types(base_dtype, torch.float32)


def never_narrowed(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap the function that `nn.Module._apply` calls per tensor, so that it casts no wide tensor to half precision.

    `model.to(torch.bfloat16)`, `model.half()` and Trainer's `bf16_full_eval` are meant for the model. A tensor in
    float32 or wider follows them to a device and keeps its dtype; a tensor made in half precision is cast as usual.

    Args:
        move: the function, such as `torch.Tensor.half`.

    Returns:
        A function of a tensor with the same effect, except for these casts.

    Example:
        >>> never_narrowed(torch.Tensor.bfloat16)(torch.ones(1)).dtype
        torch.float32
        >>> never_narrowed(torch.Tensor.float)(torch.ones(1, dtype=torch.float64)).dtype
        torch.float32
    """

    def moved(tensor: Tensor) -> Tensor:
        result = move(tensor)
        if result.dtype == tensor.dtype or _is_half(tensor.dtype) or not _is_half(result.dtype):
            return result
        return tensor.to(result.device)

    return moved


def _is_half(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and torch.finfo(dtype).bits < 32


class ParameterSlice(NamedTuple):
    """A part of a parameter along one axis, such as the queries in a fused projection.

    Attributes:
        axis: the axis along which the part is cut.
        ranges: start and stop of each range along the axis, in order.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]

    def shape_in(self, shape: torch.Size) -> torch.Size:
        """The shape of the part in a parameter.

        Args:
            shape: shape of the whole parameter.

        Returns:
            The shape of the part.

        Example:
            >>> ParameterSlice(0, ((0, 2), (4, 5))).shape_in(torch.Size([6, 3]))
            torch.Size([3, 3])
        """
        sizes = list(shape)
        sizes[self.axis] = sum(stop - start for start, stop in self.ranges)
        return torch.Size(sizes)

    def add_to(self, base: Tensor, values: Tensor) -> Tensor:
        """Add values at this part of a parameter.

        Args:
            base: the whole parameter.
            values: the values, of shape `shape_in(base.shape)`.

        Returns:
            A new tensor of the shape of `base`, in the wider of the two dtypes.
        """
        wide = base.to(torch.promote_types(base.dtype, values.dtype), copy=True)
        begin = 0
        for start, stop in self.ranges:
            wide.narrow(self.axis, start, stop - start).add_(values.narrow(self.axis, begin, stop - start))
            begin += stop - start
        return wide

    def put(self, base: Tensor, part: Tensor) -> Tensor:
        """Replace this part of a parameter.

        Args:
            base: the whole parameter.
            part: the new values, of shape `shape_in(base.shape)`.

        Returns:
            A new tensor of the shape and dtype of `base`.

        Example:
            >>> ParameterSlice(0, ((0, 1), (2, 3))).put(torch.arange(3), torch.tensor([7, 9]))
            tensor([7, 1, 9])
        """
        whole, begin = base.clone(), 0
        for start, stop in self.ranges:
            whole.narrow(self.axis, start, stop - start).copy_(part.narrow(self.axis, begin, stop - start))
            begin += stop - start
        return whole

    def of(self, base: Tensor) -> Tensor:
        """Cut this part out of a parameter.

        Args:
            base: the whole parameter.

        Returns:
            The part; a view of `base` where it is a single range.

        Example:
            >>> ParameterSlice(0, ((0, 1), (2, 3))).of(torch.arange(3))
            tensor([0, 2])
        """
        parts = [base.narrow(self.axis, start, stop - start) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)


def effective(base: Tensor, values: Tensor, index: Tensor | None = None, block: ParameterSlice | None = None) -> Tensor:
    """Base plus delta, in float32 or the wider of the two dtypes.

    Args:
        base: the base parameter, any shape.
        values: the delta; of the shape of `base`, or `(k,)` where `index` says which entries it tunes.
        index: `(k,)`, int64, positions in the flattened base; None for a dense delta.
        block: the part of the base that a dense delta changes; None: all of it.

    Returns:
        A new tensor of the shape of `base`.

    Example:
        >>> effective(torch.ones(3), torch.tensor([0.5]), torch.tensor([1]))
        tensor([1.0000, 1.5000, 1.0000])
    """
    if _is_half(base.dtype) and _is_half(values.dtype):  # their sum would be rounded to the spacing near 1
        base = base.to(torch.float32)
    if block is not None:
        return block.add_to(base, values)
    if index is None:
        return base + values
    wide = max(base.dtype, values.dtype, key=lambda dtype: dtype.itemsize)  # torch.promote_types is an operation
    if base.dim() == 1:  # as of most norms: one operation
        return base.to(wide).index_add(0, index, values.to(wide))
    return base.to(wide).reshape(-1).index_add(0, index, values.to(wide)).view(base.shape)


def scatter(values: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """The dense form of a masked delta.

    Args:
        values: the tuned values, `(k,)`.
        index: their positions in the flattened base, `(k,)` int64.
        shape: shape of the base.

    Returns:
        A tensor of `shape`, zero outside `index`.
    """
    return values.new_zeros(shape.numel()).index_copy(0, index, values).view(shape)


_EACH_BYTE = 0x0101010101010101
_BIT_OF_BYTE = 0x8040201008040201 - 2**64  # bit k of byte k, as int64 has it


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask, one bit per entry; the inverse of `unpack_bits`.

    Args:
        mask: bool, any shape of n entries.

    Returns:
        `(ceil(n / 8),)` uint8, lowest bit first.

    Example:
        >>> pack_bits(torch.tensor([True, False, True])).tolist()
        [5]
    """
    flat = torch.nn.functional.pad(mask.reshape(-1), (0, -mask.numel() % 8))
    # Eight entries are one int64: the product puts byte k of it at bit 56 + k, and nothing else up there.
    return ((flat.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """The bool mask of `shape` that `pack_bits` turned into bytes.

    Args:
        packed: `(ceil(n / 8),)` uint8, lowest bit first.
        shape: of n entries.

    Returns:
        bool, of `shape`.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), torch.Size([3])).tolist()
        [True, False, True]
    """
    bytes_of_bits = (packed.to(torch.int64) * _EACH_BYTE) & _BIT_OF_BYTE
    # From 0 or a power of two to 0 or 1: the sum sets the highest bit of each byte that is not 0.
    ones = ((bytes_of_bits + 0x7F * _EACH_BYTE) >> 7) & _EACH_BYTE
    return ones.view(torch.bool)[: shape.numel()].view(shape)
