"""Looking at trained supermasks: the masks themselves, and evaluation with drawn ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from peft_lntune.core.supermask import kept
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.layers import ModuleLayer

__all__ = ["keep_masks", "sampled_masks", "start_masks"]


def keep_masks(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The masks of a supermask adapter as evaluation, merging and files have them.

    Args:
        model: a model with such an adapter.
        adapter_name: which.

    Returns:
        For each masked base weight, by its name in the base model, bool of its shape, True where it is kept; on the
        weight's device. Of a matrix in which only some components are masked, the others are kept.

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
    """The masks that a supermask adapter started from, by the magnitudes of the base weights and its config.

    Args:
        model: a model with such an adapter.
        adapter_name: which.

    Returns:
        As `keep_masks`.

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
    """Draw a supermask anew at every call in evaluation too, as in training, while the context lasts.

    The mean over several passes says what the distribution of masks has learnt, beside the thresholded one. The draws
    are torch's: `torch.manual_seed` repeats them.

    Args:
        model: a model with such an adapter.
        adapter_name: which.

    Raises:
        ConfigError: the adapter is unknown, or has no supermask.
        UnsupportedError: it has no scores, since it was loaded for inference; or it is merged.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lntune import SupermaskConfig
        >>> config = SupermaskConfig(target_modules=["0"], initial_score=0.01)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(9, 9)), config).eval()
        >>> with sampled_masks(model):
        ...     bool((model(Tensor(1, 9)) == model(Tensor(1, 9))).all())
        False
    """
    masks = _masks(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer, _ in masks):
        raise UnsupportedError(f"adapter {adapter_name!r} is merged, so nothing is drawn. Call unmerge_adapter().")
    if any(mask.weight is None for _, mask in masks):
        raise UnsupportedError(
            f"adapter {adapter_name!r} holds bits alone, so there are no probabilities to draw from. Save it with "
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
