"""From a bank to its file, and rows from the file to the bank when they are asked for."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_lntune.bank.files import BLOCK, BankFile, TensorEntry, row_digest, write_tensors
from peft_lntune.bank.heads import Heads
from peft_lntune.errors import AdapterFileError
from peft_lntune.routing.stacks import Stacks
from peft_lntune.tuner.read_adapter import Adapter, Sources

__all__ = ["RowBlock", "Saved", "save_bank"]


@dataclass(frozen=True)
class RowBlock:
    """Adapters from a file: their names, their rows for each stack, and their heads."""

    names: list[str]
    rows: list[Tensor]
    heads: list[Adapter]


def save_bank(path: str | os.PathLike, slots: Mapping[str, int], stacks: Stacks, heads: Heads) -> None:
    """Write a bank; see `files.write_tensors`.

    Args:
        path: of the file.
        slots: of the adapters, in the order they have in the file.
        stacks: of the norms.
        heads: of the adapters.
    """
    order = list(slots.values())
    own = [heads.read(slot) for slot in order]
    index = {
        "names": list(slots),
        "dtype": str(next(iter(stacks)).values.dtype).removeprefix("torch."),
        "stacks": [{name: list(values.shape[2:]) for name in names} for names, values in stacks],
        "heads": {
            str(row): {head: list(tensors) for head, tensors in found.items()} for row, found in enumerate(own) if found
        },
    }
    entries = {
        f"stack.{number}": TensorEntry(values.dtype, (len(order), *values.shape[1:]), partial(_blocks, values, order))
        for number, (_, values) in enumerate(stacks)
    }
    for row, found in enumerate(own):
        for head, tensors in found.items():
            for name, tensor in tensors.items():
                entries[f"head.{row}.{head}.{name}"] = TensorEntry(
                    tensor.dtype, tuple(tensor.shape), partial(_whole, tensor)
                )
    layout = _layout(index["dtype"], index["stacks"])
    digests = [
        row_digest([*(values[slot] for _, values in stacks), *_all_of(found)], _about(name, layout, found))
        for name, slot, found in zip(slots, order, own, strict=True)
    ]
    table = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
    entries["digests"] = TensorEntry(torch.uint8, (len(order), 32), partial(_whole, table))
    write_tensors(path, index, entries)


class Saved:
    """The adapters of an open bank file that have not been copied yet.

    Attributes:
        names: of all adapters in the file.
        dtype: of their rows.
        pending: of those that are still to be copied, the row.

    Args:
        file: the bank file.

    Raises:
        AdapterFileError: its index is not as it was written.
    """

    def __init__(self, file: BankFile) -> None:
        self._file = file
        try:
            self.names: list[str] = list(file.index["names"])
            self.dtype: torch.dtype = getattr(torch, file.index["dtype"])
            self._parameters: list[list[str]] = [list(stack) for stack in file.index["stacks"]]
            self._shapes = {name: tuple(shape) for stack in file.index["stacks"] for name, shape in stack.items()}
            self._heads: dict[int, Any] = {int(row): dict(heads) for row, heads in file.index["heads"].items()}
            self._about = _layout(file.index["dtype"], file.index["stacks"])
            _check_index(self)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AdapterFileError(f"the index of {file.path} is damaged: {error!r}. Get a good copy.") from error
        self.pending = {name: row for row, name in enumerate(self.names)}

    def check(self, stacks: Stacks, sources: Sources) -> None:
        """Raise an `AdapterFileError` where the file is of another model, or its tensors not those of its index."""
        shapes = {name: tuple(values.shape[2:]) for names, values in stacks for name in names}
        if shapes != self._shapes:
            every = shapes.keys() | self._shapes.keys()
            other = min(name for name in every if shapes.get(name) != self._shapes.get(name))
            raise AdapterFileError(
                f"{self._file.path} was saved for another model: {other} is {self._shapes.get(other, 'missing')} there "
                f"and {shapes.get(other, 'missing')} here."
            )
        unknown = {head for heads in self._heads.values() for head in heads} - sources.modules.keys()
        if unknown:
            raise AdapterFileError(
                f"{self._file.path} was saved for another model: it has heads for {min(unknown)}, which this model has "
                "not."
            )
        expected = {"digests": (len(self.names), 32)}
        for number, names in enumerate(self._parameters):
            expected[f"stack.{number}"] = (len(self.names), len(names), *self._shapes[names[0]])
        for name, shape in expected.items():
            found = self._file.tensor(name)
            dtype = torch.uint8 if name == "digests" else self.dtype
            if tuple(found.shape) != shape or found.dtype != dtype or len(self.pending) != len(self.names):
                raise AdapterFileError(
                    f"{self._file.path} is damaged: {name} should be {shape} of {dtype}. Get a good copy."
                )
        self._layout = [names for names, _ in stacks]

    def take(self, names: Sequence[str]) -> Iterator[RowBlock]:
        """The rows of those adapters that are pending, in blocks; they stay pending until the caller has them.

        Raises:
            AdapterFileError: the rows of an adapter are damaged.
        """
        wanted = sorted({name for name in names if name in self.pending}, key=self.pending.__getitem__)
        for start in range(0, len(wanted), BLOCK):
            block = wanted[start : start + BLOCK]
            rows = [self.pending[name] for name in block]
            stored = [_rows(self._file.tensor(f"stack.{number}"), rows) for number in range(len(self._parameters))]
            heads = [self._heads_of(row) for row in rows]
            digests = _rows(self._file.tensor("digests"), rows)
            for place, name in enumerate(block):
                own = heads[place].heads
                about = _about(name, self._about, own) if self._file.covers_index else ""
                found = row_digest([*(tensor[place] for tensor in stored), *_all_of(own)], about)
                if found != bytes(digests[place].tolist()):
                    raise AdapterFileError(
                        f"adapter {name!r} in {self._file.path} is damaged: its digest is another. Get a good copy of "
                        "the bank; the other adapters in it can be used."
                    )
            yield RowBlock(block, self._laid_out(stored), heads)

    def _heads_of(self, row: int) -> Adapter:
        heads = {
            head: {name: self._file.tensor(f"head.{row}.{head}.{name}") for name in names}
            for head, names in self._heads.get(row, {}).items()
        }
        return Adapter({}, heads)

    def _laid_out(self, stored: list[Tensor]) -> list[Tensor]:
        """Rows as this bank has its stacks: in a model on several devices there are more of them."""
        if self._layout == [tuple(names) for names in self._parameters]:
            return stored
        named = {
            name: tensor[:, place]
            for names, tensor in zip(self._parameters, stored, strict=True)
            for place, name in enumerate(names)
        }
        return [torch.stack([named[name] for name in names], 1) for names in self._layout]


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Rows of a mapped tensor; those that lie together are read as one."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor[torch.tensor(rows)]


def _whole(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _blocks(values: Tensor, slots: list[int]) -> Iterator[Tensor]:
    return (_rows(values, slots[start : start + BLOCK]) for start in range(0, len(slots), BLOCK))


def _layout(dtype: Any, stacks: Any) -> str:
    """What the index says that all rows are of."""
    return row_digest([], json.dumps([dtype, stacks])).hex()


def _about(name: str, layout: str, heads: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What is true of a row beside its values: whose it is, and of what shapes."""
    shapes = {head: {key: [str(t.dtype), list(t.shape)] for key, t in own.items()} for head, own in heads.items()}
    return json.dumps([name, layout, shapes], sort_keys=True)


def _check_index(saved: Saved) -> None:
    """Raise a `TypeError` or `ValueError` where an index holds something else than it was written with."""
    if not isinstance(saved.dtype, torch.dtype) or not saved.dtype.is_floating_point:
        raise ValueError(f"{saved.dtype!r} is no floating dtype")
    if not all(isinstance(name, str) for name in saved.names):
        raise TypeError("a name is no string")


def _all_of(heads: Mapping[str, Mapping[str, Tensor]]) -> list[Tensor]:
    return [tensors[name] for _, tensors in sorted(heads.items()) for name in sorted(tensors)]
