"""Putting a planned adapter into a model, for our tuner and for PEFT's mixed one."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from peft_lntune.config import LNTuneConfig, parts_of
from peft_lntune.core.shared import Place, find_places
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.layers import InsertedLayer, ReplacementLayer
from peft_lntune.layers.held import deltas_of, supermasks_of
from peft_lntune.layers.offloaded import offload_hook
from peft_lntune.layers.padded import keep_padded
from peft_lntune.planning.claims import check_claims
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.gaps import warn_of_missed
from peft_lntune.planning.methods import Injection, method_of
from peft_lntune.planning.plan import check_selected, plan_parts
from peft_lntune.routing.route import Route
from peft_lntune.tuner.tied import ties_of

__all__ = ["injecting", "is_target", "prepare", "route_of"]


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
    facts = ModelFacts(model)
    planned = plan_parts(facts, config, counts)
    selected = sum(plan.selected for _, plan in planned)
    check_selected(config, selected)
    check_claims(config, facts, planned)
    config.__dict__["selected"] = selected  # for the file: a model that is wrapped by then cannot be planned for again
    config.__dict__.pop("stored", None)
    replaced = {name: its for part, plan in planned if method_of(part).replaces for name, its in plan.parts.items()}
    shared: dict[str, Any] = {
        "route": route_of(model),
        "modules": facts.modules,
        "stored": stored,
        "source": source,
        "ties": ties_of(replaced, facts.tied),
        "places": _places(facts, replaced),
        "layers": {},
    }
    if not stored:  # of a saved adapter the file says what it tunes
        warn_of_missed({name: one for _, plan in planned for name, one in plan.missed.items() if name not in told})
    found = []
    for part, plan in planned:
        part.__dict__.pop("stored", None)
        method = method_of(part)
        if not stored and source is None:
            method.warn(part, plan)
        found.append((part, Injection(method, plan, **shared)))
    return found


def _places(facts: ModelFacts, names: Iterable[str]) -> dict[nn.Module, list[Place]]:
    """Where else the model holds the modules that layers will be put around: shared blocks, plain lists.

    Raises:
        UnsupportedError: a layer cannot be put there.
    """
    called, bases = facts.called, facts.modules
    replaced = {called[name]: name for name in names if not isinstance(called[name], ReplacementLayer)}
    # What another tuner has put its layer around under one name may go on being called under another.
    inner = {bases[name]: name for name in names if called[name] is not bases[name]}
    found = find_places(facts.model, [*replaced, *inner])
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
    config: Any = configs[adapter_name]
    if not config.masks_are_fixed:
        return None
    masked = [part for part in parts_of(config) if getattr(part, "mask_source", None) is not None]
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


def is_target(injection: Injection, config: LNTuneConfig, key: str) -> Any:
    """Whether the plan tunes the module `key`; for one that is left out the falsy answer that PEFT tells apart."""
    excluded = SimpleNamespace(
        exclude_modules=config.exclude_modules, modules_to_save=config.modules_to_save, target_modules=()
    )
    found = check_target_module_exists(excluded, key)
    return key in injection.plan.parts if found is False else found


def route_of(model: nn.Module) -> Route:
    """The route that all layers of this model share; a new one where it has no layers yet."""
    return (
        next((m._route for m in model.modules() if isinstance(m, (ReplacementLayer, InsertedLayer))), None) or Route()
    )
