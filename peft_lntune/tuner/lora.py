"""PEFT's LoRA layers, with an adapter for each row of a batch."""

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
    """Inside this context LoRA layers mix a batch as PEFT does it, a loop over adapters; `route` says whose each is."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    handles = [
        layer.register_forward_pre_hook(partial(_named_rows, route, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named_rows(route: Route, label: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not route.on():  # a copy that was made meanwhile
        return None
    shape = args[0].shape
    index = route.index(shape, label, torch.device("cpu")).tolist()
    names = [route.order[place] for place in (index if len(index) == shape[0] else index * shape[0])]
    return args, {**kwargs, "adapter_names": names}
