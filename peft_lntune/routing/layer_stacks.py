"""The parameters of each adapter of a model as few tensors, made from its layers.

All norms of one shape are stacked as `(norms, *shape)` for each adapter, so that a batch costs one operation for each
shape and not one for each norm or adapter. Only what the batch names is made. A row is kept where none of the tensors
that it came from can be trained: optimizers and averages of weights write to what is trained without a trace. What is
trained is summed anew at each entry, one operation a tensor.
"""

from collections.abc import Callable, MutableMapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BASE", "Gather", "Kept", "LayerTensor", "Rows", "gather_of", "one_dtype"]

BASE = "__base__"
"""The name that stands for the base model in a list of adapter names, as in PEFT."""


class Rows(NamedTuple):
    """Parameters of one norm, a row for each sample of the batch: `(B, 1, *shape)`, or None where it has none."""

    weight: Tensor | None = None
    bias: Tensor | None = None


Gather = Callable[[int], dict[int, Rows]]
"""From how many rows of an input belong to one sample to the rows of each norm, by its owner."""


class LayerTensor(NamedTuple):
    """One routed parameter.

    Attributes:
        owner: whose it is.
        parameter: which of the owner's.
        value: its value under an adapter.
        sources: the tensors that this value comes from.
    """

    owner: int
    parameter: str
    value: Callable[[str], Tensor]
    sources: Callable[[str], Sequence[Tensor]]


class Kept(NamedTuple):
    """What an adapter's rows are, and what they are true of."""

    key: object
    rows: list[Tensor]


def gather_of(names: Sequence[str], entries: Sequence[LayerTensor], kept: MutableMapping[str, Kept]) -> Gather:
    """The rows of a batch for `Route.serving`.

    Args:
        names: the adapter of each sample.
        entries: every routed parameter of the model.
        kept: rows of earlier batches; those that may be kept are added.
    """
    base = _rows_of(BASE, entries, kept, None)
    rows = {name: base if name == BASE else _rows_of(name, entries, kept, base) for name in dict.fromkeys(names)}
    groups = _groups(entries)

    def gather(factor: int) -> dict[int, Rows]:
        found: dict[int, dict[str, Tensor]] = {}
        for number, group in enumerate(groups if names else ()):  # no names fit no batch, which the first norm says
            each = [rows[name][number] for name in names for _ in range(factor)]
            gathered = torch.stack(one_dtype(each)).unsqueeze(2).unbind(1)
            for entry, own in zip(group, gathered, strict=True):
                found.setdefault(entry.owner, {})[entry.parameter] = own
        return {owner: Rows(**parameters) for owner, parameters in found.items()}

    return gather


def _groups(entries: Sequence[LayerTensor]) -> list[list[LayerTensor]]:
    """Entries of one shape on one device."""
    groups: dict[object, list[LayerTensor]] = {}
    for entry in entries:
        base = entry.sources(BASE)[0]
        groups.setdefault((base.shape, base.device), []).append(entry)
    return list(groups.values())


def _rows_of(
    name: str, entries: Sequence[LayerTensor], kept: MutableMapping[str, Kept], base: Sequence[Tensor] | None
) -> list[Tensor]:
    """The rows of one adapter, `(norms, *shape)` for each group; those of the base where it has nothing."""
    sources = [tensor for entry in entries for tensor in entry.sources(name)]
    fixed = not any(tensor.requires_grad or tensor.is_inference() for tensor in sources)
    key = tuple((id(tensor), tensor.data_ptr(), tensor._version) for tensor in sources) if fixed else None
    found = kept.get(name)
    if found is not None and fixed and found.key == key:
        return found.rows
    # What was trained in between may be fixed again later, with nothing that tells.
    kept.pop(name, None)
    with torch.inference_mode(False), torch.no_grad():
        rows = []
        for number, group in enumerate(_groups(entries)):
            plain = None if base is None else base[number].unbind(0)
            values = [
                entry.value(name) if plain is None or len(entry.sources(name)) > 1 else plain[place]
                for place, entry in enumerate(group)
            ]
            rows.append(torch.stack(one_dtype(values)))
    if fixed:
        kept[name] = Kept(key, rows)
    return rows


def one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the narrowest dtype that holds them all."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return list(tensors)
    wide = reduce(torch.promote_types, dtypes)
    return [tensor.to(wide) for tensor in tensors]
