"""The parts of a unified adapter, and presets named after the combinations in papers."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import PeftType

from peft_lntune.config.base import FORMAT_VERSION, PART_KINDS, LNTuneConfig, check_format
from peft_lntune.config.bottleneck import BottleneckConfig
from peft_lntune.config.fisher_ln import FisherLNConfig
from peft_lntune.config.ln_tuning import LNTuningConfig
from peft_lntune.config.prefix import PrefixConfig
from peft_lntune.errors import ConfigError
from peft_lntune.version import INSTALL, __version__

__all__ = ["NAMED_PARTS", "build", "check_part", "parts_of_preset", "read_part"]

NAMED_PARTS: dict[str, Callable[[], list[PeftConfig]]] = {
    "ln": lambda: [LNTuningConfig()],
    "fisher-ln": lambda: [FisherLNConfig()],
    "lora": lambda: [LoraConfig()],
    "prefix": lambda: [PrefixConfig()],
    "mha-adapter": lambda: [BottleneckConfig(roles=["attention"])],
    "ffn-adapter": lambda: [BottleneckConfig(roles=["ffn"])],
    "mam": lambda: [PrefixConfig(), BottleneckConfig(position="parallel", roles=["ffn"], scale=4.0)],
}
"""The parts of each name in a preset. `mam`: mix-and-match, He et al. 2022 (arXiv 2110.04366)."""

# Options of LoRA that act beyond its own layers, each with its neutral value.
_LORA_ALONE: dict[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "kasa_config": None,
    "arrow_config": None,
    "megatron_config": None,
    "ensure_weight_tying": False,
}
_LORA_STARTS = (True, False, "gaussian", "orthogonal")  # the others change the base weights


def parts_of_preset(preset: Any) -> list[PeftConfig]:
    """Make the parts of a preset.

    Args:
        preset: names of `NAMED_PARTS` joined by `+`, such as `"prefix+mha-adapter+ln"`.

    Returns:
        A new config for each part.

    Raises:
        ConfigError: a name is unknown or given twice.

    Example:
        >>> [type(part).__name__ for part in parts_of_preset("mam+ln")]
        ['PrefixConfig', 'BottleneckConfig', 'LNTuningConfig']
    """
    names = preset.split("+") if isinstance(preset, str) else [preset]
    unknown = [name for name in names if name not in NAMED_PARTS]
    if unknown:
        raise ConfigError(
            f"preset={preset!r}: {unknown[0]!r} is unknown. Join some of {', '.join(NAMED_PARTS)} by '+', such as "
            "'prefix+mha-adapter+ln'."
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"preset={preset!r} names {twice[0]!r} twice; a part counts once.")
    return [part for name in names for part in NAMED_PARTS[name]()]


def read_part(stored: Any) -> PeftConfig:
    """Make a part from a config or from its JSON.

    Args:
        stored: a config, or the dict that a file holds for a part.

    Returns:
        A new config.

    Raises:
        ConfigError: `stored` is neither, or its kind cannot be a part.
    """
    if isinstance(stored, Mapping):
        if stored.get("peft_type") == PeftType.LORA:
            part: PeftConfig = PeftConfig.from_peft_type(**stored)
        else:
            part = build(stored, PART_KINDS)
    else:
        part = stored
    if type(part) not in (*PART_KINDS.values(), LoraConfig):
        raise ConfigError(
            f"parts holds a {type(part).__name__}; a part is one of {', '.join(PART_KINDS)} or PEFT's LoraConfig."
        )
    # A copy, because injection writes into the config.
    return replace(part)


def check_part(part: PeftConfig) -> None:
    """Refuse a part with options that only a whole adapter can have.

    Args:
        part: config of the part.

    Raises:
        ConfigError: the part sets `modules_to_save`, `save_dtype`, or an option of LoRA that acts beyond its own
            layers.
    """
    name = type(part).__name__
    for field in ("modules_to_save", "save_dtype"):
        if (value := getattr(part, field, None)) is not None:
            raise ConfigError(
                f"the part {name} has {field}={value!r}; parts are saved together, so give {field} to UnifiedConfig."
            )
    if isinstance(part, LNTuneConfig):
        return
    for field, neutral in _LORA_ALONE.items():
        if (value := getattr(part, field, neutral)) != neutral:
            raise ConfigError(
                f"the part {name} has {field}={value!r}, which reaches beyond its own layers, so it cannot be a part. "
                f"Leave it out ({field}={neutral!r}), or use LoRA as an adapter of its own."
            )
    if part.init_lora_weights not in _LORA_STARTS:
        raise ConfigError(
            f"the part {name} has init_lora_weights={part.init_lora_weights!r}, which changes the weights of the base "
            f"model for every other adapter. Use one of {', '.join(map(repr, _LORA_STARTS))}."
        )


def build(stored: Mapping[str, Any], kinds: Mapping[str, type[LNTuneConfig]]) -> LNTuneConfig:
    """Make a config from saved fields. Fields that its class does not have are left out, with PEFT's warning.

    Args:
        stored: the fields, as JSON has them.
        kinds: the allowed classes by name.

    Returns:
        The config.

    Raises:
        ConfigError: the kind is unknown, or the format is of another version.
    """
    name = stored.get("kind", LNTuningConfig.__name__)  # a dict written by hand may lack it
    check_format(stored.get("format_version", FORMAT_VERSION))  # first, since a newer format may differ in everything
    if not isinstance(name, str) or name not in kinds:
        raise ConfigError(
            f"this adapter is of kind {name!r}, and peft_lntune {__version__} knows {', '.join(sorted(kinds))}. "
            f"Upgrade with `{INSTALL} -U`, or check where the file comes from."
        )
    kind = kinds[name]
    known = {field.name for field in fields(kind)}
    unknown = sorted(stored.keys() - known)
    if unknown:
        # PEFT's own fallback would filter by the fields of the registered class and so lose those of the kind.
        warnings.warn(
            f"Unexpected keyword arguments {unknown} for class {name}, these are ignored. This probably means that "
            "you're loading a configuration file that was saved using a higher version of the library and "
            "additional parameters have been introduced since. It is highly recommended to upgrade with "
            f"`{INSTALL} -U`.",
            stacklevel=3,
        )
    return kind(**{name: value for name, value in stored.items() if name in known})
