"""Whether tensors fit the adapter they are meant for: the last check before a value is taken."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_lntune.config import LNTuneConfig, SupermaskConfig
from peft_lntune.core.delta_module import Delta
from peft_lntune.core.module_tree import base_modules
from peft_lntune.core.prefix import Prefix
from peft_lntune.core.supermask import Supermask
from peft_lntune.errors import AdapterFileError
from peft_lntune.layers import PARAMETERS, ModuleLayer, PrefixLayer, ReplacementLayer
from peft_lntune.norms.names import own_name
from peft_lntune.planning.plan import plan, plan_parts
from peft_lntune.storage.keys import is_ours, is_part
from peft_lntune.storage.packing import PREFIX, ROOT, unpack, unpack_scores

__all__ = [
    "as_in_model",
    "check_fit",
    "check_shapes",
    "deltas_of",
    "fold",
    "folded",
    "further_names",
    "held_tensors",
    "masks_of",
    "own_tensors",
    "scores_by",
    "scores_for",
    "supermasks_of",
    "under_all_names",
    "unpack_by",
    "unpack_for",
]


def deltas_of(model: nn.Module, adapter_name: str) -> dict[str, Delta]:
    """The deltas of an adapter by their place in a model, `<module>.lntune_<parameter>`."""
    return {
        f"{_plain(name)}.lntune_{parameter}": layer.deltas(parameter)[adapter_name]
        for name, layer in model.named_modules()
        if isinstance(layer, ReplacementLayer)
        for parameter in PARAMETERS
        if adapter_name in layer.deltas(parameter)
    }


def masks_of(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Which entries an adapter tunes, of all parameters that its config selects: bool, by the base parameter's name."""
    base = model.get_base_model()
    modules = base_modules(base)
    deltas = deltas_of(base, adapter_name)
    masks = {}
    for name, part in plan(base, model.peft_config[adapter_name]).parts.items():
        for parameter in part.entries if part.method == "delta" else ():
            delta = deltas.get(f"{name}.{PREFIX}{parameter}")
            own = part.own_name(parameter)
            shape = getattr(modules[name], own).shape
            masks[f"{name}.{own}"] = torch.zeros(shape, dtype=torch.bool) if delta is None else delta.tuned()
    return masks


def unpack_for(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, unpacked by what is masked in this adapter of this model.

    Raises:
        AdapterFileError: they were not packed from such an adapter.
    """
    sizes = {
        place.removeprefix(ROOT): (delta.weight.numel(), delta.shape)
        for place, delta in deltas_of(model, adapter_name).items()
        if delta.mask is not None
    }
    return unpack(tensors, sizes, f"the saved adapter for {adapter_name!r}")


def unpack_by(
    modules: Mapping[str, nn.Module], config: LNTuneConfig, tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The tensors of a file, unpacked by what its config records, for a model that has no such adapter yet.

    Args:
        modules: the `base_modules` of the model.
        config: the config that was saved with the file.
        tensors: the state dict of the file.
        where: the file or adapter, for the message.

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


def supermasks_of(model: nn.Module, adapter_name: str) -> dict[str, Supermask]:
    """The supermasks of an adapter by their module, named as in `model`."""
    return {
        _plain(name): layer.lntune_supermask[adapter_name]  # type: ignore[misc]
        for name, layer in model.named_modules()
        if isinstance(layer, ModuleLayer) and adapter_name in layer.lntune_supermask
    }


def scores_for(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with scores where this adapter's supermasks are trained, and bits where they are not.

    Raises:
        AdapterFileError: the bits are not those of this model.
    """
    masks = {
        name.removeprefix(ROOT): (mask.part_shape, None if mask.weight is None else mask.score)
        for name, mask in supermasks_of(model, adapter_name).items()
    }
    return _with_scores(tensors, masks, adapter_name)


def scores_by(
    model: nn.Module, config: LNTuneConfig, tensors: Mapping[str, Tensor], trained: bool, adapter_name: str
) -> dict[str, Tensor]:
    """As `scores_for`, for a model that has no such adapter yet.

    Raises:
        AdapterFileError: the bits are not those of this model.
    """
    masks: dict[str, tuple[torch.Size, float | None]] = {}
    for part, planned in plan_parts(model, config):
        if isinstance(part, SupermaskConfig):
            modules = base_modules(model)
            for name, place in planned.parts.items():
                weight: Any = modules[name].weight
                block = place.blocks.get("weight")
                shape = weight.shape if block is None else block.shape_in(weight.shape)
                masks[name] = shape, part.initial_score if trained else None
    return _with_scores(tensors, masks, adapter_name)


def _with_scores(
    tensors: Mapping[str, Tensor], masks: Mapping[str, tuple[torch.Size, float | None]], adapter_name: str
) -> dict[str, Tensor]:
    found, made = unpack_scores(tensors, masks, f"the saved adapter for {adapter_name!r}")
    if made:
        warnings.warn(
            f"adapter {adapter_name!r} is loaded to be trained, but {len(made)} of its supermasks were saved as bits "
            "alone: all their scores start anew, at plus or minus initial_score. To go on as if training had not "
            "stopped, save with SupermaskConfig(save_scores=True).",
            stacklevel=2,
        )
    return found


def _plain(name: str) -> str:
    """The name of a module without what FSDP 1 puts into it, which state dicts leave out."""
    return ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")


def held_tensors(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors of a state dict that are parts of an adapter: not its heads, nor what only looks like a part.

    Args:
        model: with the adapter; modules that FSDP has wrapped go by the names they have without it, as in `tensors`.
        adapter_name: which.
        tensors: a state dict of the model.
    """
    layers = {_plain(name) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    found = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        above = {".".join(parts[:place]) for place in range(len(parts))}
        if is_part(key, adapter_name) and above & layers:
            found[key] = tensor
    return found


def folded(adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an adapter with each prefix as its values, where it is trained through a network.

    They come from the tensors given: a model whose parameters are sharded does not have them whole. DeepSpeed's ZeRO 3
    leaves flat and empty tensors to the processes that write nothing, and these stay as they are.
    """
    found = dict(tensors)
    ending = f".lntune_prefix.{adapter_name}.embedding"
    for key in (key for key, tensor in tensors.items() if key.endswith(ending) and tensor.dim() == 2):
        name = key.removesuffix("embedding")
        own = {other.removeprefix(name): found.pop(other) for other in tensors if other.startswith(name)}
        columns, width = own["embedding"].shape
        network = Prefix(columns, width, hidden=len(own["down.bias"]), device=torch.device("meta"))
        found[f"{name}weight"] = torch.func.functional_call(network, own, ()).detach()
    return found


def fold(model: nn.Module, adapter_name: str) -> None:
    """Make an adapter ready for prefixes as they are saved: values in place of the MLP that gave them."""
    for _, prefix in _prefixes(model, adapter_name):
        prefix.fold_()


def _prefixes(model: nn.Module, adapter_name: str) -> list[tuple[str, Prefix]]:
    return [
        (f"{name}.lntune_prefix.{adapter_name}", layer.lntune_prefix[adapter_name])
        for name, layer in model.named_modules()
        if isinstance(layer, PrefixLayer) and adapter_name in layer.lntune_prefix
    ]


def own_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter as a model's state dict has them, without heads in `modules_to_save`."""
    tensors = {name: value for name, value in model.state_dict().items() if is_part(name, adapter_name)}
    return held_tensors(model, adapter_name, tensors)


def under_all_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, keyed as in the model's state dict, also under the further names of layers that the model shares."""
    first = {module: name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    found = dict(tensors)
    for name, module in model.named_modules(remove_duplicate=False):
        if first.get(module, name) != name:
            inside = f"{first[module]}."
            found |= {f"{name}.{k.removeprefix(inside)}": t for k, t in tensors.items() if k.startswith(inside)}
    return found


def further_names(model: nn.Module, adapter_name: str) -> set[str]:
    """The names of an adapter's tensors in a model's state dict that come from a layer with an earlier name."""
    return {name for name in model.state_dict() if is_part(name, adapter_name)} - own_tensors(
        model, adapter_name
    ).keys()


def as_in_model(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, keyed as in the model's state dict, in the dtypes that they have among the adapter's `own_tensors`."""
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
    expected = {_plain(name): value.shape for name, value in own.items()}
    found = {
        name: value.shape
        for name, value in tensors.items()
        if is_part(name, adapter_name) or is_ours(name.replace(f".{adapter_name}.", "."))
    }
    check_shapes(expected, found, adapter_name)
    first: dict[object, str] = {}
    for name, value in own.items():
        if value.is_meta or _plain(name) not in tensors:
            continue
        other = first.setdefault((value.data_ptr(), value.shape), _plain(name))
        if not torch.equal(tensors[other], tensors[_plain(name)].to(tensors[other])):
            raise AdapterFileError(
                f"the saved adapter does not fit this model for adapter {adapter_name!r}: {other} and {_plain(name)} "
                "differ in the file, and here they are one, since modules share the parameter. Load it into a model "
                "in which they do not."
            )


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], adapter_name: str
) -> None:
    """Raise where the tensors of an adapter are not those that are expected, by name and shape.

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
