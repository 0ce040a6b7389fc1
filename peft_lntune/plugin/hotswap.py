"""Hot swapping: the values of a saved adapter put in the place of another's, in the same tensors.

A compiled model is not compiled again by it. PEFT's `hotswap_adapter` knows LoRA alone; two functions that it calls are
wrapped, so that code which has imported it already has adapters of ours too.
"""

from collections.abc import Callable, Mapping
from typing import Any

from peft.utils import hotswap, set_peft_model_state_dict
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from peft_lntune.config import LNTuneConfig, record_mask
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.plugin.wrapping import wrap_once
from peft_lntune.storage.keys import without_adapter_name
from peft_lntune.tuner.replacement import check_replacement

__all__ = ["offer_hotswap"]


def offer_hotswap() -> None:
    """Let PEFT's `hotswap_adapter` take adapters of this package. Idempotent."""
    wrap_once(
        [
            (hotswap, "check_hotswap_configs_compatible", _guarded_check),
            (hotswap, "hotswap_adapter_from_state_dict", _guarded_swap),
        ]
    )


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
    check_replacement(model, adapter_name, config)
    plain = {without_adapter_name(name, adapter_name): value for name, value in tensors.items()}
    try:
        set_peft_model_state_dict(model, plain, adapter_name)
    except AdapterFileError as error:
        raise AdapterFileError(
            f"{error} A hot swap keeps the places and the number of tuned entries of adapter {adapter_name!r}; load an "
            "adapter with others under another name."
        ) from error
    norms = config.deltas
    if norms is not None:
        record_mask(model.peft_config, adapter_name, norms.mask_source)
