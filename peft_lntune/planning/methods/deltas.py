"""Deltas on weights and biases of norms, of named modules, and of components of the model."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor, nn

from peft_lntune.config import DeltaConfig, LNTuningConfig
from peft_lntune.config.base import DtypeName
from peft_lntune.config.deltas import Tune
from peft_lntune.core.delta import PARAMETERS
from peft_lntune.core.delta_module import Delta
from peft_lntune.errors import NoMatchError
from peft_lntune.layers import ReplacementLayer
from peft_lntune.layers.held import deltas_of
from peft_lntune.norms.find import Missed, Norm
from peft_lntune.planning.components import find_component_parameters
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.gaps import NO_ROLE, warn_of_unknown_roles
from peft_lntune.planning.methods.method import Counts, WeightedSum
from peft_lntune.planning.methods.replacing import ReplacingMethod
from peft_lntune.planning.targets import in_layers, is_chosen, is_saved, matches
from peft_lntune.planning.types import Plan, PlannedModule
from peft_lntune.storage.packing import ROOT, unpack

__all__ = ["COMBINATIONS", "Deltas"]

Combination = Callable[[list[Tensor], Tensor, float, str], Tensor]

COMBINATIONS: dict[str, Combination] = {
    "linear": lambda deltas, weights, density, sign: task_arithmetic(deltas, weights),
    "ties": ties,
    "dare_linear": lambda deltas, weights, density, sign: dare_linear(deltas, weights, density),
    "dare_ties": dare_ties,
    "magnitude_prune": lambda deltas, weights, density, sign: magnitude_prune(deltas, weights, density),
}
"""How to combine the deltas of one parameter: `(deltas, weights, density, majority_sign_method) -> delta`."""


class Deltas(ReplacingMethod):
    """A delta on each weight and bias of norms, of named modules, or of components of the model."""

    name = "delta"
    has_masks = True

    def plan(self, facts: ModelFacts, config: Any, counts: Counts = None) -> Plan:
        """Plan a delta on each parameter that a config selects.

        Args:
            facts: facts of the model.
            config: a `DeltaConfig`.
            counts: for each tuned parameter, `<module>.lntune_<parameter>`, the number of tuned entries, None for all.

        Returns:
            The plan. Norms that the config does not tune are in `left_out`.

        Raises:
            NoMatchError: the config selects nothing.
            UnsupportedError: a selected module has no floating weight, or a component cannot be separated.
        """
        components = getattr(config, "components", None)
        if components is None:
            return self._plan_modules(facts, config, counts)
        places = find_component_parameters(facts, components, config.parameters)
        every = {
            name: self.select(config, name, facts.modules[name], facts.norms.get(name), counts, found)
            for name, found in places.items()
            if is_chosen(config, name) and not is_saved(config, name)
        }
        parts, selected = _tuned(every)
        if not parts:
            raise NoMatchError(
                f"components {components!r} not found in the chosen layers of this model, with the parameters that "
                f"tune={config.tune!r} asks for. `parameter_change` lists the components of a model; or name modules "
                "in target_modules."
            )
        missed, _ = _sorted_out(config, facts.missed) if "norm" in components else ({}, {})
        return Plan(parts, {}, selected, missed)

    def _plan_modules(self, facts: ModelFacts, config: DeltaConfig, counts: Counts) -> Plan:
        modules, norms, looking = facts.modules, facts.all_norms, facts.missed
        reasons: dict[str, str] = {}
        every: dict[str, PlannedModule] = {}
        for name in norms if config.target_modules is None else modules:
            reason = _reason_to_leave(config, name, norms.get(name))
            if reason is None:
                every[name] = self.select(config, name, modules[name], norms.get(name), counts)
            reasons[name] = reason or ""
        parts, selected = _tuned(every)
        left_out = {n: reasons.get(n) or "its parameters are not among those tuned" for n in norms.keys() - parts}
        missed, others = _sorted_out(config, {name: one for name, one in looking.items() if name not in parts})
        every_reason = {**left_out, **others}
        left_out = {name: every_reason[name] for name in modules if name in every_reason}
        if not parts:
            raise NoMatchError(_nothing(config, norms, left_out, missed, modules))
        return Plan(parts, left_out, selected, missed)

    def warn(self, config: DeltaConfig, plan: Plan) -> None:
        """Warn about norms that are left out because their role is not known.

        Args:
            config: the config.
            plan: the plan of that config.
        """
        warn_of_unknown_roles(config, plan)

    def update(
        self, layer: ReplacementLayer, adapter_name: str, config: Any, part: PlannedModule, stored: bool
    ) -> None:
        """Add the deltas of an adapter to a layer.

        Args:
            layer: the layer around the module.
            adapter_name: the new adapter.
            config: a `DeltaConfig`.
            part: the plan of the module.
            stored: not used; a delta has the same form for new and saved adapters.
        """
        layer.update_layer(adapter_name, config, part.counts, part.blocks)

    def from_file(self, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unpack the masked deltas of a file.

        Args:
            model: the model with the adapter.
            adapter_name: the adapter.
            tensors: the state dict of the file.

        Returns:
            A new dict, with values and mask of each masked delta under its own name.

        Raises:
            AdapterFileError: the packed deltas are not those of this adapter.
        """
        sizes = {
            place.removeprefix(ROOT): (delta.weight.numel(), delta.shape)
            for place, delta in deltas_of(model, adapter_name).items()
            if delta.mask is not None
        }
        return unpack(tensors, sizes, f"the saved adapter for {adapter_name!r}")

    def sum_parts(
        self, facts: ModelFacts, parts: Mapping[str, Sequence[DeltaConfig]], wanted: WeightedSum
    ) -> list[PeftConfig]:
        """Make an `LNTuningConfig` that names every module that a source tunes.

        Args:
            facts: facts of the model that holds the adapters.
            parts: the delta parts of each adapter, by adapter name.
            wanted: the sum.

        Returns:
            The config; an empty list if the adapters have no deltas. `sum_into` masks entries that no source tunes.
        """
        layers = [module for module in facts.model.modules() if isinstance(module, ReplacementLayer)]
        held = [
            (layer, p, layer.deltas(p)[name])
            for layer in layers
            for p in PARAMETERS
            for name in parts
            if name in layer.deltas(p)
        ]
        if not held:
            return []
        tuned = {parameter for _, parameter, _ in held}
        touched = sorted({layer.label for layer, _, _ in held})
        asked = {part.delta_dtype for own in parts.values() for part in own}
        widest = reduce(torch.promote_types, (delta.weight.dtype for _, _, delta in held))
        # A name in a list also matches as an ending of longer names. An expression matches exactly.
        alike = any(matches(touched, name) and name not in touched for name in facts.modules)
        config = LNTuningConfig(
            target_modules="|".join(map(re.escape, touched)) if alike else touched,
            tune="both" if len(tuned) > 1 else cast(Tune, tuned.pop()),
            delta_dtype=asked.pop() if len(asked) == 1 else cast(DtypeName, str(widest).removeprefix("torch.")),
        )
        return [config]

    def sum_into(self, model: nn.Module, wanted: WeightedSum, into: str) -> bool:
        """Fill the deltas of an adapter with the combination of its sources.

        Args:
            model: the model that holds the adapters.
            wanted: the combination.
            into: the adapter to fill.

        Returns:
            True if the adapter tunes fewer entries than its config selects, and so has a mask.
        """
        layers = [module for module in model.modules() if isinstance(module, ReplacementLayer)]
        narrowed = [_sum_into(layer, parameter, wanted, into) for layer in layers for parameter in PARAMETERS]
        return any(narrowed)


def _sorted_out(config: Any, looking: Mapping[str, Missed]) -> tuple[dict[str, Missed], dict[str, str]]:
    """Split modules that look like norms: those the config would tune, and those it leaves out, with the reason."""
    reasons = {name: _reason_to_leave(config, name, one) for name, one in looking.items()}
    missed = {name: one for name, one in looking.items() if reasons[name] is None}
    return missed, {name: reason for name, reason in reasons.items() if reason is not None}


def _tuned(every: Mapping[str, PlannedModule]) -> tuple[dict[str, PlannedModule], int]:
    """The modules with at least one tuned entry, and the number of entries selected in all."""
    parts = {name: tuned for name, part in every.items() if (tuned := part.tuned).entries}
    return parts, sum(total for part in every.values() for _, total in part.entries.values())


def _reason_to_leave(config: Any, name: str, norm: Norm | Missed | None) -> str | None:
    """Why a module is not tuned; None if it is tuned."""
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
            + "If a norm is written into another module's forward, give it a module of its own; or name other modules "
            "in target_modules."
        )
    listed = "\n".join(f"  {name}: {reason}" for name, reason in left_out.items())
    listed += f"\nThese look like norms, and cannot be tuned as such:\n{looking}" if looking else ""
    return f"this config selects none of the {len(norms)} norms of this model:\n{listed}\nWiden the config."


def _sum_into(layer: ReplacementLayer, parameter: str, wanted: WeightedSum, into: str) -> bool:
    """Fill one delta, which tunes the union of what its sources tune. Returns whether entries are left out."""
    deltas = layer.deltas(parameter)
    if into not in deltas:
        return False
    present = [(deltas[name], w) for name, w in zip(wanted.adapters, wanted.weights, strict=True) if name in deltas]
    if not present:
        layer.set_mask(parameter, into, None)
        return True
    dense = [delta.dense().to(deltas[into].weight.dtype) for delta, _ in present]
    factors = torch.tensor([weight for _, weight in present], dtype=dense[0].dtype, device=dense[0].device)
    how = wanted.density or 1.0, wanted.majority_sign_method
    summed = COMBINATIONS[wanted.combination](dense, factors, *how)
    union = torch.stack([delta.tuned() for delta, _ in present]).any(0)
    narrowed = not bool(union.all())
    if narrowed:
        layer.put(parameter, into, Delta.masked(union, summed.dtype, summed.device))
    deltas[into].fill(summed)
    deltas[into].requires_grad_(into in layer.active_adapters)
    return narrowed
