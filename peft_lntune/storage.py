"""What is in a weight file, and whether it is whole: the first line of defence against damaged adapters.

An adapter is two files, `adapter_config.json` and `adapter_model.safetensors`. The config carries a manifest of the
weights it was saved with, so that a config of one save beside the weights of another is noticed.
"""

import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peft_lntune.errors import AdapterFileError
from peft_lntune.packing import KEEP, PREFIX, ROOT, counts_of, pack

__all__ = [
    "CONTAINERS",
    "LORA",
    "WEIGHTS_FILE",
    "cast_values",
    "check_directory",
    "check_tensors",
    "dropped_tensors",
    "has_lora",
    "hub_options",
    "is_ours",
    "is_part",
    "manifest_of",
    "new_file",
    "of_adapter",
    "read_tensors",
    "with_lora_name",
    "without_adapter_name",
]

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # PEFT writes and reads it where a user says safe_serialization=False


LORA = "lora_"
"""How the names of PEFT's containers of LoRA's tensors begin."""


CONTAINERS = (PREFIX, LORA)
"""How the names of all containers of an adapter's tensors begin: ours, and those of a part that is LoRA."""


BARE = "lora_embedding_"
"""The containers that hold tensors by adapter name, and not modules with a `weight`."""


def is_ours(key: str) -> bool:
    """Whether a key in a file names a tensor of an adapter: `<module>.lntune_<what>.<tensor>`, or LoRA's."""
    *above, last = key.split(".")
    return last.startswith(BARE) or (bool(above) and above[-1].startswith(CONTAINERS))


def is_part(key: str, adapter_name: str) -> bool:
    """Whether a name in a model is of a tensor of this adapter, but not of a head in `modules_to_save`."""
    return any(name == adapter_name and above.startswith(CONTAINERS) for above, name in pairwise(key.split(".")))


def of_adapter(key: str, adapter_name: str) -> bool:
    """Whether a name in a model is of a tensor of this adapter: of one of its parts, or a head in `modules_to_save`."""
    return is_part(key, adapter_name) or f".modules_to_save.{adapter_name}." in f".{key}."


def without_adapter_name(key: str, adapter_name: str) -> str:
    """A tensor's name in a model as it stands in a file; any other name as it is.

    Told by structure: PEFT's own rule takes `bias` off `classifier.bias` where that is the name of the adapter. And
    where another adapter has put a layer around this one's, the file does not say so.

    Example:
        >>> without_adapter_name("0.base_layer.lora_A.default.weight", "default")
        '0.lora_A.weight'
    """
    parts = key.split(".")
    for place, (container, name) in enumerate(pairwise(parts)):
        whole = place + 2 < len(parts) or container.startswith(BARE)  # else it is `weight`, and some adapter's name
        if name == adapter_name and container.startswith(CONTAINERS) and whole:
            above = [part for part in parts[:place] if part != "base_layer"]
            return ".".join([*above, container, *parts[place + 2 :]])
    return key


def has_lora(keys: Iterable[str]) -> bool:
    """Whether one of these names in a file is of a tensor of LoRA."""
    return any(is_ours(key) and f".{LORA}" in f".{key}" for key in keys)


def with_lora_name(key: str, adapter_name: str) -> str:
    """The name in a model of a tensor of LoRA, from its name in a file; any other name as it is.

    Example:
        >>> with_lora_name("0.lora_A.weight", "default")
        '0.lora_A.default.weight'
    """
    parts = key.split(".")
    for place in range(max(len(parts) - 2, 0), len(parts)):
        if parts[place].startswith(LORA):
            return ".".join([*parts[: place + 1], adapter_name, *parts[place + 1 :]])
    return key


def cast_values(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict of an adapter with the values of its own tensors, not of heads, in this dtype; None: as it is."""
    return {
        key: value.to(dtype) if dtype is not None and is_ours(key) and value.is_floating_point() else value
        for key, value in tensors.items()
    }


def dropped_tensors(model: nn.Module, adapter_name: str, others: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of an adapter that PEFT takes for those of another one, whose name stands somewhere in theirs.

    Before it saves an adapter, PEFT drops every tensor with the name of another one in it. Beside an adapter called
    `weight`, `LayerNorm` or `0`, that would be nearly all of ours.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {key: tensor for key, tensor in named.items() if of_adapter(key, adapter_name)}
    others = set(others)
    return {key: tensor.detach() for key, tensor in own.items() if others & set(key.split("."))}


def manifest_of(tensors: Mapping[str, Tensor], partial: bool = False) -> dict[str, Any]:
    """What a config records of the weights saved with it.

    Args:
        tensors: the adapter's state dict without adapter names, not packed yet.
        partial: whether the adapter may tune fewer parameters than its config alone says.

    Returns:
        `digest`: SHA-256 over name, dtype, shape and bytes of each of our tensors, packed as they are saved. `tuned`,
        where one is masked or `partial` is said: for each tuned parameter the number of its tuned entries, null for
        all of them, so that each delta can be made in its final shape before the file is read.
    """
    ours = _ours(tensors)
    counts = counts_of(ours)
    manifest: dict[str, Any] = {"digest": _digest(pack(ours))}
    return {**manifest, "tuned": counts} if partial or any(counts.values()) else manifest


def check_tensors(manifest: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise where a state dict cannot be the adapter that `manifest` describes.

    Args:
        manifest: as `manifest_of` made it; None skips the comparison.
        tensors: a state dict as loaded, without adapter names.
        where: the file or adapter, for the message.

    Raises:
        AdapterFileError: nothing of ours in it, a wrong dtype, a value that is not finite, or another digest.
    """
    ours = _ours(tensors)
    if not ours:
        raise AdapterFileError(
            f"{where} holds no tensor named `...{PREFIX}...`, but {len(tensors)} others, such as "
            f"{next(iter(tensors), 'none')!r}. It was not saved by peft_lntune, or its keys were renamed."
        )
    for name, tensor in ours.items():
        wanted = "uint8" if name.endswith((".mask", KEEP)) else "a floating dtype"
        if (tensor.dtype == torch.uint8) if wanted == "uint8" else tensor.is_floating_point():
            continue
        raise AdapterFileError(f"{where}: {name} should be of {wanted}, but is {tensor.dtype}. Get a good copy.")
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise AdapterFileError(
            f"{where}: {len(broken)} tensors hold NaN or infinite values, the first is {broken[0]}. "
            "The training that wrote it diverged, or the file is damaged; take an earlier checkpoint."
        )
    if manifest and "digest" in manifest and manifest["digest"] != _digest(ours):
        raise AdapterFileError(
            f"{where} is not the file that its adapter_config.json was saved with: the digests differ. One of the two "
            "comes from another save, or was changed since. Get both from one save."
        )


def check_directory(
    manifest: Mapping[str, Any] | None, path: str | os.PathLike, subfolder: str | None = None, **hub: Any
) -> None:
    """Check the safetensors file beside a config, local or on the Hub. Pickled weights are left to PEFT.

    Raises:
        AdapterFileError: a local directory holds no weights, the file cannot be read, or `check_tensors` refuses it.
    """
    file = _find(path, subfolder, hub)
    if file is not None:
        check_tensors(manifest, read_tensors(file), str(file))


def read_tensors(file: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        AdapterFileError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file} is damaged or cut off ({error}). Get a good copy of the adapter.") from error


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write, of the same name elsewhere, which takes its place at `path` when all of it is written.

    Who has the old file open keeps it. Where the block raises or the process is killed, the old file stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        made = Path(folder, target.name)
        yield made
        with made.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(made, target)


def hub_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a loader's keyword arguments that say where on the Hub to look: revision, token, subfolder, ..."""
    known = inspect.signature(hf_hub_download).parameters
    return {name: value for name, value in given.items() if name in known}


def _find(path: str | os.PathLike, subfolder: str | None, hub: Mapping[str, Any]) -> Path | None:
    folder = Path(path, subfolder or "")
    if folder.is_dir():
        file = folder / WEIGHTS_FILE
        if file.exists() or (folder / PICKLED_FILE).exists():
            return file if file.exists() else None
        # PEFT would take the path for the name of a repository on the Hub, and complain about its spelling.
        raise AdapterFileError(f"{folder} holds a config, but no {WEIGHTS_FILE}. Get the whole adapter.")
    try:
        return Path(hf_hub_download(str(path), WEIGHTS_FILE, subfolder=subfolder, **hub))
    except (EntryNotFoundError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError):
        return None


def _ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(ROOT): tensor for name, tensor in sorted(tensors.items()) if is_ours(name)}


def _digest(ours: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(ours.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
