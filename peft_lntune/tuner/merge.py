"""The order of merging where layers of several tuners lie around one module: ours first, and ours last to be unmerged.

LoRA adds to the weights that it finds, and subtracts again. A layer of ours writes what the weights of the base become,
and puts back what it found: after LoRA a mask would switch off what LoRA has learnt, and unmerging would leave that in.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_lntune.core.shared import find_places
from peft_lntune.errors import UnsupportedError
from peft_lntune.layers import InsertedLayer, ModuleLayer, ReplacementLayer
from peft_lntune.layers.offloaded import all_onloaded
from peft_lntune.tuner.tied import check_tied

__all__ = ["check_shared", "everywhere", "merge_layers", "take_out_layers", "unmerge_layers"]


def check_shared(model: nn.Module, adapter_names: Sequence[str] | None) -> None:
    """Raise where merging adapters would put LoRA's weights behind an active mask.

    Args:
        model: the model.
        adapter_names: which would be merged; None for the active ones.

    Raises:
        UnsupportedError: a supermask is active and stays unmerged on a module where another tuner's layer is merged.
    """
    if adapter_names is None:
        return
    for layer, others in _shared(model):
        to_merge = any(name in adapter_names for other in others for name in _held(other))
        if not to_merge or layer.merged or layer.added(adapter_names) or not isinstance(layer, ModuleLayer):
            continue
        masks = [name for name in layer.active_adapters if name in layer.lntune_supermask]
        if masks:
            raise UnsupportedError(
                f"the supermask {masks[0]!r} is active on {layer.label}, and would switch off what is merged there "
                f"too. Merge both, merge_adapter({[*adapter_names, masks[0]]!r}), or neither."
            )


def merge_layers(model: nn.Module, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
    """Merge adapters in all layers of a model; what is merged where ours will be is merged again.

    Args:
        model: the model.
        adapter_names: which; None for the active ones.
        safe_merge: raise where a merged value would not be finite.

    Raises:
        UnsupportedError: see `check_shared` and `check_tied`. Nothing has changed.
    """
    check_shared(model, adapter_names)
    check_tied(model, adapter_names)
    names = None if adapter_names is None else list(adapter_names)
    again: list[tuple[Any, list[str]]] = []
    for layer, others in _shared(model):
        for other in others:
            if other.merged and layer.added(names):
                again.append((other, list(other.merged_adapters)))
                with all_onloaded(other, keep=True):
                    other.unmerge()
    ours, rest = _sorted(model)
    for layer in ours:
        with all_onloaded(layer, keep=True):
            layer.merge(safe_merge=safe_merge, adapter_names=names)
    for layer, before in again:
        with all_onloaded(layer, keep=True):
            layer.merge(safe_merge=safe_merge, adapter_names=before)
    for layer in rest:
        with all_onloaded(layer, keep=True):
            layer.merge(safe_merge=safe_merge, adapter_names=names)


def unmerge_layers(model: nn.Module) -> None:
    """Unmerge all layers of a model."""
    ours, rest = _sorted(model)
    for layer in [*rest, *ours]:
        with all_onloaded(layer, keep=True):
            layer.unmerge()


def take_out_layers(model: nn.Module, merge: bool, safe_merge: bool, adapter_names: Sequence[str] | None) -> None:
    """Take our layers around modules out of a model, merged or not.

    What is left is other tuners', which PEFT unloads by itself. It would write a `weight` and a `bias` into norms too,
    and these may call them something else.

    Args:
        model: the model.
        merge: whether to merge adapters first.
        safe_merge: raise where a merged value would not be finite.
        adapter_names: the adapters to merge; None for the active ones.

    Raises:
        UnsupportedError: see `check_shared` and `check_tied`. Nothing has changed.
    """
    if merge:
        check_shared(model, adapter_names)
        check_tied(model, adapter_names)
    merged: set[nn.Module] = set()
    names = None if adapter_names is None else list(adapter_names)
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            layer: Any = child
            if isinstance(layer, ReplacementLayer):
                if merge and layer not in merged:
                    merged.add(layer)
                    with all_onloaded(layer, keep=True):
                        layer.merge(safe_merge=safe_merge, adapter_names=names)
                setattr(holder, name, layer.base_layer)


@contextmanager
def everywhere(model: nn.Module) -> Iterator[None]:
    """Let what replaces a layer of ours under its name replace it at every other place that held it too."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ReplacementLayer)}
    places = {layer: its for layer, its in find_places(model, layers.values()).items() if len(its) > 1}
    yield
    for name in [name for name, layer in layers.items() if layer in places]:
        now = model.get_submodule(name)
        for place in places[layers[name]]:
            if now is not layers[name] and place.put is not None:
                place.put(now)


def _sorted(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Our layers around modules, and the layers of other tuners."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    ours = [layer for layer in layers if isinstance(layer, ReplacementLayer)]
    return ours, [layer for layer in layers if not isinstance(layer, ReplacementLayer)]


def _shared(model: nn.Module) -> list[tuple[ReplacementLayer, list[Any]]]:
    """Our layers around modules that other tuners have layers around, with these."""
    ours, rest = _sorted(model)
    others: dict[int, list[Any]] = {}
    for layer in rest:
        if not isinstance(layer, InsertedLayer):
            others.setdefault(id(layer.get_base_layer()), []).append(layer)
    found = [(layer, others.get(id(layer.get_base_layer()), [])) for layer in ours]
    return [(layer, its) for layer, its in found if its]


def _held(layer: Any) -> set[str]:
    """The adapters that a layer of any tuner holds."""
    return {name for container in layer.adapter_layer_names for name in getattr(layer, container)}
