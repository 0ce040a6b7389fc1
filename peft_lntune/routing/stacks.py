"""The parameters of many adapters in few tensors: all parameters of one shape are in one stack.

So a batch costs one operation per shape, whatever the number of norms and adapters. There are two kinds of stacks.
`AdapterBank` and `ManyTasks` hold stacks with one row per adapter (`Stacks`). A PeftModel holds one module per adapter
and norm, and builds the rows of the adapters that a batch names from them (`rows_of_layers`).

Tensors have names of the form `"<owner>.weight"` or `"<owner>.bias"`, where the owner is a norm.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from peft_lntune.core.cache import stamp

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
"""The name of the base model in a list of adapter names, as in PEFT."""


class Stack(NamedTuple):
    """Tensors of one shape, `(rows, k, *shape)`, in the order of their `k` names."""

    names: tuple[str, ...]
    values: Tensor


class NormRows(NamedTuple):
    """Parameters of one norm, one row per sample: `(B, 1, *shape)`, `(1, 1, *shape)` for all samples, or None."""

    weight: Tensor | None = None
    bias: Tensor | None = None


class Stacks:
    """Stacks for a set of named tensors. A row has no defined values until it is written.

    A stack that grows is replaced by a larger copy, so earlier references to it stay valid. Not for two threads at
    once; the caller holds a lock.

    Args:
        like: tensors by name; shapes, devices and, without `dtype`, dtypes are taken from them.
        rows: initial number of rows.
        dtype: dtype of the stacks; None: that of each tensor.
        device: device of the stacks; None: that of each tensor.

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
        # Not zeros, so that memory pages without an adapter are never touched.
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
        """Make room for more rows by doubling; existing rows keep their values.

        Args:
            rows: number of rows for which there must be room afterwards.
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
            slots: numbers of n rows.
            blocks: for each stack the n rows, `(n, k, *shape)`, as `as_rows` returns them.
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
            slot: number of the row.

        Returns:
            The tensors of the row by name.
        """
        return {
            name: value.clone()
            for stack in self._stacks
            for name, value in zip(stack.names, stack.values[slot], strict=True)
        }

    def follow(self, like: Mapping[str, Tensor]) -> None:
        """Move each stack to the device of other tensors; a moved stack is a new tensor.

        Args:
            like: tensors with the names of these stacks.
        """
        self._stacks = [Stack(names, values.to(like[names[0]].device)) for names, values in self._stacks]

    def gather(self, index: Tensor) -> list[Stack]:
        """Copy rows of every stack; later writes do not change the copies.

        Args:
            index: numbers of the rows, `(B,)` int64.

        Returns:
            Stacks with the copied rows, `(B, k, *shape)`.
        """
        return [Stack(names, values.index_select(0, index.to(values.device))) for names, values in self._stacks]


def as_rows(stacks: Stacks, adapters: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Arrange the named tensors of adapters as rows for stacks, with zeros where an adapter has no tensor.

    Args:
        stacks: the stacks for which the rows are.
        adapters: for each of n adapters its tensors by name.

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
        name: name of the parameter, which begins with its owner.
        value: returns its value under an adapter, for the adapter's name.
        sources: returns the tensors behind this value, that of the base model first.
    """

    name: str
    value: Callable[[str], Tensor]
    sources: Callable[[str], Sequence[Tensor]]


KeptRows = MutableMapping[str, tuple[object, list[Tensor]]]
"""For each adapter a key of the tensors that its cached rows were built from, and the rows."""


def rows_of_layers(names: Sequence[str], tensors: Sequence[LayerTensor], kept: KeptRows) -> list[Stack]:
    """Build the rows of a batch from the layers of a PeftModel.

    Only the rows of named adapters are built. They are cached where all their source tensors are frozen: fused
    optimizers write to trained tensors without a trace. Rows of trained tensors are computed again each time, one
    operation per tensor.

    Args:
        names: the adapter of each of the B samples.
        tensors: every routed parameter of the model.
        kept: cached rows of earlier batches; rows that may be cached are added.

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
        for number, group in enumerate(groups if names else ())  # without names the first norm raises
    ]


def _rows_of(
    name: str, groups: Sequence[Sequence[LayerTensor]], kept: KeptRows, base: Sequence[Tensor] | None
) -> list[Tensor]:
    """The rows of one adapter, `(k, *shape)` per group; those of the base where the adapter has no delta."""
    sources = [source for group in groups for tensor in group for source in tensor.sources(name)]
    fixed = not any(source.requires_grad or source.is_inference() for source in sources)
    key = tuple((id(source), *stamp(source)) for source in sources) if fixed else None
    before, rows = kept.get(name, (None, []))
    if fixed and before == key:
        return rows
    # Tensors that were trained meanwhile may be frozen again later, without a trace.
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
    """Split rows of stacks into rows of norms.

    Args:
        gathered: stacks of rows, `(B, k, *shape)`, or `(1, k, *shape)` where one row is for all samples.
        factor: how often each row is repeated, because generation repeats the samples.

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
    """Split rows of stacks by the names of the tensors.

    Args:
        gathered: stacks of rows, `(B, k, *shape)`.

    Returns:
        Rows `(B, *shape)` by name.

    Example:
        >>> unstacked([Stack(("weight", "bias"), torch.ones(3, 2, 4))])["bias"].shape
        torch.Size([3, 4])
    """
    # The backward pass of `unbind` copies, so it is avoided where possible.
    each = ((names, [rows.squeeze(1)] if len(names) == 1 else rows.unbind(1)) for names, rows in gathered)
    return {name: values for names, parts in each for name, values in zip(names, parts, strict=True)}


def one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cast tensors to the narrowest dtype that holds them all.

    Args:
        tensors: tensors of any dtypes.

    Returns:
        The same tensors, or copies in another dtype.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return list(tensors)
    wide = reduce(torch.promote_types, dtypes)
    return [tensor.to(wide) for tensor in tensors]


def _grouped(kinds: Mapping[str, Hashable]) -> list[tuple[str, ...]]:
    """The names of each kind, kinds in the order of first appearance."""
    groups: dict[Hashable, list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(kind, []).append(name)
    return [tuple(names) for names in groups.values()]


def _new(rows: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return torch.empty(rows, *shape, dtype=dtype, device=device)
