"""Putting a planned adapter into a model, for our tuner and for PEFT's mixed one."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from peft_lntune.architectures.attention import AttentionFacts
from peft_lntune.architectures.sublayers import Sublayer
from peft_lntune.config import DeltaConfig, LNTuneConfig, SupermaskConfig, parts_of
from peft_lntune.core.module_tree import base_modules, called_modules
from peft_lntune.core.shared import Place, find_places
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.layers import BottleneckLayer, InsertedLayer, ModuleLayer, NormLayer, PrefixLayer, ReplacementLayer
from peft_lntune.layers.offloaded import all_onloaded, offload_hook
from peft_lntune.layers.padded import keep_padded
from peft_lntune.norms.find import Norm
from peft_lntune.planning.claims import check_claims
from peft_lntune.planning.deltas import part_of
from peft_lntune.planning.gaps import warn_of_gaps
from peft_lntune.planning.missed import warn_of_missed
from peft_lntune.planning.plan import check_selected, plan_parts
from peft_lntune.planning.types import Plan, PlannedModule
from peft_lntune.routing.route import Route
from peft_lntune.storage.packing import ROOT
from peft_lntune.tuner.state_dict import deltas_of, supermasks_of
from peft_lntune.tuner.tied import Ties, ties_of

__all__ = ["Injection", "create_and_replace", "injecting", "is_target", "prepare", "route_of"]


@dataclass(frozen=True)
class Injection:
    """What the injection of one part needs at hand. A tuner keeps it while `injecting`, and a config never.

    Attributes:
        plan: where the part goes.
        route: of all layers of the model.
        modules: the base modules of the model, by name.
        matcher: what PEFT's own matching asks, for its messages.
        stored: whether the values come from a file.
        source: the adapter of this model whose masks the new one has, if it is made from the config of one.
        ties: which tuned parameters are one.
        places: of each module that will be replaced, where else than under its name the model holds it.
        layers: those that the adapter has so far, by name; all parts share them.
    """

    plan: Plan
    route: Route
    modules: dict[str, nn.Module]
    matcher: Any
    stored: bool
    source: str | None = None
    ties: Ties = field(default_factory=dict)
    places: Mapping[nn.Module, Sequence[Place]] = field(default_factory=dict)
    layers: dict[str, ReplacementLayer] = field(default_factory=dict)


def prepare(
    configs: Mapping[str, PeftConfig],
    adapter_name: str,
    model: nn.Module,
    *,
    unmasked: bool = False,
    told: Collection[str] = (),
) -> list[tuple[PeftConfig, Injection]]:
    """Plan the injection of an adapter into `model`; raises before the first module is replaced.

    Args:
        configs: of all adapters of the model by name, and of the new one.
        adapter_name: the new one.
        model: the model.
        unmasked: tune every entry that the config selects, whatever `mask_source` says of it so far.
        told: modules that look like norms and are not tuned, of which a warning has been given.

    Returns:
        The parts of the config, to be injected one after the other, each with what its injection needs.

    Raises:
        AdapterFileError: the config was saved with masks for another model, or asks for more than its file holds.
        UnsupportedError: a module is also held where no layer can be put.
        ConfigError: the config is of a masked adapter that is not in this model; and all that `plan` raises.
        UnsupportedError: `torch.compile` was applied to the model or to modules in it, or blocks are offloaded whole.
    """
    _check_not_compiled(model)
    _check_offload(model)
    config: Any = configs[adapter_name]
    stored = "stored" in config.__dict__
    source = None if stored or unmasked else _source(configs, adapter_name, model)
    counts = config.stored_counts if source is None else _counts(model, source)
    planned = plan_parts(model, config, counts)
    selected = sum(plan.selected for _, plan in planned)
    check_selected(config, selected)
    check_claims(config, model, planned)
    config.__dict__["selected"] = selected  # for the file: a model that is wrapped by then cannot be planned for again
    config.__dict__.pop("stored", None)
    route, modules = route_of(model), base_modules(model)
    parts = {name: part for _, plan in planned for name, part in plan.parts.items()}
    ties, places, layers = ties_of(parts, modules), _places(model, parts), dict[str, ReplacementLayer]()
    if not stored:  # of a saved adapter the file says what it tunes
        warn_of_missed({name: one for _, plan in planned for name, one in plan.missed.items() if name not in told})
    found = []
    for part, plan in planned:
        part.__dict__.pop("stored", None)
        if not stored and source is None:
            warn_of_gaps(part, plan)
        named = isinstance(part, DeltaConfig) and part.target_modules is not None
        matcher = SimpleNamespace(
            target_modules=part.target_modules if named else plan.parts.keys(),
            exclude_modules=part.exclude_modules,
            modules_to_save=part.modules_to_save,
            layers_to_transform=part.layers_to_transform if named else None,
            layers_pattern=part.layers_pattern,
        )
        found.append((part, Injection(plan, route, modules, matcher, stored, source, ties, places, layers)))
    return found


def _places(model: nn.Module, parts: Mapping[str, PlannedModule]) -> dict[nn.Module, list[Place]]:
    """Where else the model holds the modules that layers will be put around: shared blocks, plain lists.

    Raises:
        UnsupportedError: a layer cannot be put there.
    """
    called, bases = called_modules(model), base_modules(model)
    names = [name for name, part in parts.items() if part.method in ("delta", "supermask")]
    replaced = {called[name]: name for name in names if not isinstance(called[name], ReplacementLayer)}
    # What another tuner has put its layer around under one name may go on being called under another.
    inner = {bases[name]: name for name in names if called[name] is not bases[name]}
    found = find_places(model, [*replaced, *inner])
    for module, places in found.items():
        stuck = [place.name for place in places if place.put is None or module in inner]
        if stuck:
            raise UnsupportedError(
                f"{inner.get(module) or replaced[module]} is to be tuned, and {' and '.join(stuck)} would go on "
                "calling it without the adapter. Let the model call the module under its name; or leave it out "
                "(exclude_modules)."
            )
    return {module: places for module, places in found.items() if len(places) > 1}


def _check_not_compiled(model: nn.Module) -> None:
    """Raise where `torch.compile` has put a wrapper into the model, whose name would stand in saved names."""
    wrapped = next((name for name, module in model.named_modules() if "_orig_mod" in module._modules), None)
    if wrapped is not None:
        raise UnsupportedError(
            f"torch.compile was applied to {wrapped or 'the model'} before the adapter, so a saved adapter would fit "
            "compiled models alone. Add the adapter first: torch.compile(get_peft_model(model, config)). "
            "`model.compile()`, which renames nothing, may come before."
        )


def _check_offload(model: nn.Module) -> None:
    """Raise where a module loads the offloaded parameters of all modules in it: it would look for new ones in vain."""
    for name, module in model.named_modules():
        hook = offload_hook(module)
        if hook is not None and hook.place_submodules:
            raise UnsupportedError(
                f"{name or 'the model'} is offloaded with all modules in it at once, so an adapter in it would be "
                "looked for where accelerate keeps the base model. Offload without preload_module_classes."
            )


@contextmanager
def injecting(tuner: BaseTuner, injection: Injection) -> Iterator[None]:
    """Let a tuner know the injection that is under way, and nothing of it afterwards."""
    tuner._injection = injection
    try:
        yield
        keep_padded(injection.modules, injection.plan.parts)
    finally:
        tuner._injection = None


def _source(configs: Mapping[str, PeftConfig], adapter_name: str, model: nn.Module) -> str | None:
    """The adapter whose config a new one is made from, where that adapter has masks; None where the config has none.

    Trainers make a reference adapter so: `add_adapter("ref", model.peft_config["default"])`, then they copy values.

    Raises:
        ConfigError: no adapter of this model has the mask that the config tells of, or several have different ones.
    """
    config = configs[adapter_name]
    masked = [part for part in parts_of(config) if getattr(part, "mask_source", None) is not None]
    bits = any(isinstance(part, SupermaskConfig) and part.inference_mode for part in parts_of(config))
    if not masked and not bits:
        return None
    others = {name: other for name, other in configs.items() if name != adapter_name}
    same = [name for name, other in others.items() if other is config]
    same = same or [name for name, other in others.items() if other == config]
    if same and _alike([_masks(model, name) for name in same]):
        return same[0]
    if not masked:
        return None
    said = f"this config is of an adapter with a mask (mask_source={masked[0].mask_source!r}), and "
    if same:
        raise ConfigError(
            f"{said}adapters {' and '.join(map(repr, same))} have it with different masks. Make the new one from "
            "config.unmasked(), then choose its entries with set_masks."
        )
    raise ConfigError(
        f"{said}no adapter of this model has that config, so the mask is not known here. To load the adapter, use "
        "load_adapter or PeftModel.from_pretrained. For a new adapter make it from config.unmasked(), which tunes "
        "every entry that the config selects, then choose entries with fit_fisher_masks or set_masks."
    )


def _masks(model: nn.Module, adapter_name: str) -> dict[str, Tensor | None]:
    """The masks of an adapter that are fixed: chosen entries of deltas, and supermasks that are bits alone."""
    deltas = {place: delta.mask for place, delta in deltas_of(model, adapter_name).items()}
    return deltas | {name: mask.keep for name, mask in supermasks_of(model, adapter_name).items()}


def _alike(masks: Sequence[Mapping[str, Tensor | None]]) -> bool:
    first, *others = masks
    return all(
        own.keys() == first.keys() and all(_equal(mask, own[place]) for place, mask in first.items()) for own in others
    )


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first, second.to(first.device))


def _counts(model: nn.Module, adapter_name: str) -> dict[str, int | None]:
    """Tuned entries of each delta of an adapter, None for all: what `plan` asks about another with the same masks."""
    deltas = deltas_of(model, adapter_name)
    return {place: None if delta.mask is None else delta.weight.numel() for place, delta in deltas.items()}


def is_target(injection: Injection, key: str) -> Any:
    """Whether the plan tunes the module `key`; falsy answers are PEFT's own, which its messages tell apart."""
    return check_target_module_exists(injection.matcher, key) and key in injection.plan.parts


def create_and_replace(
    tuner: BaseTuner,
    injection: Injection,
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
        injection: the one under way.
        config: the part that it is of.
        adapter_name: the new adapter.
        target: the module, or the layer around it.
        target_name: its name in `parent`.
        parent: the module that holds it.
        current_key: its name in the model.
    """
    part = injection.plan.parts.get(current_key)
    if part is not None and part.method in ("bottleneck", "prefix"):
        beside = _beside(injection, part, parent if part.method == "bottleneck" else target)
        beside.update_layer(adapter_name, config, injection.stored)
        return
    part = part or part_of(config, current_key, target).tuned
    if isinstance(target, ReplacementLayer):
        _tie(injection, target, part)
        with all_onloaded(target):  # an adapter lives where the module computes
            _update(target, adapter_name, config, part, injection)
        return
    layer: ReplacementLayer
    if isinstance(part.place, Norm):
        layer = NormLayer(target, injection.route, part.place)
    else:
        # A mixed model injects its second adapter into itself, and so gives names from there.
        layer = ModuleLayer(target, injection.route, part.name.removeprefix(ROOT))
    layer.set_adapter(adapter_name)
    _tie(injection, layer, part)
    with all_onloaded(layer):
        _update(layer, adapter_name, config, part, injection)
        if adapter_name not in tuner.active_adapters:
            layer.requires_grad_(False)
        tuner._replace_module(parent, target_name, layer, target)
    for place in injection.places.get(target, ()):
        assert place.put is not None
        place.put(layer)


def _tie(injection: Injection, layer: ReplacementLayer, part: PlannedModule) -> None:
    injection.layers[part.name] = layer
    for parameter in part.entries:
        for other, its in injection.ties.get((part.name, parameter), ()):
            if other in injection.layers:
                layer.tie(parameter, injection.layers[other], its)


def _update(
    layer: ReplacementLayer, adapter_name: str, config: LNTuneConfig, part: PlannedModule, injection: Injection
) -> None:
    if part.method == "supermask":
        assert isinstance(layer, ModuleLayer)  # the plan refuses norms
        layer.add_supermask(adapter_name, config, part.blocks.get("weight"), injection.stored)
    else:
        layer.update_layer(adapter_name, config, part.counts, part.blocks)
    for container in layer.adapter_layer_names:
        held: Any = getattr(layer, container)
        if adapter_name in held and injection.source in held:
            # Masks are buffers, and fixed; what is trained starts anew. Not in place: a new buffer may be on meta.
            for name, _ in list(held[adapter_name].named_buffers()):
                setattr(held[adapter_name], name, getattr(held[injection.source], name).clone())


def _beside(injection: Injection, part: PlannedModule, host: nn.Module) -> InsertedLayer:
    """The layer of a part beside `host`; a new one where it has none yet."""
    layer: InsertedLayer
    if isinstance(part.place, Sublayer):
        layer = BottleneckLayer.of(injection.route, part.place, injection.modules)
    elif isinstance(part.place, AttentionFacts):
        layer = PrefixLayer(injection.route, part.place)
    else:
        raise TypeError(f"{part.name} is no place to put a layer beside")
    known = host._modules.get(layer.child)
    if isinstance(known, InsertedLayer):
        return known
    layer.attach(host)
    return layer


def route_of(model: nn.Module) -> Route:
    """The route that all layers of this model share; a new one where it has no layers yet."""
    return (
        next((m._route for m in model.modules() if isinstance(m, (ReplacementLayer, InsertedLayer))), None) or Route()
    )
