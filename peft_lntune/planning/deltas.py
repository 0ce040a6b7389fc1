"""Where deltas go: norms, modules that are named, and components of the model."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from peft_lntune.config import DeltaConfig, LNTuningConfig, ModuleTuningConfig, SupermaskConfig
from peft_lntune.core.delta import PARAMETERS, ParameterSlice, delta_dtype
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import NoMatchError, UnsupportedError
from peft_lntune.norms.find import Missed, Norm, survey
from peft_lntune.planning.components import find_component_parameters
from peft_lntune.planning.gaps import NO_ROLE
from peft_lntune.planning.targets import in_layers, is_chosen, is_saved, matches
from peft_lntune.planning.types import Plan, PlannedModule

__all__ = ["part_of", "plan_components", "plan_deltas"]


def plan_components(model: nn.Module, config: ModuleTuningConfig, counts: Mapping[str, int | None] | None) -> Plan:
    modules = base_modules(model)
    norms, looking = survey(model)
    places = find_component_parameters(model, config.components or (), norms, config.parameters)
    places = {name: found for name, found in places.items() if is_chosen(config, name) and not is_saved(config, name)}

    every = {n: part_of(config, n, modules[n], norms.get(n), counts, found) for n, found in places.items()}
    parts, selected = _tuned(every)
    if not parts:
        raise NoMatchError(
            f"this model has none of the components {config.components!r} in the chosen layers, with the parameters "
            f"that tune={config.tune!r} asks for. `parameter_change` names the components it has; or name modules in "
            "target_modules."
        )
    missed, _ = _sorted_out(config, looking) if "norm" in (config.components or ()) else ({}, {})
    return Plan(parts, {}, selected, missed)


def plan_deltas(model: nn.Module, config: DeltaConfig, counts: Mapping[str, int | None] | None) -> Plan:
    modules = base_modules(model)
    norms, looking = survey(model, parameterless=True)
    reasons: dict[str, str] = {}
    every: dict[str, PlannedModule] = {}
    for name in norms if config.target_modules is None else modules:
        reason = _reason_to_leave(config, name, norms.get(name))
        if reason is None:
            every[name] = part_of(config, name, modules[name], norms.get(name), counts)
        reasons[name] = reason or ""
    parts, selected = _tuned(every)
    left_out = {name: reasons.get(name) or "its parameters are not among those tuned" for name in norms.keys() - parts}
    missed, others = _sorted_out(config, {name: one for name, one in looking.items() if name not in parts})
    left_out = {name: reason for name in modules if (reason := {**left_out, **others}.get(name)) is not None}
    if not parts:
        raise NoMatchError(_nothing(config, norms, left_out, missed, modules))
    return Plan(parts, left_out, selected, missed)


def _sorted_out(config: Any, looking: Mapping[str, Missed]) -> tuple[dict[str, Missed], dict[str, str]]:
    """What looks like a norm: what the config would have tuned if it could be; and what it leaves out, with reasons."""
    reasons = {name: _reason_to_leave(config, name, one) for name, one in looking.items()}
    missed = {name: one for name, one in looking.items() if reasons[name] is None}
    return missed, {name: reason for name, reason in reasons.items() if reason is not None}


def _tuned(every: Mapping[str, PlannedModule]) -> tuple[dict[str, PlannedModule], int]:
    """Of what a config selects: the modules of which something is tuned, and how many entries are selected in all."""
    parts = {name: tuned for name, part in every.items() if (tuned := part.tuned).entries}
    return parts, sum(total for part in every.values() for _, total in part.entries.values())


def _reason_to_leave(config: Any, name: str, norm: Norm | Missed | None) -> str | None:
    """Why this module is not tuned; None where it is to be."""
    if not name:
        return "it is the model itself"
    if config.target_modules is not None:
        matched = check_target_module_exists(config, name) and in_layers(config, name)
        return None if matched else "not among the target modules, or excluded"
    if norm is None or (isinstance(norm, Norm) and norm.weight_shape is None):
        return "it has no parameters"
    if getattr(config, "roles", None) is not None and not set(config.roles) & set(norm.roles):
        return f"role {'+'.join(norm.roles)}" if norm.roles else NO_ROLE
    if matches(config.exclude_modules, name):
        return "excluded"
    if is_saved(config, name):
        return "inside modules_to_save"
    if not in_layers(config, name):
        return "not in layers_to_transform"
    return None


def part_of(
    config: DeltaConfig | SupermaskConfig,
    name: str,
    module: nn.Module,
    norm: Norm | None = None,
    counts: Mapping[str, int | None] | None = None,
    only: Mapping[str, ParameterSlice | None] | None = None,
) -> PlannedModule:
    """What `config` selects of one module, also parameters of which `counts` leaves nothing; see `PlannedModule.tuned`.

    Args:
        config: says which parameters.
        name: of the module.
        module: itself.
        norm: what is known of it, where it is a norm.
        counts: see `plan`.
        only: which of its parameters may be tuned, and which part of each.

    Raises:
        UnsupportedError: the module has no floating weight.
    """
    names = dict.fromkeys(PARAMETERS) if norm is None else norm.parameters
    weight = getattr(module, names["weight"] or "weight", None)
    if not isinstance(weight, torch.Tensor) or not _takes_delta(weight):
        kind: Any = getattr(weight, "data", weight)
        plain = type(kind) is torch.Tensor
        has = "none" if weight is None else f"one of {kind.dtype if plain else type(kind).__name__}"
        raise UnsupportedError(
            f"{name} ({type(module).__name__}) is chosen to be tuned, but that needs a floating "
            f"`weight`, and it has {has}. Name its submodules instead, or leave it out."
        )
    found = {p: getattr(module, names[p] or p, None) for p in config.parameters if only is None or p in only}
    tuned = {p: t for p, t in found.items() if isinstance(t, torch.Tensor)}
    blocks = {p: block for p, block in (only or {}).items() if block is not None and p in tuned}
    sizes = {p: (blocks[p].shape_in(t.shape) if p in blocks else t.shape).numel() for p, t in tuned.items()}
    entries = {p: (_count(counts, name, p, size), size) for p, size in sizes.items()}
    size = sum(n * delta_dtype(tuned[p].dtype, config.torch_delta_dtype).itemsize for p, (n, _) in entries.items())
    return PlannedModule(name, type(module).__name__, norm, entries, size, blocks=blocks)


def _takes_delta(weight: torch.Tensor) -> bool:
    """Whether a delta can be added. Quantized tensors may call themselves floating, so a tensor class is tried."""
    if type(weight.data) is torch.Tensor or not weight.is_floating_point():
        return weight.is_floating_point()
    try:
        _ = weight.detach() + 0.0
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _count(counts: Mapping[str, int | None] | None, name: str, parameter: str, size: int) -> int:
    """Tuned entries of one parameter. Where some are listed, one that is not is not tuned."""
    count = counts.get(f"{name}.lntune_{parameter}", 0) if counts else None
    return size if count is None else count


def _nothing(
    config: LNTuningConfig,
    norms: Mapping[str, Norm],
    left_out: Mapping[str, str],
    missed: Mapping[str, Missed],
    modules: Mapping[str, nn.Module],
) -> str:
    if config.target_modules is not None:
        known = ", ".join(norms) or "none"
        return (
            f"Target modules {config.target_modules} not found in the base model, or excluded, or without the "
            f"parameters that tune={config.tune!r} asks for. Please check the target modules and try again. "
            f"Norms of this model: {known}."
        )
    looking = "\n".join(f"  {one}" for one in missed.values())
    if not norms:
        return (
            f"no norm was found among the {len(modules)} modules of this model. "
            + (f"These look like norms, and cannot be tuned as such:\n{looking}\n" if looking else "")
            + "If it has one that is written into another module's forward, give that a module of its own; or name "
            "other modules in target_modules."
        )
    listed = "\n".join(f"  {name}: {reason}" for name, reason in left_out.items())
    listed += f"\nThese look like norms, and cannot be tuned as such:\n{looking}" if looking else ""
    return f"this config selects none of the {len(norms)} norms of this model:\n{listed}\nWiden the config."
