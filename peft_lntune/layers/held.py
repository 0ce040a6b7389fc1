"""What an adapter holds in the layers of a model, by place."""

from torch import nn

from peft_lntune.core.delta_module import Delta
from peft_lntune.core.prefix import Prefix
from peft_lntune.core.supermask import Supermask
from peft_lntune.layers.module import ModuleLayer
from peft_lntune.layers.prefix import PrefixLayer
from peft_lntune.layers.replacing import PARAMETERS, ReplacementLayer

__all__ = ["deltas_of", "prefixes_of", "supermasks_of", "without_fsdp"]


def deltas_of(model: nn.Module, adapter_name: str) -> dict[str, Delta]:
    """The deltas of an adapter by their place in a model, `<module>.lntune_<parameter>`.

    Args:
        model: the model; modules that FSDP has wrapped go by the names they have without it.
        adapter_name: the adapter.
    """
    return {
        f"{without_fsdp(name)}.lntune_{parameter}": layer.deltas(parameter)[adapter_name]
        for name, layer in model.named_modules()
        if isinstance(layer, ReplacementLayer)
        for parameter in PARAMETERS
        if adapter_name in layer.deltas(parameter)
    }


def supermasks_of(model: nn.Module, adapter_name: str) -> dict[str, Supermask]:
    """The supermasks of an adapter by the module they are for.

    Args:
        model: the model; modules that FSDP has wrapped go by the names they have without it.
        adapter_name: the adapter.
    """
    return {
        without_fsdp(name): layer.lntune_supermask[adapter_name]  # type: ignore[misc]
        for name, layer in model.named_modules()
        if isinstance(layer, ModuleLayer) and adapter_name in layer.lntune_supermask
    }


def prefixes_of(model: nn.Module, adapter_name: str) -> list[Prefix]:
    """The prefixes of an adapter in a model."""
    layers = [layer for layer in model.modules() if isinstance(layer, PrefixLayer)]
    return [layer.lntune_prefix[adapter_name] for layer in layers if adapter_name in layer.lntune_prefix]


def without_fsdp(name: str) -> str:
    """The name of a module without what FSDP 1 puts into it, which state dicts leave out."""
    return ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")
