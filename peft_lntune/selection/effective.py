"""The effective parameters of a model, under the names of its base model."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.module_tree import base_model, base_modules, below

__all__ = ["effective_parameters"]


def effective_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model with its active adapters merged in; the model itself does not change.

    Merged values are in float32 or wider, so no part of an adapter on a half-precision model is rounded away. Modules
    copied by `modules_to_save` are read from the active adapter's copy. A shared parameter has its first name.

    Args:
        model: a plain model, or one with adapters of any PEFT tuner whose layers can be merged.

    Returns:
        Tensors by the names of the base model's parameters; copies only where an adapter changes the parameter.

    Example:
        >>> list(effective_parameters(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2, bias=False))))
        ['0.weight', '0.bias', '1.weight']
    """
    model = base_model(model)
    owners = base_modules(model)
    modules = dict(owners)
    for name, layer in model.named_modules():
        if name in owners and layer is not owners[name]:
            inner = base_modules(_merged(layer))
            modules.update({f"{name}.{path}" if path else name: module for path, module in inner.items()})
    first: dict[int, str] = {}  # by base parameter, since an adapter on one of two shared parameters adds no name
    for name, parameter in _parameters(owners):
        first.setdefault(id(parameter), name)
    names = set(first.values())
    return {name: value.detach() for name, value in _parameters(modules) if name in names}


def _parameters(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield below(name, key), parameter


def _merged(layer: Any) -> nn.Module:
    """A copy of the module that a tuner's layer replaces, with the active adapters merged into it."""
    copy: Any = _wide(deepcopy(layer))
    if hasattr(copy, "unload_and_optionally_merge_module"):  # modules_to_save
        unload = copy.unload_and_optionally_merge_module
        return copy.original_module if copy.disable_adapters else unload(True, False, None)
    for part in list(copy.modules()):  # a layer of one tuner may wrap that of another
        if hasattr(part, "merged_adapters") and not part.disable_adapters:
            left = [name for name in part.active_adapters if name not in part.merged_adapters]
            if left:
                part.merge(adapter_names=left)
    return copy.get_base_layer()


def _wide(layer: nn.Module) -> nn.Module:
    dtypes = {value.dtype for value in layer.parameters() if value.is_floating_point()}
    return layer.to(torch.float64 if torch.float64 in dtypes else torch.float32)
