"""Switch adapters off for the duration of a context."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["switched_off"]


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
