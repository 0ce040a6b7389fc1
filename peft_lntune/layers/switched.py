"""The tuner layers of a model, and how to switch them off for the duration of a context."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_lntune.errors import RoutingError

__all__ = ["switched_off", "unmerged_layers"]


def unmerged_layers(modules: Iterable[nn.Module], doing: str) -> list[Any]:
    """The tuner layers and wrapped heads of a model, after checking that none is merged.

    Args:
        modules: all modules of the model.
        doing: what is refused with merged adapters, such as `"route"`, for the error.

    Returns:
        The layers and wrappers, in the order of `modules`.

    Raises:
        RoutingError: an adapter is merged.
    """
    layers = [module for module in modules if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise RoutingError(f"cannot {doing} when there are merged adapters, please call `unmerge_adapter` first.")
    return layers


@contextmanager
def switched_off(layers: Sequence[Any]) -> Iterator[None]:
    """Inside this context, layers compute what their base layers do.

    PEFT's `enable_adapters` is not used because it also changes which parameters require gradients.

    Args:
        layers: tuner layers and PEFT's wrappers of heads. Layers that are already off stay off afterwards.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> with switched_off([layer]):
        ...     layer.disable_adapters
        True
        >>> layer.disable_adapters
        False
    """
    on = [layer for layer in layers if not layer._disable_adapters]
    try:
        for layer in on:
            layer._disable_adapters = True
        yield
    finally:
        for layer in on:
            layer._disable_adapters = False
