"""The methods of tuning, a file each, and the table that finds the one of a config.

To add a method: its config in `config/`, its layer in `layers/`, the method here, and its row in `METHODS`.
"""

from peft import LoraConfig, PeftConfig

from peft_lntune.config import (
    BottleneckConfig,
    FisherLNConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    PrefixConfig,
    SupermaskConfig,
)
from peft_lntune.errors import ConfigError
from peft_lntune.planning.methods.bottleneck import Bottlenecks
from peft_lntune.planning.methods.deltas import Deltas
from peft_lntune.planning.methods.lora import Lora
from peft_lntune.planning.methods.method import Injection, Method, Spot, WeightedSum
from peft_lntune.planning.methods.prefix import Prefixes
from peft_lntune.planning.methods.supermask import Supermasks

__all__ = ["METHODS", "Injection", "Method", "Spot", "WeightedSum", "method_of"]

_DELTAS = Deltas()

METHODS: dict[type[PeftConfig], Method] = {
    LNTuningConfig: _DELTAS,
    FisherLNConfig: _DELTAS,
    ModuleTuningConfig: _DELTAS,
    SupermaskConfig: Supermasks(),
    BottleneckConfig: Bottlenecks(),
    PrefixConfig: Prefixes(),
    LoraConfig: Lora(),
}
"""The method of each config that a part of an adapter may have."""


def method_of(config: PeftConfig) -> Method:
    """The method that a config is for.

    Args:
        config: of one part of an adapter, of a class in `METHODS` or one that extends it.

    Returns:
        The method.

    Raises:
        ConfigError: this package tunes nothing by such a config.

    Example:
        >>> method_of(LNTuningConfig()).name
        'delta'
    """
    found = next((METHODS[kind] for kind in type(config).__mro__ if kind in METHODS), None)
    if found is None:
        known = ", ".join(kind.__name__ for kind in METHODS)
        raise ConfigError(f"{type(config).__name__} is no config of this package, which knows {known}.")
    return found
