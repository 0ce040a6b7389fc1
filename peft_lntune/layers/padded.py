"""Keep `nn.TransformerEncoder` from nested tensors where its layers cannot take them.

Given a padding mask in evaluation, torch's encoder packs the batch into a nested tensor, which its fused layers accept
and its unfused attention does not. It decides by its first layer alone. Layers after a trained layer or a bottleneck
are not fused, and torch then fails inside attention. So all layers are checked here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["keep_padded", "stop_keeping_padded"]

_NAMES = ("src", "mask", "src_key_padding_mask", "is_causal")


def keep_padded(modules: Mapping[str, nn.Module], tuned: Iterable[str]) -> None:
    """Keep encoders with tuned modules padded while any of their parameters requires a gradient.

    Args:
        modules: modules of the model by name.
        tuned: names of the tuned modules.

    Example:
        >>> layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, 2).eval()
        >>> keep_padded(dict(model.named_modules()), ["layers.1.norm1"])
        >>> model(torch.ones(1, 2, 4), src_key_padding_mask=torch.tensor([[False, True]])).shape
        torch.Size([1, 2, 4])
    """
    places = [f"{name}." for name in tuned]
    for name, module in modules.items():
        above = f"{name}." if name else ""
        if isinstance(module, nn.TransformerEncoder) and any(place.startswith(above) for place in places):
            stop_keeping_padded(module)
            module.register_forward_pre_hook(_with_a_mask, with_kwargs=True)


def stop_keeping_padded(model: nn.Module) -> None:
    """The inverse of `keep_padded`, for all encoders of a model."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _with_a_mask]:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _with_a_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments, with a mask that hides nothing where torch would nest: with a mask, it does not.

    Settings would have the same effect, but they are shared with other threads.
    """
    if not (torch.is_grad_enabled() and getattr(module, "use_nested_tensor", False)) or module.training:
        return None
    named = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    src, padding = named.get("src"), named.get("src_key_padding_mask")
    if src is None or padding is None or src.dim() != 3 or named.get("mask") is not None or named.get("is_causal"):
        return None
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    # torch warns where the two masks have different dtypes.
    named["mask"] = torch.zeros(src.shape[1], src.shape[1], dtype=padding.dtype, device=src.device)
    return (), {**named, "is_causal": False}
