"""A bank as one safetensors file: its stacks, an index of names, and a digest of each adapter.

The file may be larger than the memory that is left, so it is written block by block, and read through a memory map.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_lntune.errors import AdapterFileError
from peft_lntune.storage.atomic import new_file
from peft_lntune.version import __version__

__all__ = ["BANK_FORMAT", "BLOCK", "BankFile", "TensorEntry", "row_digest", "write_tensors"]

BANK_FORMAT = 2
"""Version of bank files. In version 1 digests covered values alone; since 2 also the index: names, shapes, dtypes."""

_READ = (1, BANK_FORMAT)  # a file of another version is refused, never guessed at

BLOCK = 64
"""How many adapters are read or written at once."""

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


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written: what it is, and what gives its rows, block by block, when they are due."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Tensor]]


def write_tensors(path: str | os.PathLike, index: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> None:
    """Write a safetensors file without holding it in memory; it appears whole or not at all.

    Args:
        path: of the file; one that is there is replaced, and who has it open keeps the old one.
        index: JSON values that stand in the file's metadata.
        entries: by name, written in this order, but wider dtypes first, as the format aligns them.
    """
    entries = dict(sorted(entries.items(), key=lambda named: -named[1].dtype.itemsize))
    index = {"format_version": BANK_FORMAT, "peft_lntune_version": __version__, **index}
    listed = json.dumps(index)
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
            for block in entry.blocks():
                file.write(_bytes(block))


def row_digest(tensors: Iterable[Tensor], about: str = "") -> bytes:
    """SHA-256 of a text and of the bytes of some tensors, one after the other.

    Example:
        >>> len(row_digest([torch.ones(2)]))
        32
    """
    total = hashlib.sha256(about.encode())
    for tensor in tensors:
        total.update(_bytes(tensor))
    return total.digest()


class BankFile:
    """An open bank file. Tensors of it are views of the memory map, read when they are looked at.

    Attributes:
        index: what `write_tensors` was given.
        covers_index: whether its digests cover the index too; those of version 1 cover values alone.

    Args:
        path: of the file.

    Raises:
        AdapterFileError: it is damaged, cut off, no bank, or of another format.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{path} is damaged or cut off ({error}). Get a good copy of the bank.") from error
        if _KEY not in metadata:
            raise AdapterFileError(
                f"{path} is no bank: it was not written by AdapterBank.save. A single adapter is added by "
                "bank.add(name, directory)."
            )
        try:
            self.index: dict[str, Any] = dict(json.loads(metadata[_KEY]))
        except (ValueError, TypeError, RecursionError) as error:
            raise AdapterFileError(f"the index of {path} is damaged: {error}. Get a good copy of the bank.") from error
        version = self.index.get("format_version")
        if version not in _READ:
            raise AdapterFileError(
                f"{path} has format_version {version!r}, and peft_lntune {__version__} reads "
                f"{' and '.join(map(str, _READ))}. Upgrade with `pip install -U peft-lntune`, or save the bank again."
            )
        self.covers_index = version != 1
        if self.covers_index and metadata.get(_INDEX_DIGEST) != _sha256(metadata[_KEY]):
            raise AdapterFileError(
                f"the index of {path} is damaged: it was changed since it was written, so its names may not be "
                "those of its rows. Get a good copy of the bank."
            )

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, by name.

        Raises:
            AdapterFileError: there is none of this name.
        """
        try:
            found: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise AdapterFileError(f"{self.path} lacks {name}: {error}. Get a good copy of the bank.") from error
        return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
