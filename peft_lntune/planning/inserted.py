"""Where bottlenecks, prefixes and LoRA go."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from peft_lntune.architectures.attention import find_attention, survey_attention
from peft_lntune.architectures.sublayers import find_sublayers
from peft_lntune.config import BottleneckConfig, PrefixConfig
from peft_lntune.config.bottleneck import LEARNED
from peft_lntune.config.prefix import ATTENTION_ROLES
from peft_lntune.core.bottleneck import read_widths
from peft_lntune.core.delta import delta_dtype
from peft_lntune.core.module_tree import base_modules
from peft_lntune.core.prefix import Prefix
from peft_lntune.errors import NoMatchError, UnsupportedError
from peft_lntune.planning.gaps import find_gaps
from peft_lntune.planning.lora import find_lora_targets
from peft_lntune.planning.targets import is_chosen
from peft_lntune.planning.types import Plan, PlannedModule

__all__ = ["plan_bottlenecks", "plan_lora", "plan_prefixes"]


def plan_bottlenecks(model: nn.Module, config: BottleneckConfig) -> Plan:
    modules = base_modules(model)
    sublayers = find_sublayers(modules)
    parts, narrow = {}, {}
    for sublayer in sublayers:
        name = sublayer.exit
        if sublayer.role not in config.roles or not is_chosen(config, name):
            continue
        out = modules[name]
        try:
            reads = read_widths(modules[sublayer.entry], out, name)
        except UnsupportedError as error:
            narrow[name] = error
            continue
        width = reads["sequential"]
        size = config.size_of(width)
        counts = {"down": size * (reads[config.position] + 1), "up": width * (size + 1)}
        counts |= {"scale": 1} if config.scale == LEARNED else {}
        parts[name] = _beside(config, name, out, sublayer, counts, "bottleneck")
    if narrow and not parts:
        raise next(iter(narrow.values()))
    if not parts:
        known = ", ".join(f"{s.exit} ({s.role})" for s in sublayers) or "none"
        raise NoMatchError(
            f"BottleneckConfig(roles={config.roles!r}) finds no place in this model. Sub-layers whose end is known: "
            f"{known}. Choose among their roles and layers, or use another part where there are none."
        )
    places = [(s.role, leaf) for s in sublayers for leaf in (s.entry, s.exit)]
    reason = "no leaf is known that answers for the whole sub-layer"
    gaps = {
        **dict.fromkeys(narrow, "the width of its leaves is not known"),
        **find_gaps(modules, config.roles, places, reason),
    }
    return Plan(parts, {name: why for name, why in gaps.items() if is_chosen(config, name)})


def plan_prefixes(model: nn.Module, config: PrefixConfig) -> Plan:
    modules = base_modules(model)
    found = find_attention(model)
    _, left_out = survey_attention(model)
    parts = {}
    for name, place in found.items():
        if (config.roles is None or place.role in config.roles) and is_chosen(config, name):
            sizes = config.num_virtual_tokens, place.heads * place.head_dim, config.reparametrize
            prefix = Prefix(*sizes, device=torch.device("meta"))
            counts = {"prefix": sum(parameter.numel() for parameter in prefix.parameters())}
            parts[name] = _beside(config, name, modules[name], place, counts, "prefix")
    if not parts:
        known = ", ".join(f"{name} ({place.role})" for name, place in found.items())
        raise NoMatchError(f"this PrefixConfig selects none of the attention modules of this model: {known}.")
    roles = ATTENTION_ROLES if config.roles is None else config.roles
    told = [(role, name) for name in left_out for role in ATTENTION_ROLES]
    places = [(place.role, name) for name, place in found.items()]
    reason = "it does not use transformers' attention interface"
    gaps = {**left_out, **find_gaps(modules, roles, places + told, reason)}
    return Plan(parts, {name: why for name, why in gaps.items() if is_chosen(config, name)})


def _beside(
    config: Any, name: str, module: nn.Module, place: Any, counts: Mapping[str, int], method: str
) -> PlannedModule:
    first = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    itemsize = delta_dtype(first, config.torch_delta_dtype).itemsize
    entries = {what: (count, count) for what, count in counts.items()}
    return PlannedModule(name, type(module).__name__, place, entries, sum(counts.values()) * itemsize, method)


def plan_lora(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, Plan]:
    """Where LoRA goes, and its config with the target modules that were chosen for it."""
    config, targets = find_lora_targets(model, config)
    modules = base_modules(model)
    found = {
        name: PlannedModule(name, type(modules[name]).__name__, None, {"lora": (size, size)}, 4 * size, "lora")
        for name, size in targets.items()
    }
    return config, Plan(found)
