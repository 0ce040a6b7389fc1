"""LoRA as a part of a unified adapter: PEFT's own layers, with a row of a batch for each adapter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from peft_lntune.layers.offloaded import all_onloaded
from peft_lntune.routing.route import Route

__all__ = ["LoraPart", "routed_lora"]


class LoraPart(LoraModel):
    """PEFT's LoRA tuner for a moment, at work in the model of another tuner. It owns nothing and replaces nothing.

    Args:
        model: the model that the other tuner has.
        configs: the configs of all its adapters, a LoRA part in place of an adapter that has one.
        active: the other tuner's active adapters.
    """

    def __init__(self, model: nn.Module, configs: Mapping[str, Any], active: list[str]) -> None:
        nn.Module.__init__(self)  # PEFT's own would inject, and put its configs into the model
        self.model = model
        self.peft_config = dict(configs)
        self.active_adapter = active
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []

    def _create_and_replace(self, config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:
        with all_onloaded(target):  # PEFT puts an adapter where it finds the base's weight
            super()._create_and_replace(config, adapter_name, target, *args, **kwargs)


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
