"""Weight files: names of tensors, and the tensors themselves, read without trusting the file."""

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
"""The one PEFT type of this package, so that every kind of adapter can be used in one model and in one batch."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # PEFT writes it with safe_serialization=False


def cast_values(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Cast the values of an adapter to one dtype. Heads and masks stay as they are.

    Args:
        tensors: tensors by their names in a file.
        dtype: dtype of the values; None: no cast.

    Returns:
        A new dict with the same names.
    """
    return {
        key: value.to(dtype) if dtype is not None and is_ours(key) and value.is_floating_point() else value
        for key, value in tensors.items()
    }


def dropped_tensors(model: nn.Module, adapter_name: str, others: Iterable[str]) -> dict[str, Tensor]:
    """Collect the tensors of an adapter that PEFT would drop because their names contain the name of another adapter.

    Before saving an adapter, PEFT drops every tensor with the name of another adapter in it. If another adapter is
    called `weight`, `LayerNorm` or `0`, it would drop nearly all of ours.

    Args:
        model: the model that holds the adapter.
        adapter_name: the adapter to save.
        others: names of the other adapters.

    Returns:
        The tensors that would be lost, by their names in the model.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    own = {key: tensor for key, tensor in named.items() if of_adapter(key, adapter_name)}
    others = set(others)
    return {key: tensor.detach() for key, tensor in own.items() if others & set(key.split("."))}


def read_tensors(file: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of a weight file.

    Args:
        file: a safetensors file, or a file pickled by PEFT if its name ends in `.bin`.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        AdapterFileError: the file cannot be read, or holds anything but named tensors.
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
            raise ValueError("it claims to hold more than its size")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes may raise anything; torch's message advises to turn its check off
        raise ValueError(f"it is not a pickled state dict of tensors: {type(error).__name__}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError("it is not a state dict of tensors")
    return tensors
