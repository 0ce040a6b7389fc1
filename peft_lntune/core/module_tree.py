"""The tree of a model's own modules, without the layers and wrappers of PEFT."""

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["base_model", "base_modules", "below", "called_modules", "is_tuner_layer"]

_BASE_NAMES = ("base_layer", "original_module")  # children in which tuner layers and modules_to_save hold the original


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name, as they were before it was adapted.

    A tuner's layer is replaced by the module it wraps (its child `base_layer` or `original_module`), and modules that
    tuners added are left out. Without adapters this is `dict(model.named_modules())`.

    Args:
        model: any model, plain or with adapters.

    Returns:
        The base model's modules, by their names in the base model.

    Example:
        >>> list(base_modules(nn.Sequential(nn.LayerNorm(2))))
        ['', '0']
    """
    return {name: base for name, _, base in _walk(model, "", set())}


def called_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model as it calls them, by their names in the base model: a tuner's layer where there is one.

    Args:
        model: any model, plain or with adapters.

    Returns:
        The same names as `base_modules` returns, with tuner layers in place of the modules they wrap.

    Example:
        >>> list(called_modules(nn.Sequential(nn.LayerNorm(2))))
        ['', '0']
    """
    return {name: called for name, called, _ in _walk(model, "", set())}


def _walk(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    called = module
    while is_tuner_layer(module):
        base = next((module._modules[key] for key in _BASE_NAMES if module._modules.get(key) is not None), None)
        if base is None:  # it wraps nothing: a tuner added it beside the model's own modules
            return
        module = base
    if module in seen:
        return
    seen.add(module)
    yield name, called, module
    for child_name, child in module.named_children():
        yield from _walk(child, below(name, child_name), seen)


def below(above: str, path: str) -> str:
    """Join the name of a module and a path below it.

    Args:
        above: name of the upper module; `""` for the model.
        path: path below it, such as the name of a child or parameter.

    Returns:
        The name of the lower module or parameter.

    Example:
        >>> below("h.0", "attn"), below("", "attn")
        ('h.0.attn', 'attn')
    """
    return f"{above}.{path}" if above else path


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether a PEFT tuner put this module into the model."""
    # The attribute marks PEFT's layers. The name `base_layer` does not: backbones such as DLA have such a child too.
    return hasattr(type(module), "adapter_layer_names")


def base_model(model: nn.Module) -> nn.Module:
    """The model that was given to PEFT; a plain model is returned as it is. Scores and masks use its names."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()
