"""Weighted sums of what is not additive in its parameters, but exact as one wider whole: bottlenecks and LoRA.

    w_1 s_1 U_1 f(D_1 x) + w_2 s_2 U_2 f(D_2 x) = [w_1 s_1 U_1, w_2 s_2 U_2] f([D_1; D_2] x)

LoRA is the case without f. The softmax over prefixes has no such form.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from peft_lntune.config import BottleneckConfig, LNTuneConfig, SupermaskConfig, parts_of
from peft_lntune.errors import UnsupportedError
from peft_lntune.layers import BottleneckLayer, PrefixLayer
from peft_lntune.layers.bottleneck import check_combine, combine_bottlenecks
from peft_lntune.planning.inserted import plan_bottlenecks
from peft_lntune.planning.lora import LoraLayer

__all__ = ["concatenate", "concatenated_parts"]


def concatenated_parts(model: nn.Module, configs: Mapping[str, LNTuneConfig], combination: str) -> list[PeftConfig]:
    """The bottleneck and LoRA parts of a weighted sum of adapters; empty where these have none.

    Args:
        model: holds the adapters.
        configs: of the adapters, by name.
        combination: only `"linear"` sums these parts.

    Raises:
        UnsupportedError: an adapter has a prefix or supermasks; another combination is asked for; or the parts differ
            in what one part cannot be two of (position, activation; widths within one role; DoRA). Nothing has changed.
    """
    names = list(configs)
    for name, config in configs.items():
        if any(isinstance(part, SupermaskConfig) for part in parts_of(config)):
            raise UnsupportedError(
                f"adapter {name!r} has supermasks, and a weighted sum of masks is no mask. Make several active "
                f"instead, which keeps what all of them keep: peft_model.base_model.set_adapter({names!r})."
            )
    for name, module in model.named_modules():
        held = [n for n in names if isinstance(module, PrefixLayer) and module.holds(n)]
        if held:
            raise UnsupportedError(
                f"adapter {held[0]!r} has a prefix ({name.rpartition('.')[0]}), and attention over two prefixes is no "
                f"weighted sum of attention over each. Make both active instead: set_adapter({names!r})."
            )
    parts = [*_bottlenecks(model, names), *_lora(model, configs)]
    if parts and combination != "linear":
        raise UnsupportedError(
            f"combination_type={combination!r} is for deltas; {', '.join(sorted({type(p).__name__ for p in parts}))} "
            'parts are summed by "linear" alone.'
        )
    return parts


def _bottlenecks(model: nn.Module, names: Sequence[str]) -> list[PeftConfig]:
    """A part for each role and width: in a layer that only one source tunes the sum is no wider than that source."""
    alike: dict[tuple[str, int], list[BottleneckLayer]] = {}
    for layer in model.modules():
        if isinstance(layer, BottleneckLayer) and any(layer.holds(name) for name in names):
            check_combine(layer, names)
            width = sum(layer.size_of(name) for name in names if layer.holds(name))
            alike.setdefault((layer.role, width), []).append(layer)
    parts: list[PeftConfig] = []
    for (role, width), layers in alike.items():
        recipe = layers[0].recipe(next(name for name in names if layers[0].holds(name)))
        config = BottleneckConfig(
            position=recipe.position,
            activation=recipe.activation,
            roles=[role],
            bottleneck_size=width,
            layers_to_transform=_layers_of(layers),
        )
        # Layers are told by numbers alone, and an encoder's and a decoder's have the same ones.
        others = sorted(plan_bottlenecks(model, config).parts.keys() - {layer.label for layer in layers})
        parts.append(replace(config, exclude_modules=others or None))
    return parts


def _layers_of(layers: Sequence[BottleneckLayer]) -> list[int] | None:
    numbers = [[int(part) for part in layer.label.split(".") if part.isdigit()][:1] for layer in layers]
    return sorted({number for found in numbers for number in found}) or None


def _lora(model: nn.Module, configs: Mapping[str, LNTuneConfig]) -> list[PeftConfig]:
    parts = {name: p for name, c in configs.items() for p in parts_of(c) if isinstance(p, LoraConfig)}
    if not parts:
        return []
    for name, part in parts.items():
        if part.use_dora:
            raise UnsupportedError(f"adapter {name!r} has a LoRA part with use_dora=True, which is not additive.")
    ranks = {
        name.removesuffix(".base_layer"): rank
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and (rank := sum(_ranks(layer).get(n, 0) for n in parts))
    }
    rank = max(ranks.values())
    fewer = {re.escape(name): own for name, own in ranks.items() if own != rank}
    return [LoraConfig(r=rank, lora_alpha=rank, rank_pattern=fewer, alpha_pattern=fewer, target_modules=sorted(ranks))]


def concatenate(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], into: str) -> None:
    """Fill the bottlenecks and LoRA of adapter `into`, made by `concatenated_parts`, with a weighted sum of others."""
    for layer in model.modules():
        if isinstance(layer, BottleneckLayer) and layer.holds(into):
            combine_bottlenecks(layer, adapters, weights, into)
        elif isinstance(layer, LoraLayer) and into in _ranks(layer):
            _concatenate_lora(layer, adapters, weights, into)


@torch.no_grad()
def _concatenate_lora(layer: Any, adapters: Sequence[str], weights: Sequence[float], into: str) -> None:
    first, second, scaling = *_matrices(layer, into), layer.scaling
    first.zero_()
    second.zero_()
    start = 0
    for name, weight in zip(adapters, weights, strict=True):
        if name not in _ranks(layer):
            continue
        a, b = _matrices(layer, name)
        rows = slice(start, start := start + len(a))
        first[rows] = a
        second[:, rows] = b * (weight * scaling[name] / scaling[into])


def _ranks(layer: Any) -> dict[str, int]:
    """The rank of each adapter in a LoRA layer."""
    return {name: len(_matrices(layer, name)[0]) for name in (*layer.lora_A, *layer.lora_embedding_A)}


def _matrices(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A, with the rank first, and B, with the rank second, of an adapter; also of an embedding and a convolution."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight
