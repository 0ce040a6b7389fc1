"""Find the norms of a model by what they compute.

Names and class lists rot (transformers alone has over two hundred RMSNorm classes), so a module is a norm when a run
shows that its output is affine in its weight and bias and free of its input's scale; see `peft_lntune.core.probe`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from peft_lntune.core import probe
from peft_lntune.core.roles import find_roles

__all__ = ["Norm", "base_modules", "called_modules", "find_norms"]

_MAX_ENTRIES = 2**20  # no norm has a wider weight, and a probe of it stays a matter of milliseconds
_NEVER = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
_BASE_NAMES = ("base_layer", "original_module")  # where tuner layers and modules_to_save keep what they wrap


@dataclass(frozen=True)
class Norm:
    """One norm of a model: `y = xhat * (weight + offset) + bias`.

    Attributes:
        name: the module's name in the model.
        module_class: the name of its class.
        roles: the sub-layers it serves, see `peft_lntune.core.roles`; empty where the structure is unknown.
        weight_shape: `(d,)`, or `(heads, d)` with one row a head; None for a norm without parameters.
        bias_shape: as `weight_shape`; None where there is no bias.
        offset: 1.0 where the norm is zero-centred (Gemma multiplies by 1 + weight), else 0.0.
        axis: -1 where the parameters match the input's last dimensions, 1 where they match its channels (GroupNorm).
    """

    name: str
    module_class: str
    roles: tuple[str, ...]
    weight_shape: tuple[int, ...] | None
    bias_shape: tuple[int, ...] | None
    offset: float
    axis: int = -1


def find_norms(model: nn.Module, *, parameterless: bool = False) -> dict[str, Norm]:
    """Find the norms of a model, in the order of `named_modules`.

    Nothing of the model is run or changed: leaves of a fitting size are probed as small copies, those that are alike
    once. So a model may be on meta, quantized, or adapted already; a wrapped norm is found under its wrapper's name.

    Args:
        model: any module.
        parameterless: also list norms that have no weight. They can be seen, not tuned.

    Returns:
        The norms by module name.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
        >>> {name: norm.weight_shape for name, norm in find_norms(model).items()}
        {'1': (4,)}
    """
    modules = base_modules(model)
    seen: dict[tuple[object, ...], probe.Facts | None] = {}
    found: dict[str, tuple[nn.Module, probe.Facts]] = {}
    for name, module in modules.items():
        if not _may_be_norm(module, parameterless):
            continue
        key = probe.signature(module)
        if key not in seen:
            seen[key] = probe.measure(module)
        facts = seen[key]
        if facts is not None:
            found[name] = module, facts
    roles = find_roles(modules, found)
    return {
        name: Norm(
            name=name,
            module_class=type(module).__name__,
            roles=roles[name],
            weight_shape=_shape(module, "weight"),
            bias_shape=_shape(module, "bias"),
            offset=facts.offset,
            axis=facts.axis,
        )
        for name, (module, facts) in found.items()
    }


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
    while _is_tuner_layer(module):
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


def _is_tuner_layer(module: nn.Module) -> bool:
    # PEFT's own mark. The name `base_layer` alone would not do: backbones such as DLA have a child of that name.
    return hasattr(type(module), "adapter_layer_names")


def _may_be_norm(module: nn.Module, parameterless: bool) -> bool:
    """The cheap filter before a probe: a leaf, with nothing but a small floating weight and perhaps a bias like it."""
    if isinstance(module, _NEVER) or any(True for child in module.children() for _ in child.parameters()):
        return False
    own = {key: value for key, value in module._parameters.items() if value is not None}
    if not own:
        # Containers have a forward too, but a norm without parameters has no children.
        return parameterless and not module._modules and type(module).forward is not nn.Module.forward
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or not own.keys() <= {"weight", "bias"}:
        return False
    return (
        weight.is_floating_point()
        and weight.dim() in (1, 2)
        and weight.numel() <= _MAX_ENTRIES
        and (bias is None or bias.shape == weight.shape)
    )


def _shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    parameter: torch.Tensor | None = module._parameters.get(name)
    return None if parameter is None else tuple(parameter.shape)
