"""PEFT's LoRA layers with one adapter per row of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_lntune.routing.route import Route

__all__ = ["routed_lora"]


@contextmanager
def routed_lora(model: nn.Module, route: Route) -> Iterator[None]:
    """Let LoRA layers mix a batch inside this context, by PEFT's loop over adapters.

    Args:
        model: a model with or without LoRA layers.
        route: the route that is on, which says which adapter each row uses.

    Yields:
        Nothing.
    """
    handles = [
        module.register_forward_pre_hook(partial(_named_rows, route, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named_rows(route: Route, label: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not route.on():  # a copy of the model made while the route was on
        return None
    shape = args[0].shape
    index = route.index(shape, label, torch.device("cpu")).tolist()
    names = [route.order[place] for place in (index if len(index) == shape[0] else index * shape[0])]
    return args, {**kwargs, "adapter_names": names}
