"""What is in a weight file: names of tensors, and the tensors themselves, read without trust in the file."""

import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peft_lntune.errors import AdapterFileError
from peft_lntune.storage.keys import is_ours, of_adapter

__all__ = [
    "CONFIG_FILE",
    "PEFT_TYPE",
    "PICKLED_FILE",
    "WEIGHTS_FILE",
    "cast_values",
    "dropped_tensors",
    "read_tensors",
]

PEFT_TYPE = "LNTUNE"
"""The one PEFT type of this package: every kind of adapter can live in one model and in one batch."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
# PEFT writes and reads it where a user says safe_serialization=False


def cast_values(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict of an adapter with its values in one dtype; heads and masks stay as they are.

    Args:
        tensors: by name in a file.
        dtype: of the values; None: as they are.

    Returns:
        A new dict with the same names.
    """
    return {
        key: value.to(dtype) if dtype is not None and is_ours(key) and value.is_floating_point() else value
        for key, value in tensors.items()
    }


def dropped_tensors(model: nn.Module, adapter_name: str, others: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of an adapter that PEFT takes for those of another one, whose name stands somewhere in theirs.

    Before it saves an adapter, PEFT drops every tensor with the name of another one in it. Beside an adapter called
    `weight`, `LayerNorm` or `0`, that would be nearly all of ours.

    Args:
        model: which holds the adapter.
        adapter_name: the adapter that is saved.
        others: names of the other adapters.

    Returns:
        The tensors that would be lost, by their names in the model.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {key: tensor for key, tensor in named.items() if of_adapter(key, adapter_name)}
    others = set(others)
    return {key: tensor.detach() for key, tensor in own.items() if others & set(key.split("."))}


def read_tensors(file: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a weight file.

    Args:
        file: safetensors, or what PEFT has pickled where its name ends in `.bin`.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        AdapterFileError: it cannot be read, or holds something else than named tensors.
    """
    try:
        if Path(file).suffix == ".bin":
            return _unpickled(Path(file))
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterFileError(f"{file} is damaged or cut off ({said}). Get a good copy of the adapter.") from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as packed:
        if sum(entry.file_size for entry in packed.infolist()) > file.stat().st_size:
            raise ValueError("it says that it holds more than its size")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes may raise anything, and torch advises against its own check
        raise ValueError(f"it is no pickled state dict of tensors: {type(error).__name__}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError("it is no state dict of tensors")
    return tensors
