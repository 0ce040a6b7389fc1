"""The config of a weighted combination of adapters; how each method is summed is in `planning/methods`."""

from collections.abc import Mapping
from dataclasses import replace

from peft import PeftConfig

from peft_lntune.config import LNTuneConfig, UnifiedConfig, parts_of
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.methods import METHODS, WeightedSum, method_of
from peft_lntune.planning.methods.deltas import COMBINATIONS

__all__ = ["combined_config"]

_MAJORITY_SIGNS = ("total", "frequency")


def combined_config(facts: ModelFacts, configs: Mapping[str, LNTuneConfig], wanted: WeightedSum) -> LNTuneConfig:
    """The config of a combined adapter, with parts for each method that one of its sources has.

    Args:
        facts: of the model that holds the sources.
        configs: of the sources, by name.
        wanted: the combination.

    Returns:
        A new config, not yet injected.

    Raises:
        ConfigError: unknown combination or way to find signs, a density that is missing or out of range, or two sources
            that save the same module.
        UnsupportedError: the sources have parts whose combination is no such part. Nothing has changed.
    """
    if wanted.majority_sign_method not in _MAJORITY_SIGNS:
        allowed = ", ".join(map(repr, _MAJORITY_SIGNS))
        raise ConfigError(f"majority_sign_method={wanted.majority_sign_method!r}: choose one of {allowed}.")
    kind, density = wanted.combination, wanted.density
    if kind not in COMBINATIONS:
        raise ConfigError(f"combination_type={kind!r}: choose one of {', '.join(COMBINATIONS)}.")
    if kind != "linear" and not (density and 0 < density <= 1):
        raise ConfigError(f"combination_type={kind!r} keeps a fraction of the entries: give density in (0, 1].")
    saved = [module for config in configs.values() for module in config.modules_to_save or ()]
    if len(saved) > len(set(saved)):
        raise ConfigError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{sorted(saved)}. A head has no delta to sum; combine adapters without heads, then add one."
        )
    deltas, others = list[PeftConfig](), list[PeftConfig]()
    for method in dict.fromkeys(METHODS.values()):
        parts = {name: [p for p in parts_of(config) if method_of(p) is method] for name, config in configs.items()}
        parts = {name: own for name, own in parts.items() if own}
        if parts:
            (deltas if method.has_masks else others).extend(method.sum_parts(facts, parts, wanted))
    if others and kind != "linear":
        raise UnsupportedError(
            f"combination_type={kind!r} is for deltas; {', '.join(sorted({type(p).__name__ for p in others}))} parts "
            'are summed by "linear" alone.'
        )
    first = next(iter(configs.values()))
    shared = {"task_type": first.task_type, "inference_mode": first.inference_mode, "modules_to_save": saved or None}
    shared["base_model_name_or_path"] = first.base_model_name_or_path
    if isinstance(own := deltas[0] if deltas else None, LNTuneConfig) and not others:
        return replace(own, **shared)
    return UnifiedConfig(parts=[*deltas, *others], **shared)
