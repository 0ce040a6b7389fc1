"""PEFT's LoRA as a part of our adapters: its layers are made, found and filled by PEFT's own code.

A weighted sum of LoRA adapters is one of a higher rank, exactly:

    w_1 s_1 B_1 A_1 x + w_2 s_2 B_2 A_2 x = [w_1 s_1 B_1, w_2 s_2 B_2] [A_1; A_2] x
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lntune.architectures.table import lora_targets
from peft_lntune.config import parts_of
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.layers.offloaded import all_onloaded
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.methods.method import Counts, Injection, Method, Spot, WeightedSum
from peft_lntune.planning.types import Plan, PlannedModule

__all__ = ["Lora"]


class Lora(Method):
    """PEFT's LoRA."""

    name = "lora"

    def resolve(self, facts: ModelFacts, config: LoraConfig) -> LoraConfig:
        """The config with target modules: by PEFT's list for the model's type, or by the table of architectures.

        Raises:
            ConfigError: there are no default target modules for this model.
        """
        try:
            reader = LoraModel.__new__(LoraModel)  # the method reads a table of its class; PEFT's init would inject
            known = reader._prepare_adapter_config(replace(config), LoraModel.get_model_config(facts.model))
        except ValueError as error:
            usual = lora_targets(facts.modules)
            if usual is None:
                raise ConfigError(
                    "neither PEFT nor peft_lntune knows default target modules of LoRA for this model. Name them: "
                    'LoraConfig(target_modules=["q_proj", "v_proj"]).'
                ) from error
            known = replace(config, target_modules=list(usual))
        known = tuners_utils._maybe_include_all_linear_layers(known, facts.model)
        if any(isinstance(module, Conv1D) for module in facts.modules.values()) and all(
            isinstance(module, Conv1D) for _, module in _matched(facts, known)
        ):
            known = replace(known, fan_in_fan_out=True)  # GPT-2's linear maps have their weight the other way round
        return known

    def plan(self, facts: ModelFacts, config: LoraConfig, counts: Counts = None) -> Plan:
        """The modules that LoRA matches, with the entries of its two matrices.

        Raises:
            ConfigError: none matches, or a match is no linear map.
        """
        found = dict(_matched(facts, config))
        if not found:
            raise ConfigError(
                f"the LoRA part's target_modules={config.target_modules!r} match no module of this model. Name some "
                'that it has, or use target_modules="all-linear".'
            )
        parts = {}
        for name, module in found.items():
            sides, kind = _sides(module), type(module).__name__
            if not sides:
                raise ConfigError(
                    f"the LoRA part matches {name} ({kind}), which is no linear map, embedding or convolution. Name "
                    "the modules inside it, or leave it out with exclude_modules."
                )
            size = _rank(config, name) * sides
            parts[name] = PlannedModule(name, kind, None, {"lora": (size, size)}, 4 * size, self.name)
        return Plan(parts)

    def inject(self, tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        LoraPart(tuner).inject_adapter(model, adapter_name, *args, **kwargs)

    def put(self, tuner: BaseTuner, injection: Injection, config: Any, adapter_name: str, spot: Spot) -> None:
        raise AssertionError("PEFT puts its LoRA in by itself, see LoraPart")

    def recorded(self, given: LoraConfig, injected: Any) -> LoraConfig:
        """With what was chosen as targets by the model's type, so that loading need not choose again."""
        return replace(given, target_modules=injected.target_modules, fan_in_fan_out=injected.fan_in_fan_out)

    def sum_parts(self, facts: ModelFacts, parts: Mapping[str, Sequence[Any]], wanted: WeightedSum) -> list[PeftConfig]:
        for name, own in parts.items():
            if any(part.use_dora for part in own):
                raise UnsupportedError(f"adapter {name!r} has a LoRA part with use_dora=True, which is not additive.")
        ranks = {
            name.removesuffix(".base_layer"): rank
            for name, layer in facts.model.named_modules()
            if isinstance(layer, LoraLayer) and (rank := sum(_ranks(layer).get(n, 0) for n in parts))
        }
        rank = max(ranks.values())
        fewer = {re.escape(name): own for name, own in ranks.items() if own != rank}
        how = {"rank_pattern": fewer, "alpha_pattern": fewer}
        return [LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(ranks), **how)]

    def sum_into(self, model: nn.Module, wanted: WeightedSum, into: str) -> bool:
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and into in _ranks(layer):
                _concatenate(layer, wanted.totals, into)
        return False


class LoraPart(LoraModel):
    """PEFT's LoRA tuner for a moment, at work in the model of another tuner. It owns nothing and replaces nothing.

    Args:
        tuner: the other one.
    """

    def __init__(self, tuner: Any) -> None:
        nn.Module.__init__(self)  # PEFT's own would inject, and put its configs into the model
        self.model = tuner.model
        self.peft_config = {
            name: next((part for part in parts_of(config) if isinstance(part, LoraConfig)), config)
            for name, config in tuner.peft_config.items()
        }
        self.active_adapter = tuner.active_adapters
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []

    def _create_and_replace(self, config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:
        with all_onloaded(target):  # PEFT puts an adapter where it finds the base's weight
            super()._create_and_replace(config, adapter_name, target, *args, **kwargs)


def _matched(facts: ModelFacts, config: LoraConfig) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in facts.modules.items() if n and LoraModel._check_target_module_exists(config, n)]


@torch.no_grad()
def _concatenate(layer: Any, weights: Mapping[str, float], into: str) -> None:
    first, second, scaling = *_matrices(layer, into), layer.scaling
    first.zero_()
    second.zero_()
    start = 0
    for name, weight in weights.items():
        if name not in _ranks(layer):
            continue
        a, b = _matrices(layer, name)
        rows = slice(start, start := start + len(a))
        first[rows] = a
        second[:, rows] = b * (weight * scaling[name] / scaling[into])


def _ranks(layer: Any) -> dict[str, int]:
    """The rank of each adapter in a LoRA layer."""
    return {name: len(_matrices(layer, name)[0]) for name in (*layer.lora_A, *layer.lora_embedding_A)}


def _matrices(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A, with the rank first, and B, with the rank second, of an adapter; also of an embedding and a convolution."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _rank(config: LoraConfig, name: str) -> int:
    rank: int = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    return rank


def _sides(module: nn.Module) -> int:
    """Inputs plus outputs of a module, as LoRA's two matrices count them: kernels belong to the inputs."""
    for names in (("in_features", "out_features"), ("num_embeddings", "embedding_dim")):
        sides = [getattr(module, name, None) for name in names]
        if all(isinstance(side, int) for side in sides):
            return sum(side for side in sides if side)
    if isinstance(module, nn.MultiheadAttention):  # queries, keys and values in one, and the output
        return 6 * module.embed_dim
    weight = getattr(module, "weight", None)
    return weight.shape[0] + weight.numel() // weight.shape[0] if isinstance(weight, Tensor) and weight.dim() > 1 else 0
