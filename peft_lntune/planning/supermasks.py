"""Where supermasks go: the weights of components, or of modules that are named."""

from dataclasses import replace

from torch import nn

from peft_lntune.config import SupermaskConfig
from peft_lntune.core.delta import ParameterSlice
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import NoMatchError, UnsupportedError
from peft_lntune.norms.find import find_norms
from peft_lntune.planning.components import find_component_parameters
from peft_lntune.planning.deltas import part_of
from peft_lntune.planning.targets import is_chosen, is_saved
from peft_lntune.planning.types import Plan, PlannedModule

__all__ = ["plan_masks"]


def plan_masks(model: nn.Module, config: SupermaskConfig) -> Plan:
    modules, norms = base_modules(model), find_norms(model)
    places: dict[str, dict[str, ParameterSlice | None]]
    if config.components is not None:
        places = find_component_parameters(model, config.components, norms, config.parameters)
    else:
        places = {name: {"weight": None} for name in modules if name}
    parts: dict[str, PlannedModule] = {}
    for name, found in places.items():
        if not is_chosen(config, name) or is_saved(config, name):
            continue
        if name in norms:
            raise UnsupportedError(
                f"{name} is named in target_modules, and a supermask is for matrices: it would switch off whole "
                "features of a norm. Tune norms with LNTuningConfig, as another part or another adapter."
            )
        part = part_of(config, name, modules[name], only=found)
        ((_, size),) = part.entries.values()
        parts[name] = replace(part, bytes=-(-size // 8), method="supermask")
    if not parts:
        chosen = f"components={config.components!r}" if config.components else f"target_modules={config.target_modules}"
        raise NoMatchError(
            f"{chosen} selects no weight in the chosen layers of this model. `parameter_change` names the components "
            "it has; or name modules in target_modules."
        )
    return Plan(parts)
