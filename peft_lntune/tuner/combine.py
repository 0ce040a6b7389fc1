"""Weighted combinations of adapters: sums of deltas, and PEFT's sparse ways of summing."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor, nn

from peft_lntune.config import DeltaConfig, LNTuneConfig, LNTuningConfig, UnifiedConfig, parts_of
from peft_lntune.core.delta_module import Delta
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import ConfigError
from peft_lntune.layers import PARAMETERS, ReplacementLayer
from peft_lntune.planning.targets import matches
from peft_lntune.tuner.concatenate import concatenated_parts

__all__ = ["COMBINATIONS", "MAJORITY_SIGNS", "combine", "combined_config"]

Combination = Callable[[list[Tensor], Tensor, float, str], Tensor]

COMBINATIONS: dict[str, Combination] = {
    "linear": lambda deltas, weights, density, sign: task_arithmetic(deltas, weights),
    "ties": ties,
    "dare_linear": lambda deltas, weights, density, sign: dare_linear(deltas, weights, density),
    "dare_ties": dare_ties,
    "magnitude_prune": lambda deltas, weights, density, sign: magnitude_prune(deltas, weights, density),
}
"""How deltas of one parameter become one: `(deltas, weights, density, majority_sign_method) -> delta`."""

MAJORITY_SIGNS = ("total", "frequency")
"""How the ties combinations may find the sign of the majority."""


def combined_config(
    model: nn.Module, configs: Mapping[str, LNTuneConfig], combination: str, density: float | None
) -> LNTuneConfig:
    """The config of a combined adapter, with a part for each method that one of its sources has.

    Norms (and other deltas): an `LNTuningConfig` that names every module that a source tunes; `combine` then leaves
    what none of them tunes. Bottlenecks and LoRA: as wide as those of the sources together.

    Args:
        model: holds the sources.
        configs: of the sources, by name.
        combination: one of `COMBINATIONS`.
        density: for the sparse ones.

    Raises:
        ConfigError: unknown combination, a density that is missing or out of range, or two sources that save the
            same module.
        UnsupportedError: the sources have parts whose combination is no such part.
    """
    if combination not in COMBINATIONS:
        raise ConfigError(f"combination_type={combination!r}: choose one of {', '.join(COMBINATIONS)}.")
    if combination != "linear" and not (density and 0 < density <= 1):
        raise ConfigError(f"combination_type={combination!r} keeps a fraction of the entries: give density in (0, 1].")
    saved = [module for config in configs.values() for module in config.modules_to_save or ()]
    if len(saved) > len(set(saved)):
        raise ConfigError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{sorted(saved)}. A head has no delta to sum; combine adapters without heads, then add one."
        )
    layers = [module for module in model.modules() if isinstance(module, ReplacementLayer)]
    sums = concatenated_parts(model, configs, combination)
    first = next(iter(configs.values()))
    shared = {"task_type": first.task_type, "inference_mode": first.inference_mode, "modules_to_save": saved or None}
    shared["base_model_name_or_path"] = first.base_model_name_or_path
    norms = _combined_deltas(model, layers, configs)
    if norms is not None and not sums:
        return replace(norms, **shared)
    return UnifiedConfig(parts=[*([] if norms is None else [norms]), *sums], **shared)


def _combined_deltas(
    model: nn.Module, layers: Sequence[ReplacementLayer], configs: Mapping[str, LNTuneConfig]
) -> LNTuningConfig | None:
    held = [
        (layer, p, layer.deltas(p)[name]) for layer in layers for p in PARAMETERS for name in _having(layer, p, configs)
    ]
    if not held:
        return None
    tuned = {parameter for _, parameter, _ in held}
    touched = sorted({layer.label for layer, _, _ in held})
    asked = {
        part.delta_dtype for config in configs.values() for part in parts_of(config) if isinstance(part, DeltaConfig)
    }
    widest = reduce(torch.promote_types, (delta.weight.dtype for _, _, delta in held))
    config = LNTuningConfig(
        target_modules=touched,
        tune="both" if len(tuned) > 1 else tuned.pop(),
        delta_dtype=asked.pop() if len(asked) == 1 else str(widest).removeprefix("torch."),
    )
    # Names in a list are endings of names, too: then say in one expression that just these are meant.
    alike = [name for name in base_modules(model) if matches(touched, name) and name not in touched]
    return replace(config, target_modules="|".join(map(re.escape, touched))) if alike else config


def _having(layer: ReplacementLayer, parameter: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in layer.deltas(parameter)]


def combine(
    layer: ReplacementLayer,
    adapters: Sequence[str],
    weights: Sequence[float],
    into: str,
    combination: str,
    density: float | None,
    majority_sign_method: str,
) -> bool:
    """Fill the deltas of adapter `into` in one layer; what is tuned is the union of what its sources tune.

    Returns:
        Whether some of the entries that the config of `into` selects here are left out, so that it has a mask.
    """
    narrowed = False
    for parameter in PARAMETERS:
        deltas = layer.deltas(parameter)
        present = [(deltas[name], weight) for name, weight in zip(adapters, weights, strict=True) if name in deltas]
        if into not in deltas:
            continue
        if not present:
            layer.set_mask(parameter, into, None)
            narrowed = True
            continue
        dense = [delta.dense().to(deltas[into].weight.dtype) for delta, _ in present]
        factors = torch.tensor([weight for _, weight in present], dtype=dense[0].dtype, device=dense[0].device)
        summed = COMBINATIONS[combination](dense, factors, density or 1.0, majority_sign_method)
        union = torch.stack([delta.tuned() for delta, _ in present]).any(0)
        if not union.all():
            layer.put(parameter, into, Delta.masked(union, summed.dtype, summed.device))
            narrowed = True
        deltas[into].fill(summed)
        deltas[into].requires_grad_(into in layer.active_adapters)
    return narrowed
