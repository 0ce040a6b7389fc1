"""Many adapters as few tensors: all parameters of one shape in one stack, an adapter a row.

A stack is `(rows, k, *shape)`: k parameters of that shape, such as the weight and bias of every norm. So a batch costs
one gather for each shape, whatever the number of adapters, and adding an adapter writes one row of each stack.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_lntune.routing.route import Rows

__all__ = ["Stack", "Stacks", "as_rows", "spread"]


class Stack(NamedTuple):
    """The parameters of one shape and dtype on one device, `(rows, k, *shape)`, in the order of `names`."""

    names: tuple[str, ...]
    values: Tensor


class Stacks:
    """Stacks for a set of named tensors. Rows are written whole before they are read; nothing else is promised of them.

    A stack that grows is copied and exchanged, so what was gathered from it, or still holds on to it, stays as it was.
    Not for two threads at once; the caller has a lock.

    Args:
        like: tensors by name; shapes, devices and, without `dtype`, dtypes are taken from them.
        rows: how many rows to start with.
        dtype: of the stacks; None: each tensor's own.
        device: of the stacks; None: each tensor's own.

    Example:
        >>> stacks = Stacks({"a.weight": torch.ones(4), "a.bias": torch.ones(4)}, rows=3)
        >>> [tuple(stack.values.shape) for stack in stacks]
        [(3, 2, 4)]
    """

    def __init__(
        self,
        like: Mapping[str, Tensor],
        rows: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[str]] = {}
        for name, tensor in like.items():
            groups.setdefault((tensor.shape, dtype or tensor.dtype, device or tensor.device), []).append(name)
        # Not zeros: pages of memory that no adapter has written are never touched.
        self._stacks = [
            Stack(tuple(names), _new(rows, torch.Size((len(names), *shape)), dtype, device))
            for (shape, dtype, device), names in groups.items()
        ]
        self.rows = rows

    def __iter__(self):
        return iter(self._stacks)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all stacks."""
        return sum(stack.values[0].numel() * stack.values.itemsize for stack in self._stacks)

    @torch.no_grad()
    def grow(self, rows: int) -> None:
        """Make room for at least so many rows, by doubling; the rows there are stay the same."""
        size = self.rows
        while size < rows:
            size *= 2
        if size == self.rows:
            return
        grown = []
        for stack in self._stacks:
            values = _new(size, stack.values.shape[1:], stack.values.dtype, stack.values.device)
            values[: self.rows].copy_(stack.values)
            grown.append(Stack(stack.names, values))
        self._stacks, self.rows = grown, size

    @torch.no_grad()
    def write(self, slots: Sequence[int], blocks: Sequence[Tensor]) -> None:
        """Write rows.

        Args:
            slots: which rows, n of them.
            blocks: for each stack its rows `(n, k, *shape)`, as `as_rows` makes them.
        """
        for stack, block in zip(self._stacks, blocks, strict=True):
            values = block.to(stack.values.device, stack.values.dtype)
            if list(slots) == list(range(slots[0], slots[0] + len(slots))):
                stack.values[slots[0] : slots[0] + len(slots)].copy_(values)
            else:
                stack.values.index_copy_(0, torch.tensor(slots, device=values.device), values)

    def read(self, slot: int) -> dict[str, Tensor]:
        """A copy of one row, by name."""
        return {
            name: value.clone()
            for stack in self._stacks
            for name, value in zip(stack.names, stack.values[slot], strict=True)
        }

    def follow(self, like: Mapping[str, Tensor]) -> None:
        """Move each stack to where its tensors are by now; a stack that is moved is a new tensor."""
        self._stacks = [Stack(names, values.to(like[names[0]].device)) for names, values in self._stacks]

    def gather(self, index: Tensor) -> list[Tensor]:
        """Rows `index` `(B,)` of every stack, `(B, k, *shape)` each; copies, so that rows may be written afterwards."""
        return [stack.values.index_select(0, index.to(stack.values.device)) for stack in self._stacks]


def as_rows(stacks: Stacks, adapters: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The named tensors of n adapters as rows for `stacks`, `(n, k, *shape)` each; zero where an adapter has none.

    Example:
        >>> stacks = Stacks({"a.weight": torch.ones(2), "a.bias": torch.ones(2)}, rows=1)
        >>> as_rows(stacks, [{"a.bias": torch.tensor([3.0, 4.0])}])
        [tensor([[[0., 0.],
                 [3., 4.]]])]
    """
    blocks = []
    for names, values in stacks:
        block = torch.zeros(len(adapters), *values.shape[1:], dtype=values.dtype)
        for row, tensors in zip(block, adapters, strict=True):
            for place, name in zip(row, names, strict=True):
                if name in tensors:
                    place.copy_(tensors[name])
        blocks.append(block)
    return blocks


def spread(
    stacks: Stacks, gathered: Sequence[Tensor], owners: Mapping[str, tuple[int, str]], factor: int = 1
) -> dict[int, Rows]:
    """Rows of stacks as rows of norms.

    Args:
        stacks: where they come from.
        gathered: `(B, k, *shape)` for each stack.
        owners: by the name of a parameter, the number of its norm and which of the norm's parameters it is.
        factor: how often each row is repeated, as generation repeats the samples.

    Returns:
        Rows `(factor * B, 1, *shape)` by the number of the norm.

    Example:
        >>> stacks = Stacks({"a.weight": torch.ones(2), "a.bias": torch.ones(2)}, rows=1)
        >>> rows = spread(stacks, [torch.ones(3, 2, 2)], {"a.weight": (0, "weight"), "a.bias": (0, "bias")})
        >>> rows[0].bias.shape
        torch.Size([3, 1, 2])
    """
    found: dict[int, dict[str, Tensor]] = {}
    for stack, each in zip(stacks, gathered, strict=True):
        rows = each if factor == 1 else each.repeat_interleave(factor, 0)
        for name, own in zip(stack.names, rows.unsqueeze(2).unbind(1), strict=True):
            number, parameter = owners[name]
            found.setdefault(number, {})[parameter] = own
    return {number: Rows(**parameters) for number, parameters in found.items()}


def _new(rows: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    # What is made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.empty(rows, *shape, dtype=dtype, device=device)
