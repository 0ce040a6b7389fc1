"""PEFT's own adapters switched off for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["switched_off"]


@contextmanager
def switched_off(layers: Sequence[Any]) -> Iterator[None]:
    """Inside this context layers compute what their base layers do.

    Not by PEFT's `enable_adapters`, which also changes what requires a gradient.

    Args:
        layers: tuner layers, and PEFT's wrappers of heads. Those that are off already stay off afterwards.

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
