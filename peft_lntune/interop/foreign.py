"""Adapters in formats of PEFT's own, which no manifest covers."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from peft_lntune.errors import AdapterFileError
from peft_lntune.storage.manifest import is_finite
from peft_lntune.storage.saved_adapter import SavedAdapter

__all__ = ["check_foreign", "read_foreign"]


def read_foreign(directory: str | os.PathLike, peft_type: str, reader: str) -> tuple[Any, SavedAdapter]:
    """The config of an adapter that PEFT has saved, and its files.

    Args:
        directory: what PEFT's `save_pretrained` wrote, or a repository on the Hub.
        peft_type: which type of adapter it must be.
        reader: who reads it, for errors.

    Returns:
        The config of PEFT's own class, and the files, of which none but the config has been read.

    Raises:
        AdapterFileError: it is of another type.
    """
    config = PeftConfig.from_pretrained(str(directory))
    if config.peft_type != peft_type:
        raise AdapterFileError(
            f"{directory} holds an adapter of PEFT type {config.peft_type}, and {reader} reads {peft_type}. Load it by "
            "PeftModel.from_pretrained."
        )
    return config, SavedAdapter(directory, {})


def check_foreign(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], where: str) -> None:
    """Raise where tensors that no manifest covers cannot be as they were saved.

    Args:
        tensors: of a file in a format of PEFT's own.
        like: the tensors of the model that they are for, by the same names. A file has one dtype where the model has.
        where: the file, for the message.

    Raises:
        AdapterFileError: a value is not finite, a dtype is not floating, or not that of the others.
    """
    dtypes: dict[torch.dtype, tuple[str, torch.dtype]] = {}
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            raise AdapterFileError(f"{where}: {name} should be of a floating dtype, but is {tensor.dtype}.")
        if not is_finite(tensor):
            raise AdapterFileError(
                f"{where}: {name} holds NaN or infinite values. The training that wrote it diverged, or the file is "
                "damaged; take an earlier checkpoint."
            )
        if name in like:
            first, dtype = dtypes.setdefault(like[name].dtype, (name, tensor.dtype))
            if dtype != tensor.dtype:
                raise AdapterFileError(
                    f"{where}: {name} is {tensor.dtype}, and {first} is {dtype}, while both are of one dtype in the "
                    "model. The file was changed since it was saved; get a good copy."
                )
