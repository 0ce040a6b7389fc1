"""PEFT's LoRA format: loads it into the LoRA part of an adapter, and writes adapters of norms in it."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_lntune.config import LNTuneConfig, LNTuningConfig, parts_of
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from peft_lntune.interop.foreign import check_foreign, own_config, read_foreign
from peft_lntune.interop.lora_export import LoraExporter, left_as_it_was
from peft_lntune.interop.lora_report import RANKS, LoraExport
from peft_lntune.storage.keys import has_lora, is_part, without_adapter_name
from peft_lntune.storage.manifest import PROVENANCE
from peft_lntune.tuner.restoring import told_by_us

__all__ = ["load_lora", "to_lora"]

_PLAIN = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "runtime_config",
    *PROVENANCE,
    "task_type",
    "peft_type",
}
"""Fields of a LoRA part that leave it a product of two matrices beside a linear map."""

_SAME = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def load_lora(peft_model: PeftModel, directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Load the weights of a LoRA adapter saved by PEFT into the LoRA part of an adapter.

    Make that part from the same folder: `UnifiedConfig(parts=[..., LoraConfig.from_pretrained(directory)])`.

    Args:
        peft_model: a model with an adapter that has a LoRA part.
        directory: the folder that PEFT's `save_pretrained` wrote, or a repository on the Hub.
        adapter_name: the adapter.

    Raises:
        ConfigError: the adapter is unknown or has no LoRA part, or its ranks and scales differ from the saved ones.
        AdapterFileError: the tensors do not fit this part. After an error nothing has changed.

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
    # PEFT drops `.weight` from the names of DoRA's magnitudes in a file.
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


def to_lora(
    peft_model: PeftModel,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    rank: int | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    unfoldable: str = "refuse",
    every_layer: bool = True,
) -> LoraExport:
    """Write an adapter of norms as an ordinary LoRA adapter of PEFT, for servers that take LoRA alone.

    The change of a norm's gain becomes LoRA on the linear maps that read the norm. With k tuned entries it has rank k,
    and is exact if k is at most `rank`; otherwise it is truncated to the nearest change of that rank. A LoRA part of
    the adapter becomes part of the same LoRA, and heads in `modules_to_save` are saved with it.

    What cannot be folded: a norm whose output something else than linear maps reads (post-norms, norms of queries and
    keys, experts), a change of a norm with a bias, entries where the gain is 0, and linear maps that share their weight
    with the embeddings. Bottlenecks, prefixes, supermasks and deltas on other modules are refused.

    The folder is written only if PEFT, loading it into the base model, gives the logits of the adapter on a few tokens.

    Args:
        peft_model: a model with adapters of this package, not merged.
        directory: folder for `adapter_config.json` and `adapter_model.safetensors`; made if it is missing.
        adapter_name: the adapter.
        rank: rank of the LoRA on each linear map; smaller changes are padded with zeros. None: the smallest of 8, 16,
            32, 64, 128, 256, 320 and 512 at which the LoRA is exact.
        batches: inputs of the model, dicts, a thousand tokens or more, of the kind it is used with. They decide which
            directions a truncation keeps; the first is also used for the check. None: every direction counts alike,
            and the check takes random tokens.
        unfoldable: what to do with norms that cannot be folded: `"refuse"` to raise, or `"drop"` to leave them out.
        every_layer: if a type of linear map, such as `q_proj`, is tuned in some layers, write LoRA of zeros for it in
            the others. LoRAX needs this: otherwise it drops the type in all layers, without an error. vLLM, SGLang and
            PEFT do not, and False makes the file smaller. It changes nothing where all layers are tuned.

    Returns:
        What was written, and how near it is to the adapter.

    Raises:
        ConfigError: there is no such adapter, no rank is exact and none was given (the message lists the ranks with
            their errors), or it is not known how to run the model.
        UnsupportedError: the adapter holds something that LoRA cannot hold, it is merged, or the check failed. Nothing
            is written.

    Example:
        >>> import tempfile
        >>> from peft import PeftConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_lntune import LNTuningConfig
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 9}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> peft_model = get_peft_model(model, LNTuningConfig(init_weights=False))
        >>> directory = tempfile.mkdtemp()
        >>> to_lora(peft_model, directory).exact, PeftConfig.from_pretrained(directory).peft_type.value
        (True, 'LORA')
    """
    config = _checked(peft_model, adapter_name, rank, unfoldable)
    more = iter(() if batches is None else batches)
    first = next(more, None)
    if batches is not None and first is None:
        raise ConfigError("batches is empty. Give dicts of the model's inputs, or None for random tokens.")
    with left_as_it_was(peft_model):
        exporter = LoraExporter(peft_model, adapter_name, config, first)
        given = () if first is None else chain([first], more)
        return exporter.export(Path(directory), rank, given, unfoldable, every_layer)


def _checked(peft_model: PeftModel, adapter_name: str, rank: int | None, unfoldable: str) -> LNTuneConfig:
    """The config of the adapter, which holds nothing that LoRA could not hold."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(
            f"rank={rank!r} should be a whole number, at least 1. Servers take {', '.join(map(str, RANKS))}."
        )
    if unfoldable not in ("refuse", "drop"):
        raise ConfigError(f'unfoldable={unfoldable!r}: choose "refuse" or "drop".')
    config = own_config(peft_model, adapter_name)
    for part in parts_of(config):
        if isinstance(part, LoraConfig):
            _check_plain(part, adapter_name)
        elif not isinstance(part, LNTuningConfig):
            raise UnsupportedError(
                f"adapter {adapter_name!r} has a part ({type(part).__name__}) that LoRA cannot hold. Save it with "
                "save_pretrained, or merge what can be merged."
            )
    if any(module.merged for module in peft_model.modules() if isinstance(module, BaseTunerLayer)):
        raise UnsupportedError("an adapter is merged into the base model; call unmerge_adapter() first.")
    return config


def _check_plain(part: LoraConfig, adapter_name: str) -> None:
    plain = LoraConfig()
    strange = [
        own.name
        for own in fields(part)
        if own.name not in _PLAIN and getattr(part, own.name) != getattr(plain, own.name)
    ]
    if strange:
        raise UnsupportedError(
            f"adapter {adapter_name!r} has a LoRA part with {strange[0]}={getattr(part, strange[0])!r}, which is more "
            "than a product of two matrices beside a linear map. Save it with save_pretrained, or merge it."
        )
