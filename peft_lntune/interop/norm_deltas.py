"""The deltas of a saved adapter added to the bytes of norms in a model file. No model is made."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from peft_lntune.config import StoredConfig, parts_of
from peft_lntune.config.deltas import DeltaConfig
from peft_lntune.core.delta import effective, unpack_bits
from peft_lntune.errors import AdapterFileError, UnsupportedError
from peft_lntune.storage.byte_edits import ByteEdit
from peft_lntune.storage.packing import DELTAS, PREFIX, ROOT, is_packed, unpack
from peft_lntune.storage.saved_adapter import SavedAdapter

__all__ = [
    "NormAdapter",
    "NormMerge",
    "Place",
    "check_apart",
    "check_base",
    "edit_of",
    "folder_of",
    "shape_error",
    "tuned_name",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes that a delta can be added to in a file. All others are quantized."""


@dataclass(frozen=True)
class NormMerge:
    """What was changed in a model file.

    Attributes:
        file: the new or changed file or folder.
        tensors: number of tensors that took a delta.
        entries: number of tuned entries in them.
        rounded_away: number of tuned entries whose delta is not zero and whose value in the file did not change,
            because the tensor's dtype cannot hold the sum.
        base_checked: whether the norms of the file were compared with those of the model that the adapter was trained
            on. False: that model was not found on this machine.
    """

    file: Path
    tensors: int
    entries: int
    rounded_away: int
    base_checked: bool

    def __str__(self) -> str:
        said = [
            f"{self.file}: {self.tensors} norm tensors changed, {self.entries:,} entries; all other bytes are kept."
        ]
        if self.rounded_away:
            said.append(
                f"{self.rounded_away:,} entries did not change, because their dtype cannot hold so small a difference."
            )
        if not self.base_checked:
            said.append(
                "The model that the adapter was trained on is not on this machine, so its norms were not compared with "
                "those of the file. To compare, name its folder: --model FOLDER."
            )
        return "\n".join(said)


class Place(NamedTuple):
    """Where a tensor is in a file.

    Attributes:
        file: the file.
        name: name of the tensor in the file.
        dtype: its dtype; None for a quantized tensor.
        stored: its dtype in the words of the format, for errors.
        shape: its shape, in the order of torch.
        offset: position of its first byte in the file.
    """

    file: Path
    name: str
    dtype: torch.dtype | None
    stored: str
    shape: torch.Size
    offset: int

    def read(self) -> tuple[bytes, Tensor]:
        """Read the tensor.

        Returns:
            Its bytes, and the values of shape `shape`.

        Raises:
            UnsupportedError: the tensor is quantized.
        """
        if self.dtype is None or self.dtype not in DTYPES:
            raise UnsupportedError(
                f"{self.name} in {self.file} is {self.stored}, and a delta can be added to "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)} only: nothing is requantized. "
                "Use a file whose norms are not quantized."
            )
        with self.file.open("rb") as opened:
            opened.seek(self.offset)
            content = opened.read(self.shape.numel() * self.dtype.itemsize)
        return content, torch.frombuffer(bytearray(content), dtype=self.dtype).view(self.shape)


class NormAdapter:
    """A saved adapter that holds deltas alone, such as one of `LNTuningConfig` or `FisherLNConfig`.

    Args:
        adapter: folder of the adapter, or its repository on the Hub.

    Attributes:
        names: what it tunes, as `<module>.lntune_<parameter>`, sorted.
        base: the model that its config names; None if there is none.
        model_type: the architecture that it was saved from, as transformers calls it; None if it was not recorded.
        digest: digest of its tensors.

    Raises:
        AdapterFileError: the adapter is damaged, or of another PEFT type.
        UnsupportedError: it holds more than deltas: heads, LoRA, bottlenecks, prefixes or supermasks.
    """

    def __init__(self, adapter: str | os.PathLike) -> None:
        self.config = StoredConfig.from_pretrained(str(adapter))
        saved = SavedAdapter(adapter, {})
        self.where, self._tensors = saved.name, saved.tensors
        manifest: Mapping[str, Any] = self.config.manifest or {}
        self.base: str | None = self.config.base_model_name_or_path or None
        self.model_type: str | None = manifest.get("model_type")
        self.digest: str = str(manifest.get("digest"))
        others = [type(part).__name__ for part in parts_of(self.config) if not isinstance(part, DeltaConfig)]
        names = {key.removeprefix(ROOT).rpartition(".")[0] for key in self._tensors if not is_packed([key])}
        others += sorted(name for name in names if not name.rpartition(".")[2].startswith(DELTAS))
        if others:
            raise UnsupportedError(
                f"{self.where} holds more than deltas of norms: {', '.join(others[:5])}{' ...' if others[5:] else ''}. "
                "A model file whose other bytes are kept cannot take that. Load the model and the adapter, and use "
                "merge_and_unload; or train an adapter of norms alone."
            )
        self._counts: dict[str, int | None] = dict.fromkeys(names)
        if is_packed(self._tensors):
            masked = {name: n for name, n in manifest.get("tuned", {}).items() if n is not None and name not in names}
            self._counts.update(masked)
        self.names = sorted(self._counts)

    def deltas(self, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The deltas for parameters of known shapes.

        Args:
            shapes: the shape of the base parameter for each of `names`.

        Returns:
            By name, the values and their positions in the flattened base, as `peft_lntune.core.delta.effective` takes
            them: a delta of the base's shape and None, or `(k,)` values and `(k,)` int64 positions.

        Raises:
            AdapterFileError: a delta is of another shape than its parameter.
        """
        sizes = {name: (count, shapes[name]) for name, count in self._counts.items() if count is not None}
        tensors = {k.removeprefix(ROOT): t for k, t in unpack(self._tensors, sizes, self.where).items()}
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name in self.names:
            values, bits = tensors[f"{name}.weight"], tensors.get(f"{name}.mask")
            shape = shapes[name]
            if bits is None:
                if values.shape != shape:
                    raise shape_error(self.where, name, values.shape, shape)
                found[name] = values, None
                continue
            if bits.numel() != -(-shape.numel() // 8):
                raise shape_error(self.where, name, torch.Size([8 * bits.numel()]), shape)
            index = unpack_bits(bits, shape).reshape(-1).nonzero().reshape(-1)
            if len(index) != len(values):
                raise shape_error(self.where, name, values.shape, index.shape)
            found[name] = values, index
        return found


def check_apart(spans: Iterable[tuple[int, int, str]], file: Path) -> None:
    """Refuse a file two of whose tensors share bytes: an edit of one would change the other.

    Args:
        spans: for each tensor the positions of its first byte and behind its last, and its name.
        file: the file, for the message.

    Raises:
        AdapterFileError: two tensors overlap.

    Example:
        >>> check_apart([(8, 12, "b"), (0, 8, "a")], Path("model.gguf"))
    """
    for (_, end, one), (start, _, other) in pairwise(sorted(spans)):
        if start < end:
            raise AdapterFileError(f"{file} is damaged: {one} and {other} share bytes. Get a good copy of the model.")


def edit_of(place: Place, values: Tensor, index: Tensor | None) -> tuple[ByteEdit, int]:
    """Add a delta to a tensor of a file: in float32 or wider, rounded once to the tensor's dtype.

    Args:
        place: the tensor.
        values: the delta, of the tensor's shape, or `(k,)`.
        index: `(k,)`, int64, positions in the flattened tensor; None for a dense delta.

    Returns:
        The edit of the file, and the number of entries whose delta is not zero and that did not change.

    Raises:
        UnsupportedError: the tensor is quantized, or its dtype cannot hold a sum, which is too large for it.
    """
    before, base = place.read()
    wide = torch.promote_types(base.dtype, torch.float32)
    tuned = effective(base.to(wide), values.to(torch.promote_types(values.dtype, wide)), index).to(base.dtype)
    if not bool(tuned.isfinite().all()):
        raise UnsupportedError(
            f"{place.name} in {place.file} is {place.stored}, which cannot hold base plus delta: the sum is too large "
            "or not finite. Use a file whose norms are float32 or bfloat16."
        )
    asked = values.reshape(-1) != 0
    same = (tuned == base).reshape(-1) if index is None else (tuned == base).reshape(-1)[index]
    after = tuned.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return ByteEdit(place.offset, before, after), int((asked & same).sum())


def check_base(places: Mapping[str, Place], base: Mapping[str, Place], shift: float, where: str) -> None:
    """Refuse a file whose norms are not those of the model that an adapter was trained on.

    Args:
        places: by tuned name, the tensors of the file.
        base: by tuned name, the tensors of the base model.
        shift: what the conversion into this file adds to the weights of norms; their biases are kept.
        where: the adapter, for the message.

    Raises:
        AdapterFileError: a shape or a value differs.
        UnsupportedError: a tensor is quantized.
    """
    for name, place in places.items():
        if name not in base:
            continue
        own, known = place.read()[1], base[name].read()[1]
        if own.shape != known.shape:
            raise shape_error(where, name, known.shape, own.shape)
        added = shift if name.endswith("weight") else 0.0
        expected = known.double() + added
        # float32 and the half precisions are converted exactly. A shift is added in the base's dtype, or in float32,
        # and both sums are rounded once; a half-precision file is rounded once more.
        room = expected.abs() * (
            (torch.finfo(known.dtype).eps if added else 0.0)
            + (torch.finfo(own.dtype).eps if own.dtype != known.dtype and own.dtype.itemsize < 4 else 0.0)
        )
        far = (own.double() - expected).abs()
        if bool((far > room).any()):
            raise AdapterFileError(
                f"{place.name} in {place.file} is not the norm that {where} was trained on: it differs from "
                f"{base[name].name} in {base[name].file.parent} by up to {far.max():.3g}"
                f"{f', beyond the {added:g} that the conversion adds' if added else ''}. The file is of another "
                "model, already holds an adapter, or its quantizer changed norms (AWQ and SmoothQuant move scales into "
                "them). Use a file made from the adapter's own base model, or train the adapter over this one."
            )


def folder_of(model: str | os.PathLike | None) -> Path | None:
    """The folder of a model on this machine.

    Args:
        model: a folder, or a repository on the Hub, which is looked for in the local cache.

    Returns:
        The folder; None if it is not on this machine.
    """
    if model is None:
        return None
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name of a repository
        return None


def shape_error(where: str, name: str, has: torch.Size, expected: torch.Size) -> AdapterFileError:
    """The error for a delta that does not fit its parameter.

    Args:
        where: the adapter.
        name: the tuned parameter.
        has: shape of the delta, or of the base parameter it was trained on.
        expected: shape in the file.

    Returns:
        The error, to be raised.
    """
    return AdapterFileError(
        f"{where} tunes {said(name)} of shape {tuple(has)}, and this file holds one of shape {tuple(expected)} there. "
        "It was trained on another model, or tunes a part of a larger parameter."
    )


def said(name: str) -> str:
    """A tuned name for people: `norm.weight` for `norm.lntune_weight`."""
    return name.replace(f".{PREFIX}", ".")


def tuned_name(module: str, parameter: str) -> str:
    """The name of a delta, as `NormAdapter.names` has it.

    Args:
        module: path of the module.
        parameter: `"weight"` or `"bias"`.

    Returns:
        `<module>.lntune_<parameter>`.
    """
    return f"{module}.{PREFIX}{parameter}"
