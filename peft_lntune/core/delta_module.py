"""The delta of one base parameter: one small module per adapter and parameter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.cache import TensorState, is_traced, is_valid, state_of
from peft_lntune.core.delta import ParameterSlice, effective, never_narrowed, pack_bits, scatter, unpack_bits
from peft_lntune.core.override import runs_own_forward
from peft_lntune.core.rebuild import is_plain, unwritten
from peft_lntune.errors import UnsupportedError

__all__ = ["Delta"]


class Delta(nn.Module):
    """A trainable delta of one base parameter; its forward turns the base into the effective parameter.

    `weight` is the trainable tensor: dense, of the shape of the base, or 1-D with the chosen entries only. So the
    optimizer, weight decay, PEFT's counts and FSDP's wrapping rules see what is tuned and nothing else.

    Args:
        shape: shape of the base parameter.
        dtype: dtype of the delta, see `peft_lntune.core.delta.delta_dtype`.
        device: where the delta lives.
        count: number of tuned entries, or None for all of them. The mask itself comes with `set_mask`, or is loaded.
        block: the part of the parameter to tune, if not all of it; without a mask the delta has its shape.

    Example:
        >>> delta = Delta(torch.Size([4]), torch.float32)
        >>> delta(torch.ones(4, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    mask: Tensor | None
    stored = "weight"  # the tensor that the delta is in

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device | None = None,
        count: int | None = None,
        block: ParameterSlice | None = None,
    ) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.block = block if count is None else None
        whole = self.shape if block is None else block.shape_in(self.shape)
        size = whole if count is None else (count,)
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        bits = None if count is None else torch.zeros(-(-self.shape.numel() // 8), dtype=torch.uint8, device=device)
        self.register_buffer("mask", bits)
        self._index: tuple[TensorState, Tensor] | None = None

    @classmethod
    def masked(cls, mask: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> "Delta":
        """Make a zero delta of the chosen entries; a dense one where all entries are chosen.

        Args:
            mask: bool, of the shape of the base, True for entries to tune.
            dtype: dtype of the delta.
            device: device of the delta.

        Returns:
            The delta.
        """
        if mask.all():
            return cls(mask.shape, dtype, device)
        delta = cls(mask.shape, dtype, device, count=int(mask.sum()))
        delta.mask = pack_bits(mask.to(device))
        return delta

    def forward(self, base: Tensor) -> Tensor:
        return effective(base, self.weight, self.index, self.block)

    def with_rebuild(self, base: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """The effective parameter, and a function that recomputes its values from the base in a backward pass.

        Args:
            base: the base parameter.

        Returns:
            The parameter and the function; None for the function where the delta may be sharded or has hooks.
        """
        value = self(base)
        if type(self) is not Delta or not runs_own_forward(self) or not is_plain(self, "weight"):
            return value, None
        read, index, block = unwritten(self.weight), self.index, self.block
        return value, lambda base: effective(base, read(), index, block)

    def merged_value(self, base: Tensor) -> Tensor:
        """The effective parameter that merging writes: the same as in a forward pass."""
        return self(base)

    @property
    def index(self) -> Tensor | None:
        """Flat positions of the tuned entries, `(k,)` int64; None when all are tuned. Cached until the mask changes.

        Raises:
            UnsupportedError: the mask chooses no entry, because it was never loaded.
        """
        if self.mask is None:
            return None
        if torch.compiler.is_compiling():
            # A graph cannot read addresses or versions, and the result of nonzero has no known shape there. A stable
            # sort gives the same positions in a known shape.
            bits = unpack_bits(self.mask, self.shape).reshape(-1).to(torch.uint8)
            return bits.argsort(descending=True, stable=True)[: self.weight.numel()]
        if self._index is None or not is_valid(self._index[0]):
            source = state_of(self, "mask")
            with torch.inference_mode(False):  # the cached index may be needed in a graph later
                index = unpack_bits(self.mask, self.shape).reshape(-1).nonzero().reshape(-1)
            if not len(index):
                raise UnsupportedError(
                    "a masked delta was made for values and a mask from a file, and these were never loaded. Load the "
                    "adapter with PeftModel.from_pretrained, or make a new one from config.unmasked()."
                )
            if is_traced():
                return index
            self._index = source, index
        return self._index[1]

    def train(self, mode: bool = True) -> "Delta":
        self._index = None  # a write to the mask through `.data` leaves no trace
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Delta":
        return super()._apply(never_narrowed(fn), recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}

    def dense(self) -> Tensor:
        """The delta in the shape of the base, zero where nothing is tuned; detached."""
        values = self.weight.detach()
        if self.block is not None:
            return self.block.add_to(values.new_zeros(self.shape), values)
        index = self.index
        return values if index is None else scatter(values, index, self.shape)

    def tuned(self) -> Tensor:
        """Bool, in the shape of the base: which entries are tuned."""
        if self.block is not None:
            ones = torch.ones_like(self.weight, dtype=torch.uint8)
            return self.block.add_to(ones.new_zeros(self.shape), ones).bool()
        if self.mask is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.weight.device)
        return unpack_bits(self.mask, self.shape)

    @torch.no_grad()
    def fill(self, dense: Tensor) -> None:
        """Copy the tuned entries of a dense delta into this one, in place.

        Args:
            dense: the values, of the shape of the base.
        """
        if self.block is not None:
            self.weight.copy_(self.block.of(dense))
            return
        index = self.index
        self.weight.copy_(dense if index is None else dense.reshape(-1)[index])

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, tuned={self.weight.numel()}, dtype={self.weight.dtype}"
