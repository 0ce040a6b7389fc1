"""Putting a planned adapter into a model, for our tuner and for PEFT's mixed one."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from peft_lntune.config import LNTuningConfig
from peft_lntune.core.route import Route
from peft_lntune.layers import LNTuneLayer, ModuleLayer, NormLayer
from peft_lntune.plan import Plan, part_of, plan

__all__ = ["Injection", "create_and_replace", "is_target", "prepare", "route_of"]


@dataclass(frozen=True)
class Injection:
    """What one injection needs at hand: the plan, the route the layers share, and PEFT's matcher for its messages."""

    plan: Plan
    route: Route
    matcher: Any


def prepare(config: LNTuningConfig, model: nn.Module) -> None:
    """Plan the injection of `config` into `model`; raises before the first module is replaced."""
    planned = plan(model, config, config.stored_counts)
    config.__dict__.pop("stored", None)
    targets = planned.parts.keys() if config.target_modules is None else config.target_modules
    matcher = SimpleNamespace(
        target_modules=targets,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform if config.target_modules is not None else None,
        layers_pattern=config.layers_pattern,
    )
    config.__dict__["injection"] = Injection(planned, route_of(model), matcher)


def is_target(config: LNTuningConfig, key: str) -> Any:
    """Whether the plan tunes the module `key`; falsy answers are PEFT's own, which its messages tell apart."""
    injection: Injection = config.__dict__["injection"]
    return check_target_module_exists(injection.matcher, key) and key in injection.plan.parts


def create_and_replace(
    tuner: BaseTuner,
    config: LNTuningConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
) -> None:
    """Give the module `target` a delta for `adapter_name`, in a layer around it if there is none yet.

    Args:
        tuner: ours or PEFT's mixed one.
        config: a config that `prepare` has seen.
        adapter_name: the new adapter.
        target: the module, or the layer around it.
        target_name: its name in `parent`.
        parent: the module that holds it.
        current_key: its name in the model.
    """
    injection: Injection = config.__dict__["injection"]
    part = injection.plan.parts.get(current_key) or part_of(config, current_key, target)
    if isinstance(target, LNTuneLayer):
        target.update_layer(adapter_name, config, part.counts)
        return
    layer: LNTuneLayer
    if part.norm is None:
        layer = ModuleLayer(target, injection.route, current_key)
    else:
        layer = NormLayer(target, injection.route, part.norm)
    layer.set_adapter(adapter_name)
    layer.update_layer(adapter_name, config, part.counts)
    if adapter_name not in tuner.active_adapters:
        layer.requires_grad_(False)
    tuner._replace_module(parent, target_name, layer, target)


def route_of(model: nn.Module) -> Route:
    """The route that all layers of this model share; a new one where it has no layers yet."""
    return next((m._route for m in model.modules() if isinstance(m, LNTuneLayer)), None) or Route()
