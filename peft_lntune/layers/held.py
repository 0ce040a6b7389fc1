"""The deltas, supermasks and prefixes of an adapter in the layers of a model."""

from collections.abc import Mapping

from torch import nn

from peft_lntune.core.delta_module import Delta
from peft_lntune.core.prefix import Prefix
from peft_lntune.core.supermask import Supermask
from peft_lntune.layers.module import ModuleLayer
from peft_lntune.layers.prefix import PrefixLayer
from peft_lntune.layers.replacing import PARAMETERS, ReplacementLayer

__all__ = ["deltas_in", "deltas_of", "prefixes_of", "supermasks_of", "without_fsdp"]


def deltas_of(model: nn.Module, adapter_name: str) -> dict[str, Delta]:
    """The deltas of an adapter in a model.

    Args:
        model: the model; FSDP's wrappers are left out of the names.
        adapter_name: the adapter.

    Returns:
        The deltas by the name `<module>.lntune_<parameter>`.
    """
    found = {}
    for name, delta in deltas_in(dict(model.named_modules()), adapter_name).items():
        module, _, parameter = name.rpartition(".")
        found[f"{without_fsdp(module)}.lntune_{parameter}"] = delta
    return found


def deltas_in(called: Mapping[str, nn.Module], adapter_name: str) -> dict[str, Delta]:
    """The deltas of an adapter among given modules, by the names of the parameters that they are added to.

    With the `called_modules` of a base model these are the names of the base parameters. PEFT's names would not do: a
    head's copy holds copies of the layers of other adapters.

    Args:
        called: modules by name.
        adapter_name: the adapter.

    Returns:
        The delta modules, by `<module>.weight` or `<module>.bias`.
    """
    return {
        f"{place}.{parameter}": layer.deltas(parameter)[adapter_name]
        for place, layer in called.items()
        if isinstance(layer, ReplacementLayer)
        for parameter in PARAMETERS
        if adapter_name in layer.deltas(parameter)
    }


def supermasks_of(model: nn.Module, adapter_name: str) -> dict[str, Supermask]:
    """The supermasks of an adapter in a model.

    Args:
        model: the model; FSDP's wrappers are left out of the names.
        adapter_name: the adapter.

    Returns:
        The supermasks by the name of the module they mask.
    """
    return {
        without_fsdp(name): layer.lntune_supermask[adapter_name]  # type: ignore[misc]
        for name, layer in model.named_modules()
        if isinstance(layer, ModuleLayer) and adapter_name in layer.lntune_supermask
    }


def prefixes_of(model: nn.Module, adapter_name: str) -> list[Prefix]:
    """The prefixes of an adapter in a model.

    Args:
        model: the model.
        adapter_name: the adapter.

    Returns:
        The prefixes in module order.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PrefixLayer)]
    return [layer.lntune_prefix[adapter_name] for layer in layers if adapter_name in layer.lntune_prefix]


def without_fsdp(name: str) -> str:
    """The name of a module without the wrappers of FSDP 1, which state dicts leave out too."""
    return ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")
