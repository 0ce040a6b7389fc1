"""Reading and checking adapters in PEFT's own formats, which have no manifest."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from peft_lntune.config import LNTuneConfig
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.storage.manifest import is_finite
from peft_lntune.storage.saved_adapter import SavedAdapter

__all__ = ["check_foreign", "own_config", "read_foreign"]


def own_config(peft_model: PeftModel, adapter_name: str) -> LNTuneConfig:
    """The config of an adapter of this package, to be written in a format of PEFT's own.

    Args:
        peft_model: the model.
        adapter_name: the adapter.

    Returns:
        The config.

    Raises:
        ConfigError: the model has no such adapter, or it is not of this package.
    """
    config = peft_model.peft_config.get(adapter_name)
    if not isinstance(config, LNTuneConfig):
        known = [name for name, other in peft_model.peft_config.items() if isinstance(other, LNTuneConfig)]
        raise ConfigError(f"no adapter of this package is named {adapter_name!r}; this model has {known}.")
    return config


def read_foreign(directory: str | os.PathLike, peft_type: str, reader: str) -> tuple[Any, SavedAdapter]:
    """Read the config of an adapter that PEFT saved.

    Args:
        directory: the folder that PEFT's `save_pretrained` wrote, or a repository on the Hub.
        peft_type: the required type of adapter.
        reader: the calling function, for errors.

    Returns:
        The config, of PEFT's own class, and the adapter, whose weights are not read yet.

    Raises:
        AdapterFileError: the adapter is of another type.
    """
    config = PeftConfig.from_pretrained(str(directory))
    if config.peft_type != peft_type:
        raise AdapterFileError(
            f"{directory} holds an adapter of PEFT type {config.peft_type}, and {reader} reads {peft_type}. Load it "
            "with PeftModel.from_pretrained."
        )
    return config, SavedAdapter(directory, {})


def check_foreign(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors without a manifest that were evidently changed after saving.

    Args:
        tensors: tensors of a file in a format of PEFT's own, by name.
        like: tensors of the model by the same names. Tensors of one dtype in the model must have one dtype in the file.
        where: the file, for the message.

    Raises:
        AdapterFileError: a value is not finite, or a dtype is not floating or differs from that of the others.
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
                    "model. The file was changed after it was saved; get a good copy."
                )
