"""Putting a planned adapter into a model, for our tuner and for PEFT's mixed one."""

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from peft_lntune.attention import AttentionFacts
from peft_lntune.config import DeltaConfig, LNTuneConfig
from peft_lntune.core.norms import Missed, Norm, base_modules
from peft_lntune.core.route import Route
from peft_lntune.core.sublayers import Sublayer
from peft_lntune.layers import BesideLayer, BottleneckLayer, LNTuneLayer, ModuleLayer, NormLayer, PrefixLayer
from peft_lntune.packing import ROOT
from peft_lntune.plan import check_selected, plan_parts
from peft_lntune.plan_deltas import part_of
from peft_lntune.planned import Part, Plan

__all__ = ["Injection", "create_and_replace", "is_target", "missed_by", "prepare", "route_of"]

_NAMED = 20  # modules of one kind that a warning names


@dataclass(frozen=True)
class Injection:
    """What one injection needs at hand; the matcher is PEFT's, for its messages."""

    plan: Plan
    route: Route
    modules: dict[str, nn.Module]
    matcher: Any
    stored: bool


def prepare(config: LNTuneConfig, model: nn.Module, told: Collection[str] = ()) -> list[PeftConfig]:
    """Plan the injection of `config` into `model`; raises before the first module is replaced.

    Args:
        config: what to inject.
        model: where.
        told: modules that look like norms and cannot be tuned, of which a warning has been given.

    Returns:
        The parts of the config, ready to be injected one after the other.

    Raises:
        AdapterFileError: the config was saved with masks for another model; and all that `plan` raises.
    """
    planned = plan_parts(model, config, config.stored_counts)
    selected = sum(plan.selected for _, plan in planned)
    check_selected(config, selected)
    config.__dict__["selected"] = selected  # for the file: a model that is wrapped by then cannot be planned for again
    stored = config.__dict__.pop("stored", False)
    missed = {name: one for _, plan in planned for name, one in plan.missed.items() if name not in told}
    if missed and not stored:  # of a saved adapter the file says what it tunes
        warnings.warn(_of_missed(missed.values()), stacklevel=2)
    route, modules = route_of(model), base_modules(model)
    for part, plan in planned:
        if isinstance(part, LoraConfig):
            continue
        part.__dict__.pop("stored", None)
        named = part.target_modules is not None and isinstance(part, DeltaConfig)
        matcher = SimpleNamespace(
            target_modules=part.target_modules if named else plan.parts.keys(),
            exclude_modules=part.exclude_modules,
            modules_to_save=part.modules_to_save,
            layers_to_transform=part.layers_to_transform if named else None,
            layers_pattern=part.layers_pattern,
        )
        part.__dict__["injection"] = Injection(plan, route, modules, matcher, stored)
    return [part for part, _ in planned]


def missed_by(parts: Iterable[PeftConfig]) -> set[str]:
    """The modules that the parts of a config, as `prepare` returns them, would tune if that were possible."""
    return {name for part in parts if "injection" in part.__dict__ for name in part.__dict__["injection"].plan.missed}


def _of_missed(missed: Collection[Missed]) -> str:
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in missed:
        alike[one.module_class, one.reason].append(one.name)
    groups = []
    for (module_class, reason), names in alike.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        groups.append(f"{', '.join(names[:_NAMED])}{more} ({module_class}): {reason}")
    return (
        f"{len(missed)} {'module looks like a norm and is' if len(missed) == 1 else 'modules look like norms and are'} "
        f"not tuned. {'; '.join(groups)}. print(plan(model, config)) lists each. Name it in target_modules to tune it "
        "as any other module, or in exclude_modules to leave it out without this warning."
    )


def is_target(config: LNTuneConfig, key: str) -> Any:
    """Whether the plan tunes the module `key`; falsy answers are PEFT's own, which its messages tell apart."""
    injection: Injection = config.__dict__["injection"]
    return check_target_module_exists(injection.matcher, key) and key in injection.plan.parts


def create_and_replace(
    tuner: BaseTuner,
    config: LNTuneConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
) -> None:
    """Give the module `target` what the plan says of it for `adapter_name`, in a new layer if there is none yet.

    Args:
        tuner: ours or PEFT's mixed one.
        config: a config that `prepare` has returned.
        adapter_name: the new adapter.
        target: the module, or the layer around it.
        target_name: its name in `parent`.
        parent: the module that holds it.
        current_key: its name in the model.
    """
    injection: Injection = config.__dict__["injection"]
    part = injection.plan.parts.get(current_key)
    if part is not None and part.method in ("bottleneck", "prefix"):
        beside = _beside(injection, part, parent if part.method == "bottleneck" else target)
        beside.update_layer(adapter_name, config, injection.stored)
        return
    part = part or part_of(config, current_key, target).tuned
    if isinstance(target, LNTuneLayer):
        _update(target, adapter_name, config, part, injection.stored)
        return
    layer: LNTuneLayer
    if isinstance(part.place, Norm):
        layer = NormLayer(target, injection.route, part.place)
    else:
        # A mixed model injects its second adapter into itself, and so gives names from there.
        layer = ModuleLayer(target, injection.route, part.name.removeprefix(ROOT))
    layer.set_adapter(adapter_name)
    _update(layer, adapter_name, config, part, injection.stored)
    if adapter_name not in tuner.active_adapters:
        layer.requires_grad_(False)
    tuner._replace_module(parent, target_name, layer, target)


def _update(layer: LNTuneLayer, adapter_name: str, config: LNTuneConfig, part: Part, stored: bool) -> None:
    if part.method == "supermask":
        assert isinstance(layer, ModuleLayer)  # the plan refuses norms
        layer.add_supermask(adapter_name, config, part.blocks.get("weight"), stored)
    else:
        layer.update_layer(adapter_name, config, part.counts, part.blocks)


def _beside(injection: Injection, part: Part, host: nn.Module) -> BesideLayer:
    """The layer of a part beside `host`; a new one where it has none yet."""
    layer: BesideLayer
    if isinstance(part.place, Sublayer):
        layer = BottleneckLayer.of(injection.route, part.place, injection.modules)
    elif isinstance(part.place, AttentionFacts):
        layer = PrefixLayer(injection.route, part.place)
    else:
        raise TypeError(f"{part.name} is no place to put a layer beside")
    known = host._modules.get(layer.child)
    if isinstance(known, BesideLayer):
        return known
    layer.attach(host)
    return layer


def route_of(model: nn.Module) -> Route:
    """The route that all layers of this model share; a new one where it has no layers yet."""
    return next((m._route for m in model.modules() if isinstance(m, (LNTuneLayer, BesideLayer))), None) or Route()
