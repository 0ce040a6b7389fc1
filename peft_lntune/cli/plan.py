"""What a config would tune in the model of a folder, without loading weights."""

from typing import Any

from peft_lntune.cli.models import empty_model
from peft_lntune.config import LNTuneConfig, LNTuningConfig, StoredConfig, UnifiedConfig
from peft_lntune.planning.plan import plan
from peft_lntune.planning.types import Plan

__all__ = ["make_config", "plan_model"]


def plan_model(model: str, config: LNTuneConfig) -> tuple[Plan, int]:
    """Plan what a config would tune in the model of a folder, without loading weights.

    Args:
        model: folder with a `config.json`, or a name on the Hub.
        config: any config of this package. If it was loaded with an adapter, the entries that the adapter tunes
            are counted.

    Returns:
        The plan, and the number of parameters of the whole model.

    Raises:
        NoMatchError: the config selects nothing.
        ConfigError: two parts tune the same module.
        UnsupportedError: a part selects a module that its method does not work on.
    """
    empty = empty_model(model)
    counts = (config.manifest or {}).get("tuned")
    return plan(empty, config, counts), sum(parameter.numel() for parameter in empty.parameters())


def make_config(preset: str | None = None, adapter: str | None = None, **options: Any) -> LNTuneConfig:
    """Make the config that the options of `peft-lntune plan` describe.

    Args:
        preset: parts joined by `+`.
        adapter: folder of a saved adapter.
        **options: fields of a `LNTuningConfig`; empty ones are left out.

    Returns:
        The config of the adapter, of the preset, or of the options.

    Raises:
        ConfigError: the preset or an option has a value that is not allowed.
        AdapterFileError: the adapter is damaged or missing.
    """
    if adapter:
        return StoredConfig.from_pretrained(adapter)
    if preset:
        return UnifiedConfig(preset=preset)
    return LNTuningConfig(**{name: value for name, value in options.items() if value})
