"""A LoRA adapter that PEFT has saved, as the LoRA part of one of ours."""

import os

import torch
from peft import LoraConfig, PeftModel

from peft_lntune.config import LNTuneConfig, parts_of
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.interop.foreign import check_foreign, read_foreign
from peft_lntune.storage.keys import has_lora, is_part, without_adapter_name
from peft_lntune.tuner.restoring import told_by_us

__all__ = ["load_lora"]

_SAME = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def load_lora(peft_model: PeftModel, directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Take the weights of a LoRA adapter that PEFT saved into the LoRA part of an adapter.

    Make that part from the same directory, by `UnifiedConfig(parts=[..., LoraConfig.from_pretrained(directory)])`.

    Args:
        peft_model: a model with an adapter that has a LoRA part.
        directory: what PEFT's `save_pretrained` wrote, or a repository on the Hub.
        adapter_name: the adapter.

    Raises:
        ConfigError: the adapter is unknown or has no LoRA part, or its ranks and scales are not those of the directory.
        AdapterFileError: the tensors are not those of this part. After an error nothing has changed.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from peft_lntune import LNTuningConfig, UnifiedConfig
        >>> directory = tempfile.mkdtemp()
        >>> def model():
        ...     return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> get_peft_model(model(), LoraConfig(target_modules=["0"])).save_pretrained(directory)
        >>> parts = [LNTuningConfig(), LoraConfig.from_pretrained(directory)]
        >>> peft_model = get_peft_model(model(), UnifiedConfig(parts=parts))
        >>> load_lora(peft_model, directory)
    """
    config = peft_model.peft_config.get(adapter_name)
    part = next((p for p in parts_of(config) if isinstance(p, LoraConfig)), None) if config is not None else None
    if not isinstance(config, LNTuneConfig) or part is None:
        raise ConfigError(
            f"adapter {adapter_name!r} has no LoRA part to load into. Make it with "
            "UnifiedConfig(parts=[..., LoraConfig.from_pretrained(directory)])."
        )
    with told_by_us(directory, lambda: True):
        _load(peft_model, directory, adapter_name, part)


def _load(peft_model: PeftModel, directory: str | os.PathLike, adapter_name: str, part: LoraConfig) -> None:
    saved, file = read_foreign(directory, "LORA", "load_lora")
    wrong = [name for name in _SAME if getattr(saved, name) != getattr(part, name)]
    if wrong:
        raise ConfigError(
            f"{directory} was saved with {wrong[0]}={getattr(saved, wrong[0])!r}, and the LoRA part of adapter "
            f"{adapter_name!r} has {getattr(part, wrong[0])!r}. Make it from LoraConfig.from_pretrained(directory)."
        )
    named = {name: tensor for name, tensor in peft_model.state_dict().items() if is_part(name, adapter_name)}
    targets = {without_adapter_name(name, adapter_name): tensor for name, tensor in named.items()}
    targets = {name: tensor for name, tensor in targets.items() if has_lora([name])}
    # PEFT leaves `.weight` off the name of DoRA's magnitudes in a file.
    found = {name if name in targets else f"{name}.weight": tensor for name, tensor in file.tensors.items()}
    differing = targets.keys() ^ found.keys()
    shapes = [name for name in targets.keys() & found.keys() if targets[name].shape != found[name].shape]
    if differing or shapes:
        first = min(differing or shapes)
        raise AdapterFileError(
            f"{directory} does not fit the LoRA part of adapter {adapter_name!r}: {len(differing)} names and "
            f"{len(shapes)} shapes differ, the first is {first}. It was trained on another model or other modules."
        )
    check_foreign(found, targets, str(file.weights))
    with torch.no_grad():
        for name, tensor in found.items():
            targets[name].copy_(tensor)
