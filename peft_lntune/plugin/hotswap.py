"""Hot swapping: the values of a saved adapter put in the place of another's, in the same tensors.

A compiled model is not compiled again by it. PEFT's `hotswap_adapter` knows LoRA alone; two functions that it calls are
wrapped, so that code which has imported it already has adapters of ours too.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from peft import PeftConfig
from peft.utils import hotswap, set_peft_model_state_dict
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from peft_lntune.config import LNTuneConfig, delta_part, parts_of, record_mask
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from peft_lntune.layers import LNTuneLayer
from peft_lntune.storage import without_adapter_name

__all__ = ["check_same_computation", "offer_hotswap"]

_MARK = "_lntune_hotswap"

# Fields that say how an adapter was made, chosen or saved. Where it sits is told by its tensors.
_FREE = set(PeftConfig.__dataclass_fields__) | {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layers_to_exclude", "roles"),
    *("modules_to_save", "delta_dtype", "save_dtype", "init_weights", "format_version", "peft_lntune_version"),
    *("manifest", "mask_source", "preset", "density", "fisher", "scope", "num_samples", "seed", "save_scores"),
    *("kind", "reduction_factor", "reparametrize", "init_lora_weights", "runtime_config", "parts"),
}


def offer_hotswap() -> None:
    """Let PEFT's `hotswap_adapter` take adapters of this package. Idempotent."""
    wraps = {
        "check_hotswap_configs_compatible": _guarded_check,
        "hotswap_adapter_from_state_dict": _guarded_swap,
    }
    originals = {name: getattr(hotswap, name) for name in wraps}
    for name, original in originals.items():
        if not getattr(original, _MARK, False):
            wrapped = functools.wraps(original)(wraps[name](original))
            setattr(wrapped, _MARK, True)
            setattr(hotswap, name, wrapped)


def check_same_computation(present: Any, saved: Any, adapter_name: str) -> None:
    """Raise where a saved adapter computes with its tensors in another way than the one whose place it takes.

    Args:
        present: the config of the adapter in the model.
        saved: the config of the saved one.
        adapter_name: the adapter in the model.

    Raises:
        ConfigError: a field that is not told by the tensors differs, such as a bottleneck's scale or LoRA's alpha.
    """
    one, two = list(parts_of(present)), list(parts_of(saved))
    if [_kind(part) for part in one] != [_kind(part) for part in two]:
        raise ConfigError(
            f"adapter {adapter_name!r} consists of {_kinds(one)}, and the saved one of {_kinds(two)}. Load it under "
            "another name."
        )
    for mine, its in zip(one, two, strict=True):
        fields, others = asdict(mine), asdict(its)
        for name in fields.keys() - _FREE:
            if fields[name] != others[name]:
                raise ConfigError(
                    f"adapter {adapter_name!r} has {name}={fields[name]!r}, and the saved one {others[name]!r}, so its "
                    "values would mean something else here. Load it under another name."
                )


def _kind(part: Any) -> str:
    # A Fisher adapter is an adapter of norms, whose masks are told by its tensors.
    return type(part).__name__.replace("FisherLN", "LNTuning")


def _kinds(parts: list[Any]) -> str:
    return ", ".join(_kind(part) for part in parts)


def _guarded_check(original: Callable[..., None]) -> Callable[..., None]:
    def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
        if config0.peft_type != PeftType.LNTUNE or config1.peft_type != PeftType.LNTUNE:
            original(config0, config1)
        # Of ours the adapter that is meant is looked at, which may be another than the active one that comes here.

    return check_hotswap_configs_compatible


def _guarded_swap(original: Callable[..., None]) -> Callable[..., None]:
    def hotswap_adapter_from_state_dict(
        model: nn.Module,
        state_dict: dict[str, Tensor],
        adapter_name: str,
        config: Any,
        parameter_prefix: str = "lora_",
    ) -> None:
        if isinstance(config, LNTuneConfig):
            _swap(getattr(model, "_orig_mod", model), state_dict, adapter_name, config)
        else:
            original(model, state_dict, adapter_name, config, parameter_prefix)

    return hotswap_adapter_from_state_dict


def _swap(model: Any, tensors: Mapping[str, Tensor], adapter_name: str, config: LNTuneConfig) -> None:
    """Write the tensors of a saved adapter, with the adapter's name in them, over those of `adapter_name`."""
    if adapter_name not in model.peft_config:
        raise ConfigError(f"adapter {adapter_name!r} not found; this model has {list(model.peft_config)}.")
    check_same_computation(model.peft_config[adapter_name], config, adapter_name)
    merged = [m.label for m in model.modules() if isinstance(m, LNTuneLayer) and adapter_name in m.merged_adapters]
    if merged:
        raise UnsupportedError(
            f"adapter {adapter_name!r} is merged at {merged[0]}, and unmerging would not restore the base model after "
            "a swap. Call unmerge_adapter() first."
        )
    plain = {without_adapter_name(name, adapter_name): value for name, value in tensors.items()}
    try:
        set_peft_model_state_dict(model, plain, adapter_name)
    except AdapterFileError as error:
        raise AdapterFileError(
            f"{error} A hot swap keeps the places and the number of tuned entries of adapter {adapter_name!r}; load an "
            "adapter with others under another name."
        ) from error
    norms = delta_part(config)
    if norms is not None:
        record_mask(model.peft_config, adapter_name, norms.mask_source)
