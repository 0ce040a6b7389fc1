"""A model as a tree of its own modules, without what tuners and wrappers of PEFT put around them."""

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["base_model", "base_modules", "called_modules", "is_tuner_layer"]


_BASE_NAMES = ("base_layer", "original_module")  # where tuner layers and modules_to_save keep what they wrap


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name, as they were before it was adapted.

    A tuner's layer stands for the module it wraps (its child `base_layer`, or `original_module`), and what tuners have
    added is left out. Without adapters this is `dict(model.named_modules())`.
    """
    return {name: base for name, _, base in _walk(model, "", set())}


def called_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules under the names of `base_modules`, as the model calls them: a tuner's layer where there is one.

    Example:
        >>> list(called_modules(nn.Sequential(nn.LayerNorm(2))))
        ['', '0']
    """
    return {name: called for name, called, _ in _walk(model, "", set())}


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    called = module
    while is_tuner_layer(module):
        base = next((module._modules[key] for key in _BASE_NAMES if module._modules.get(key) is not None), None)
        if base is None:  # it wraps nothing, so a tuner put it beside the model's own modules
            return
        module = base
    if module in seen:
        return
    seen.add(module)
    yield name, called, module
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen)


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether a module is what a tuner of PEFT has put into a model."""
    # PEFT's own mark. The name `base_layer` alone would not do: backbones such as DLA have a child of that name.
    return hasattr(type(module), "adapter_layer_names")


def base_model(model: nn.Module) -> nn.Module:
    """The model that PEFT was given, whose names are those of scores and masks; a plain model is its own."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()
