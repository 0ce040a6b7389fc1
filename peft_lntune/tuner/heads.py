"""Heads in `modules_to_save`: each row of a batch with the head of its adapter; and heads copied between adapters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_lntune.core.detour import Detour, patched
from peft_lntune.core.module_tree import is_tuner_layer
from peft_lntune.errors import MixedHeadError
from peft_lntune.norms.affine import split_call
from peft_lntune.routing.heads import HeadRun, group_rows, layers_of
from peft_lntune.routing.route import Route

__all__ = ["copy_heads", "routed_heads"]

STACKED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LOOPED = (*STACKED, nn.Embedding)
"""The classes that PEFT mixes by row, one adapter after the other."""

LARGE = 2**26
"""A layer that would have more entries than this for a batch is run adapter by adapter: 256 MiB in float32."""


@contextmanager
def routed_heads(model: nn.Module, route: Route) -> Iterator[dict[str, nn.Module]]:
    """Inside this context every head uses the adapter of its row, or the base model's where the adapter has none.

    A head's own forward runs, and each layer in it with the parameters of each row; layers that are large, and
    embeddings, one adapter after the other, as PEFT does it.

    Args:
        model: a model with or without heads in `modules_to_save`.
        route: the route in force.

    Yields:
        By label the layers that now follow the route, as a copy of the model would call them.

    Raises:
        MixedHeadError: a head cannot be mixed by row; the message names it.
    """
    heads = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    watched: dict[str, nn.Module] = {}
    detours: list[Detour] = []
    for label, head in heads.items():
        own = {name: copy for name, copy in head.modules_to_save.items() if name in route.names}
        copies = dict.fromkeys(route.names, head.original_module) | own
        alike = len(set(copies.values())) <= 1
        module = next(iter(copies.values()), head) if alike else head.original_module
        detours.append(Detour(head, route, partial(_checked, module, route, label)))
        for path in () if alike else _layers(head.original_module, label):
            name = f"{label}.{path}" if path else label
            layers = {adapter: copy.get_submodule(path) for adapter, copy in copies.items()}
            detours.append(_detour(head.original_module.get_submodule(path), name, layers, route))
            watched[name] = _active(head).get_submodule(path)
    with patched(detours):
        yield watched


def _checked(module: nn.Module, route: Route, label: str, own: Any, *args: Any, **kwargs: Any) -> Any:
    x, _, _ = split_call(args, kwargs)
    route.factor(x.shape, label)
    return module(*args, **kwargs)


def _layers(head: nn.Module, label: str) -> list[str]:
    """The paths of a head's layers in it."""
    if any(is_tuner_layer(module) for module in head.modules()):
        raise _refusal(head, label, "another adapter has its layers in it")
    modules = {f"head.{name}" if name else "head": module for name, module in head.named_modules()}
    return [layer.removeprefix("head").removeprefix(".") for layer in layers_of(modules, {}, "head")]


def _detour(layer: nn.Module, label: str, layers: Mapping[str, nn.Module], route: Route) -> Detour:
    """Give each row of a layer's input the layer of its adapter.

    Args:
        layer: of the base model.
        label: name of the layer.
        layers: for each adapter its copy, or the base model's layer itself.
        route: the route in force.
    """
    tensors = {name: _tensors(each) for name, each in layers.items()}
    groups = group_rows(route.names)
    copied = len(groups.owners if type(layer) is nn.Linear else route.names)
    known = type(layer) in STACKED or not isinstance(layer, LOOPED)  # a class made from these may do something else
    held = [tensor for own in tensors.values() for tensor in own.values()]
    if known and all(copied * tensor.numel() <= LARGE and not tensor.is_meta for tensor in held):
        run = HeadRun(layer, label, route)
        run.groups = groups
        run.rows = {key: torch.stack([tensors[name][key] for name in groups.owners]) for key in _tensors(layer)}
        return Detour(layer, route, run)
    if not isinstance(layer, LOOPED):
        raise _refusal(layer, label, "it is too large to have a copy for each row, or is offloaded")
    copies = {name: each for name, each in layers.items() if each is not layer}

    def loop(own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return route.by_adapter(x, label, lambda name, rows: copies.get(name, own)(rows, *args, **kwargs))

    return Detour(layer, route, loop)


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _active(head: ModulesToSaveWrapper) -> nn.Module:
    """What runs where no route is on, as in a copy of the model."""
    own = [head.modules_to_save[name] for name in head.active_adapters if name in head.modules_to_save]
    return own[0] if own and not head.disable_adapters else head.original_module


def _refusal(module: nn.Module, label: str, why: str) -> MixedHeadError:
    return MixedHeadError(
        f"{label} ({type(module).__name__}) is in modules_to_save and cannot be mixed by row: {why}. Save a plain "
        "layer inside it instead, or run one batch an adapter."
    )


def copy_heads(model: nn.Module, source: str, target: str) -> None:
    """Give adapter `target` the heads that adapter `source` has trained.

    Args:
        model: holds both adapters.
        source: name of the adapter that is read.
        target: name of the adapter that is written; heads that only one of the two has stay as they are.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and {source, target} <= module.modules_to_save.keys():
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())
