"""Trained supermasks: the masks themselves, and evaluation with drawn masks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from peft_lntune.core.supermask import kept
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.layers import ModuleLayer

__all__ = ["keep_masks", "sampled_masks", "start_masks"]


def keep_masks(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Return the masks of a supermask adapter that evaluation, merging and saving use.

    Args:
        model: a model with a supermask adapter.
        adapter_name: the adapter.

    Returns:
        For each masked base weight by its name in the base model, a bool tensor of its shape on its device, True for
        entries that are kept. Components of a matrix that are not masked are kept.

    Raises:
        ConfigError: the adapter is unknown, or has no supermask.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lntune import SupermaskConfig
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(Tensor([[0.1, -3.0]]))
        >>> config = SupermaskConfig(target_modules=["0"], initial_sparsity=0.5)
        >>> keep_masks(get_peft_model(model, config))
        {'0.weight': tensor([[False,  True]])}
    """
    return {
        f"{layer.label}.weight": _dense(mask.block, mask.mask(), layer) for layer, mask in _masks(model, adapter_name)
    }


def start_masks(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Recompute the masks that a supermask adapter started from, from the base weights and its config.

    Args:
        model: a model with a supermask adapter.
        adapter_name: the adapter.

    Returns:
        For each masked base weight by its name in the base model, a bool tensor of its shape on its device, True for
        entries that were kept at the start.

    Raises:
        ConfigError: the adapter is unknown, or has no supermask.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lntune import SupermaskConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 1)), SupermaskConfig(target_modules=["0"]))
        >>> start_masks(model)
        {'0.weight': tensor([[True, True]])}
    """
    found = {}
    for layer, mask in _masks(model, adapter_name):
        base = layer.unmerged("weight")
        part = base if mask.block is None else mask.block.of(base)
        found[f"{layer.label}.weight"] = _dense(mask.block, kept(mask.start(part)), layer)
    return found


@contextmanager
def sampled_masks(model: nn.Module, adapter_name: str = "default") -> Iterator[None]:
    """Draw a new supermask at every call inside this context, in evaluation too.

    The mean over several passes evaluates the learnt distribution of masks, instead of the thresholded mask. Draws come
    from torch's generator, so `torch.manual_seed` repeats them.

    Args:
        model: a model with a supermask adapter.
        adapter_name: the adapter.

    Yields:
        Nothing.

    Raises:
        ConfigError: the adapter is unknown, or has no supermask.
        UnsupportedError: the adapter has no scores, because it was loaded for inference; or it is merged.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lntune import SupermaskConfig
        >>> config = SupermaskConfig(target_modules=["0"], initial_score=0.01)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(9, 9)), config).eval()
        >>> with sampled_masks(model):
        ...     bool((model(torch.ones(1, 9)) == model(torch.ones(1, 9))).all())
        False
    """
    masks = _masks(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer, _ in masks):
        raise UnsupportedError(f"adapter {adapter_name!r} is merged, so nothing is drawn. Call unmerge_adapter().")
    if any(mask.weight is None for _, mask in masks):
        raise UnsupportedError(
            f"adapter {adapter_name!r} holds only bits, so there are no probabilities to draw from. Save it with "
            "SupermaskConfig(save_scores=True), and load it with is_trainable=True."
        )
    before = [mask.sampling for _, mask in masks]
    try:
        for layer, _ in masks:
            layer.sample(adapter_name, True)
        yield
    finally:
        for (layer, _), sampling in zip(masks, before, strict=True):
            layer.sample(adapter_name, sampling)


def _masks(model: nn.Module, adapter_name: str) -> list[tuple[ModuleLayer, Any]]:
    layers = [layer for layer in model.modules() if isinstance(layer, ModuleLayer)]
    found = [
        (layer, layer.lntune_supermask[adapter_name]) for layer in layers if adapter_name in layer.lntune_supermask
    ]
    if not found:
        known = sorted({name for layer in layers for name in layer.lntune_supermask}) or "none"
        raise ConfigError(f"this model has no supermasks of an adapter {adapter_name!r}; it has those of {known}.")
    return found


def _dense(block: Any, mask: Tensor, layer: ModuleLayer) -> Tensor:
    return mask if block is None else block.put(mask.new_ones(layer.base_parameter("weight").shape), mask)
