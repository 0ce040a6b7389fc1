"""The parameters of many adapters as few tensors: all parameters of one shape in one stack.

A batch so costs one operation for each shape, whatever the number of norms and adapters. There are two kinds of stacks.
A bank and many tasks hold theirs (`Stacks`): an adapter is a row. A PeftModel holds a module for each adapter at each
norm, and makes the rows of the adapters that a batch names from these (`rows_of_layers`).

Tensors have names of the form `"<owner>.weight"` or `"<owner>.bias"`, where the owner is a norm.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BASE",
    "LayerTensor",
    "NormRows",
    "Stack",
    "Stacks",
    "as_rows",
    "one_dtype",
    "rows_of_layers",
    "spread",
    "unstacked",
]

BASE = "__base__"
"""The name that stands for the base model in a list of adapter names, as in PEFT."""


class Stack(NamedTuple):
    """Tensors of one shape, `(rows, k, *shape)`, in the order of their `k` names."""

    names: tuple[str, ...]
    values: Tensor


class NormRows(NamedTuple):
    """Parameters of one norm, a row for each sample of the batch: `(B, 1, *shape)`, or None where it has none.

    One row is for all samples.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


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
        kinds = {name: (tensor.shape, dtype or tensor.dtype, device or tensor.device) for name, tensor in like.items()}
        # Not zeros: pages of memory that no adapter has written are never touched.
        self._stacks = [
            Stack(names, _new(rows, torch.Size((len(names), *kinds[names[0]][0])), *kinds[names[0]][1:]))
            for names in _grouped(kinds)
        ]
        self.rows = rows

    def __iter__(self) -> Iterator[Stack]:
        return iter(self._stacks)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all stacks."""
        return sum(stack.values[0].numel() * stack.values.itemsize for stack in self._stacks)

    @torch.no_grad()
    def grow(self, rows: int) -> None:
        """Make room for more rows by doubling; the rows there are stay the same.

        Args:
            rows: for how many rows there must be room afterwards, at least.
        """
        size = self.rows
        while size < rows:
            size *= 2
        if size == self.rows:
            return
        grown = []
        for names, old in self._stacks:
            values = _new(size, old.shape[1:], old.dtype, old.device)
            values[: self.rows].copy_(old)
            grown.append(Stack(names, values))
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
        """Copy one row.

        Args:
            slot: which row.

        Returns:
            Its tensors by name.
        """
        return {
            name: value.clone()
            for stack in self._stacks
            for name, value in zip(stack.names, stack.values[slot], strict=True)
        }

    def follow(self, like: Mapping[str, Tensor]) -> None:
        """Move each stack to where other tensors are; a stack that is moved is a new tensor.

        Args:
            like: tensors with the names of these stacks.
        """
        self._stacks = [Stack(names, values.to(like[names[0]].device)) for names, values in self._stacks]

    def gather(self, index: Tensor) -> list[Stack]:
        """Copy rows of every stack, which may be written afterwards.

        Args:
            index: which rows, `(B,)` int64.

        Returns:
            The same stacks with values `(B, k, *shape)`.
        """
        return [Stack(names, values.index_select(0, index.to(values.device))) for names, values in self._stacks]


def as_rows(stacks: Stacks, adapters: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The named tensors of adapters as rows for stacks; zero where an adapter has none.

    Args:
        stacks: for which the rows are.
        adapters: the tensors of each adapter by name, n adapters.

    Returns:
        For each stack its rows, `(n, k, *shape)`.

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


class LayerTensor(NamedTuple):
    """One parameter of a norm in a PeftModel.

    Attributes:
        name: of the parameter, beginning with its owner.
        value: its value under an adapter, by the adapter's name.
        sources: the tensors that this value comes from, the base model's first.
    """

    name: str
    value: Callable[[str], Tensor]
    sources: Callable[[str], Sequence[Tensor]]


KeptRows = MutableMapping[str, tuple[object, list[Tensor]]]
"""By adapter what its rows are true of, and the rows."""


def rows_of_layers(names: Sequence[str], tensors: Sequence[LayerTensor], kept: KeptRows) -> list[Stack]:
    """The rows of a batch, made from the layers of a PeftModel.

    Only what the batch names is made. The rows of an adapter are kept where none of the tensors that they came from can
    be trained: optimizers and averages of weights write to what is trained without a trace. What is trained is summed
    anew each time, one operation per tensor.

    Args:
        names: the adapter of each sample, B of them.
        tensors: every routed parameter of the model.
        kept: rows of earlier batches; those that may be kept are added.

    Returns:
        Stacks of effective parameters, `(B, k, *shape)` each.
    """
    found = {tensor.name: tensor for tensor in tensors}
    bases = {name: tensor.sources(BASE)[0] for name, tensor in found.items()}
    groups = [[found[name] for name in group] for group in _grouped({n: (b.shape, b.device) for n, b in bases.items()})]
    base = _rows_of(BASE, groups, kept, None)
    rows = {name: base if name == BASE else _rows_of(name, groups, kept, base) for name in dict.fromkeys(names)}
    return [
        Stack(tuple(tensor.name for tensor in group), torch.stack(one_dtype([rows[name][number] for name in names])))
        for number, group in enumerate(groups if names else ())  # no names fit no batch, which the first norm says
    ]


def _rows_of(
    name: str, groups: Sequence[Sequence[LayerTensor]], kept: KeptRows, base: Sequence[Tensor] | None
) -> list[Tensor]:
    """The rows of one adapter, `(k, *shape)` for each group; those of the base where it has nothing."""
    sources = [source for group in groups for tensor in group for source in tensor.sources(name)]
    fixed = not any(source.requires_grad or source.is_inference() for source in sources)
    key = tuple((id(source), source.data_ptr(), source._version) for source in sources) if fixed else None
    before, rows = kept.get(name, (None, []))
    if fixed and before == key:
        return rows
    # What was trained in between may be fixed again later, with nothing that tells.
    kept.pop(name, None)
    with torch.inference_mode(False), torch.no_grad():
        rows = []
        for number, group in enumerate(groups):
            plain = None if base is None else base[number].unbind(0)
            values = [
                tensor.value(name) if plain is None or len(tensor.sources(name)) > 1 else plain[place]
                for place, tensor in enumerate(group)
            ]
            rows.append(torch.stack(one_dtype(values)))
    if fixed:
        kept[name] = key, rows
    return rows


def spread(gathered: Sequence[Stack], factor: int = 1) -> dict[str, NormRows]:
    """Rows of stacks as rows of norms.

    Args:
        gathered: stacks of rows, `(B, k, *shape)`, or `(1, k, *shape)` where one row is for all samples.
        factor: how often each row is repeated, as generation repeats the samples.

    Returns:
        Rows `(factor * B, 1, *shape)` by the owner's name.

    Example:
        >>> rows = spread([Stack(("a.weight", "a.bias"), torch.ones(3, 2, 2))], factor=2)
        >>> rows["a"].bias.shape
        torch.Size([6, 1, 2])
    """
    found: dict[str, dict[str, Tensor]] = {}
    for names, values in gathered:
        rows = values if factor == 1 or len(values) == 1 else values.repeat_interleave(factor, 0)
        for name, own in zip(names, rows.unsqueeze(2).unbind(1), strict=True):
            owner, _, parameter = name.rpartition(".")
            found.setdefault(owner, {})[parameter] = own
    return {owner: NormRows(**parameters) for owner, parameters in found.items()}


def unstacked(gathered: Sequence[Stack]) -> dict[str, Tensor]:
    """Rows of stacks by the names of the tensors.

    Args:
        gathered: stacks of rows, `(B, k, *shape)`.

    Returns:
        Rows `(B, *shape)` by name.

    Example:
        >>> unstacked([Stack(("weight", "bias"), torch.ones(3, 2, 4))])["bias"].shape
        torch.Size([3, 4])
    """
    # A backward pass through `unbind` copies.
    each = ((names, [rows.squeeze(1)] if len(names) == 1 else rows.unbind(1)) for names, rows in gathered)
    return {name: values for names, parts in each for name, values in zip(names, parts, strict=True)}


def one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the narrowest dtype that holds them all.

    Args:
        tensors: of any dtypes.

    Returns:
        The same tensors, or copies in another dtype.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return list(tensors)
    wide = reduce(torch.promote_types, dtypes)
    return [tensor.to(wide) for tensor in tensors]


def _grouped(kinds: Mapping[str, Hashable]) -> list[tuple[str, ...]]:
    """The names of each kind, kinds in the order in which they first appear."""
    groups: dict[Hashable, list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(kind, []).append(name)
    return [tuple(names) for names in groups.values()]


def _new(rows: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    # What is made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.empty(rows, *shape, dtype=dtype, device=device)
