"""Whether tensors fit the adapter they are meant for: the last check before a value is taken."""

from collections.abc import Mapping

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_lntune.config import LNTuneConfig
from peft_lntune.errors import AdapterFileError
from peft_lntune.layers.held import deltas_of, without_fsdp
from peft_lntune.norms.names import own_name
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.methods import method_of
from peft_lntune.planning.methods.supermask import with_scores
from peft_lntune.planning.plan import plan_parts
from peft_lntune.planning.types import PlannedModule
from peft_lntune.storage.keys import is_ours, is_part
from peft_lntune.storage.packing import PREFIX, unpack

__all__ = [
    "as_in_model",
    "check_fit",
    "check_shapes",
    "further_names",
    "held_tensors",
    "masks_of",
    "own_tensors",
    "planned_deltas",
    "scores_by",
    "under_all_names",
    "unpack_by",
]


def masks_of(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Which entries an adapter tunes, of all parameters that its config selects.

    Args:
        model: with the adapter.
        adapter_name: which.

    Returns:
        By the base parameter's name, bool of its shape, True where it is tuned.
    """
    base = model.get_base_model()
    facts, deltas = ModelFacts(base), deltas_of(base, adapter_name)
    masks = {}
    for name, part in planned_deltas(facts, model.peft_config[adapter_name]).items():
        for parameter in part.entries:
            delta = deltas.get(f"{name}.{PREFIX}{parameter}")
            own = part.own_name(parameter)
            shape = getattr(facts.modules[name], own).shape
            masks[f"{name}.{own}"] = torch.zeros(shape, dtype=torch.bool) if delta is None else delta.tuned()
    return masks


def planned_deltas(facts: ModelFacts, config: PeftConfig) -> dict[str, PlannedModule]:
    """Plan the modules in which a config tunes deltas, whose entries masks choose.

    Args:
        facts: of the model.
        config: any config of this package.

    Returns:
        The planned modules by name; empty where the config has no deltas.
    """
    planned = plan_parts(facts, config)
    return {name: its for part, plan in planned if method_of(part).has_masks for name, its in plan.parts.items()}


def unpack_by(
    modules: Mapping[str, nn.Module], config: LNTuneConfig, tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The tensors of a file, unpacked by what its config records, for a model that has no such adapter yet.

    Args:
        modules: the `base_modules` of the model.
        config: the config that was saved with the file.
        tensors: the state dict of the file.
        where: the file or adapter, for the message.

    Returns:
        A new dict.

    Raises:
        AdapterFileError: they were not packed from such an adapter of such a model.
    """
    sizes = {}
    for place, count in config.stored_counts.items():
        name, _, parameter = place.rpartition(f".{PREFIX}")
        module = modules.get(name)
        base = None if module is None else getattr(module, own_name(module, parameter), None)
        # Of a module that is not in this model nothing can be unpacked, so the lengths will not fit.
        if count is not None and isinstance(base, Tensor):
            sizes[place] = count, base.shape
    return unpack(tensors, sizes, where)


def scores_by(
    model: nn.Module, config: LNTuneConfig, tensors: Mapping[str, Tensor], trained: bool, adapter_name: str
) -> dict[str, Tensor]:
    """The tensors of a file with scores where supermasks will be trained, for a model that has no such adapter yet.

    Args:
        model: the model to load into.
        config: the config that was saved with the file.
        tensors: the state dict of the file.
        trained: whether the adapter will be trained.
        adapter_name: for messages.

    Returns:
        A new dict.

    Raises:
        AdapterFileError: the bits are not those of this model.
    """
    facts = ModelFacts(model)
    planned = plan_parts(facts, config)
    shapes = [method_of(part).mask_shapes(facts, part, plan, trained) for part, plan in planned]
    return with_scores(tensors, {name: shape for own in shapes for name, shape in own.items()}, adapter_name)


def held_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors of a state dict that are parts of an adapter: not its heads, nor what only looks like a part.

    Args:
        model: with the adapter; modules that FSDP has wrapped go by the names they have without it, as in `tensors`.
        adapter_name: which.
        tensors: a state dict of the model.

    Returns:
        A new dict.
    """
    layers = {without_fsdp(name) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    found = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        above = {".".join(parts[:place]) for place in range(len(parts))}
        if is_part(key, adapter_name) and above & layers:
            found[key] = tensor
    return found


def own_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter as a model's state dict has them, without heads in `modules_to_save`.

    Args:
        model: with the adapter.
        adapter_name: which.

    Returns:
        The tensors by name.
    """
    tensors = {name: value for name, value in model.state_dict().items() if is_part(name, adapter_name)}
    return held_tensors(model, adapter_name, tensors)


def under_all_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors also under the further names of layers that the model shares.

    Args:
        model: the model.
        tensors: by name, as in the model's state dict.

    Returns:
        A new dict.
    """
    first = {module: name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    found = dict(tensors)
    for name, module in model.named_modules(remove_duplicate=False):
        if first.get(module, name) != name:
            inside = f"{first[module]}."
            found |= {f"{name}.{k.removeprefix(inside)}": t for k, t in tensors.items() if k.startswith(inside)}
    return found


def further_names(model: nn.Module, adapter_name: str) -> set[str]:
    """The names of an adapter's tensors in a model's state dict that come from a layer with an earlier name.

    Args:
        model: with the adapter.
        adapter_name: which.

    Returns:
        The names, which no file holds.
    """
    return {name for name in model.state_dict() if is_part(name, adapter_name)} - own_tensors(
        model, adapter_name
    ).keys()


def as_in_model(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the dtypes that an adapter has.

    Args:
        own: the `own_tensors` of the adapter.
        tensors: by name, as in the model's state dict.

    Returns:
        A new dict.
    """
    return {name: value.to(own[name].dtype if name in own else value.dtype) for name, value in tensors.items()}


def check_fit(own: Mapping[str, Tensor], adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise where the tensors of an adapter, keyed as in the model's state dict, are not the ones the model expects.

    Args:
        own: what the model has of this adapter, see `own_tensors`.
        adapter_name: the adapter.
        tensors: what is to be loaded.

    Raises:
        AdapterFileError: keys are missing or unexpected, or shapes differ. The model is as it was.
    """
    expected = {without_fsdp(name): value.shape for name, value in own.items()}
    found = {
        name: value.shape
        for name, value in tensors.items()
        if is_part(name, adapter_name) or is_ours(name.replace(f".{adapter_name}.", "."))
    }
    check_shapes(expected, found, adapter_name)
    first: dict[object, str] = {}
    for name, value in own.items():
        if value.is_meta or without_fsdp(name) not in tensors:
            continue
        other = first.setdefault((value.data_ptr(), value.shape), without_fsdp(name))
        if not torch.equal(tensors[other], tensors[without_fsdp(name)].to(tensors[other])):
            raise AdapterFileError(
                f"the saved adapter does not fit this model for adapter {adapter_name!r}: {other} and "
                f"{without_fsdp(name)} differ in the file, and here they are one, since modules share the parameter. "
                "Load it into a model in which they do not."
            )


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], adapter_name: str
) -> None:
    """Raise where the tensors of an adapter are not those that are expected.

    Args:
        expected: shapes by name.
        found: shapes by name, of what is to be loaded.
        adapter_name: for the message.

    Raises:
        AdapterFileError: names are missing or unexpected, or shapes differ.
    """
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    shapes = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    if not (missing or unexpected or shapes):
        return
    problems = [f"{len(missing)} missing, such as {min(missing)}"] if missing else []
    problems += [f"{len(unexpected)} unexpected, such as {min(unexpected)}"] if unexpected else []
    problems += [
        f"{len(shapes)} of another shape: {name} is {tuple(found[name])} in the file, {tuple(expected[name])} here"
        for name in sorted(shapes)[:1]
    ]
    raise AdapterFileError(
        f"the saved adapter does not fit this model for adapter {adapter_name!r}: {'; '.join(problems)}. "
        "It was trained on another model, or the file or its config was changed."
    )
