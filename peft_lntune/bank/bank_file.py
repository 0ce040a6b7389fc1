"""A bank as one safetensors file: its stacks, an index of names, and a digest per adapter.

The file may be larger than the free memory, so it is written block by block and read through a memory map: rows are
copied from it on first use.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_lntune.bank.heads import Heads
from peft_lntune.errors import AdapterFileError
from peft_lntune.routing.stacks import Stacks
from peft_lntune.storage.atomic import new_file
from peft_lntune.tuner.read_adapter import Adapter, AdapterReader
from peft_lntune.version import INSTALL, __version__

__all__ = ["BANK_FORMAT", "BLOCK", "BankFile", "save_bank"]

BANK_FORMAT = 2
"""Version of bank files. In version 1 digests covered values only; since 2 also the index: names, shapes, dtypes."""

_READ = (1, BANK_FORMAT)  # files of other versions are refused

BLOCK = 64
"""Number of adapters read or written at a time."""

_KEY, _INDEX_DIGEST = "lntune_bank", "lntune_bank_digest"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.uint8: "U8",
}
_HeadTensors = Mapping[str, Mapping[str, Tensor]]


class _Entry(NamedTuple):
    """A tensor to write, block by block."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Iterable[Tensor]


def save_bank(path: str | os.PathLike, slots: Mapping[str, int], stacks: Stacks, heads: Heads) -> None:
    """Write a bank without holding the file in memory; the file appears complete or not at all.

    Args:
        path: path of the file; an existing file is replaced, and processes that have it open keep the old one.
        slots: slots of the adapters by name, in the order of the file.
        stacks: stacks of the norms.
        heads: heads of the adapters.
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
    layout = _layout(index)
    digests = [
        _row_digest([values[slot] for _, values in stacks], found, _about(name, layout, found))
        for name, slot, found in zip(slots, order, own, strict=True)
    ]
    table = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8)
    entries: dict[str, _Entry] = {}
    for number, (_, values) in enumerate(stacks):
        blocks = (_rows(values, order[start : start + BLOCK]) for start in range(0, len(order), BLOCK))
        entries[f"stack.{number}"] = _Entry(values.dtype, (len(order), *values.shape[1:]), blocks)
    for row, found in enumerate(own):
        for head, tensors in found.items():
            for name, tensor in tensors.items():
                entries[f"head.{row}.{head}.{name}"] = _Entry(tensor.dtype, tuple(tensor.shape), [tensor])
    entries["digests"] = _Entry(torch.uint8, (len(order), 32), [table])
    _write(path, index, entries)


def _write(path: str | os.PathLike, index: Mapping[str, Any], entries: Mapping[str, _Entry]) -> None:
    """Write a safetensors file; tensors in their order, but wider dtypes first, as its alignment requires."""
    entries = dict(sorted(entries.items(), key=lambda named: -named[1].dtype.itemsize))
    listed = json.dumps({"format_version": BANK_FORMAT, "peft_lntune_version": __version__, **index})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _KEY: listed, _INDEX_DIGEST: _sha256(listed)}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.dtype.itemsize * torch.Size(entry.shape).numel()
        header[name] = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as written, written.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            for block in entry.blocks:
                file.write(_bytes(block))


class BankFile:
    """An open bank file, and which of its adapters have not been copied yet.

    Attributes:
        names: names of all adapters in the file.
        dtype: dtype of their rows.
        pending: for each adapter that has not been copied yet, its row in the file.

    Args:
        path: path of the file.

    Raises:
        AdapterFileError: the file is damaged, truncated, not a bank, or of another format.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = path
        index = self._open()
        try:
            self.names: list[str] = list(index["names"])
            self.dtype: torch.dtype = getattr(torch, index["dtype"])
            self._parameters = [tuple(stack) for stack in index["stacks"]]
            self._shapes = {name: tuple(shape) for stack in index["stacks"] for name, shape in stack.items()}
            self._heads: dict[int, Any] = {int(row): dict(heads) for row, heads in index["heads"].items()}
            if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
                raise ValueError(f"{self.dtype!r} is not a floating dtype")
            if not all(isinstance(name, str) for name in self.names):
                raise TypeError("a name is not a string")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AdapterFileError(f"the index of {path} is damaged: {error!r}. Get a good copy.") from error
        self._index_layout = _layout(index)
        self.pending = {name: row for row, name in enumerate(self.names)}

    def _open(self) -> dict[str, Any]:
        """Open the file; returns its index."""
        path = self._path
        try:
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{path} is damaged or cut off ({error}). Get a good copy of the bank.") from error
        if _KEY not in metadata:
            raise AdapterFileError(
                f"{path} is not a bank: it was not written by AdapterBank.save. Add a single adapter with "
                "bank.add(name, directory)."
            )
        try:
            index: dict[str, Any] = dict(json.loads(metadata[_KEY]))
        except (ValueError, TypeError, RecursionError) as error:
            raise AdapterFileError(f"the index of {path} is damaged: {error}. Get a good copy of the bank.") from error
        version = index.get("format_version")
        if version not in _READ:
            raise AdapterFileError(
                f"{path} has format_version {version!r}, and peft_lntune {__version__} reads "
                f"{' and '.join(map(str, _READ))}. Upgrade with `{INSTALL} -U`, or save the bank again."
            )
        self._covers_index = version != 1
        if self._covers_index and metadata.get(_INDEX_DIGEST) != _sha256(metadata[_KEY]):
            raise AdapterFileError(
                f"the index of {path} is damaged: it was changed since it was written, so its names may not be "
                "those of its rows. Get a good copy of the bank."
            )
        return index

    def check(self, stacks: Stacks, reader: AdapterReader) -> None:
        """Check the file against the bank that will use it.

        Args:
            stacks: stacks of the bank.
            reader: reader for the bank's model.

        Raises:
            AdapterFileError: the file is from another model, or its tensors do not agree with its index.
        """
        shapes = {name: tuple(values.shape[2:]) for names, values in stacks for name in names}
        if shapes != self._shapes:
            every = shapes.keys() | self._shapes.keys()
            other = min(name for name in every if shapes.get(name) != self._shapes.get(name))
            raise AdapterFileError(
                f"{self._path} was saved for another model: {other} is {self._shapes.get(other, 'missing')} there "
                f"and {shapes.get(other, 'missing')} here."
            )
        unknown = {head for heads in self._heads.values() for head in heads} - reader.modules.keys()
        if unknown:
            raise AdapterFileError(
                f"{self._path} was saved for another model: it has heads for {min(unknown)}, which this model lacks."
            )
        expected = {"digests": (len(self.names), 32)}
        for number, names in enumerate(self._parameters):
            expected[f"stack.{number}"] = (len(self.names), len(names), *self._shapes[names[0]])
        for name, shape in expected.items():
            found = self._tensor(name)
            dtype = torch.uint8 if name == "digests" else self.dtype
            if tuple(found.shape) != shape or found.dtype != dtype or len(self.pending) != len(self.names):
                raise AdapterFileError(
                    f"{self._path} is damaged: {name} should be {shape} of {dtype}. Get a good copy."
                )
        self._bank_layout = [names for names, _ in stacks]

    def take(self, names: Sequence[str]) -> Iterator[tuple[list[str], list[Tensor], list[Adapter]]]:
        """Read the rows of pending adapters, in blocks; the caller removes them from `pending`.

        Args:
            names: names of adapters; those that are not pending are skipped.

        Yields:
            For each block the names of its n adapters, their rows `(n, k, *shape)` for each stack of the bank, and the
            adapters with their heads only.

        Raises:
            AdapterFileError: the rows of an adapter are damaged.
        """
        wanted = sorted({name for name in names if name in self.pending}, key=self.pending.__getitem__)
        for start in range(0, len(wanted), BLOCK):
            block = wanted[start : start + BLOCK]
            rows = [self.pending[name] for name in block]
            stored = [_rows(self._tensor(f"stack.{number}"), rows) for number in range(len(self._parameters))]
            heads = [self._heads_of(row) for row in rows]
            digests = _rows(self._tensor("digests"), rows)
            for place, name in enumerate(block):
                about = _about(name, self._index_layout, heads[place]) if self._covers_index else ""
                found = _row_digest([tensor[place] for tensor in stored], heads[place], about)
                if found != bytes(digests[place].tolist()):
                    raise AdapterFileError(
                        f"adapter {name!r} in {self._path} is damaged: its digest differs. Get a good copy of "
                        "the bank; the other adapters in it can be used."
                    )
            yield block, self._laid_out(stored), [Adapter({}, own) for own in heads]

    def _tensor(self, name: str) -> Tensor:
        """A tensor of the file, as a view of the memory map, which is read on access."""
        try:
            found: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise AdapterFileError(f"{self._path} lacks {name}: {error}. Get a good copy of the bank.") from error
        return found

    def _heads_of(self, row: int) -> _HeadTensors:
        return {
            head: {name: self._tensor(f"head.{row}.{head}.{name}") for name in names}
            for head, names in self._heads.get(row, {}).items()
        }

    def _laid_out(self, stored: list[Tensor]) -> list[Tensor]:
        """Rows arranged for the bank's stacks, which are more where the model is on several devices."""
        if self._bank_layout == self._parameters:
            return stored
        named = {
            name: tensor[:, place]
            for names, tensor in zip(self._parameters, stored, strict=True)
            for place, name in enumerate(names)
        }
        return [torch.stack([named[name] for name in names], 1) for names in self._bank_layout]


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Rows of a mapped tensor; consecutive rows are read as one slice."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor[torch.tensor(rows)]


def _row_digest(rows: Iterable[Tensor], heads: _HeadTensors, about: str) -> bytes:
    """SHA-256 of a text and of the bytes of an adapter's tensors."""
    total = hashlib.sha256(about.encode())
    for tensor in (*rows, *(tensors[name] for _, tensors in sorted(heads.items()) for name in sorted(tensors))):
        total.update(_bytes(tensor))
    return total.digest()


def _layout(index: Mapping[str, Any]) -> str:
    """A digest of the part of the index that describes all rows: dtype and stacks."""
    return _sha256(json.dumps([index["dtype"], index["stacks"]]))


def _about(name: str, layout: str, heads: _HeadTensors) -> str:
    """The description of a row that its digest covers in addition to its values: name, layout and head shapes."""
    shapes = {head: {key: [str(t.dtype), list(t.shape)] for key, t in own.items()} for head, own in heads.items()}
    return json.dumps([name, layout, shapes], sort_keys=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
