"""Base of the methods whose layers stand beside the model's own modules."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_lntune.core.delta import delta_dtype
from peft_lntune.layers import InsertedLayer
from peft_lntune.planning.gaps import warn_of_gaps
from peft_lntune.planning.methods.method import Injection, Method, Spot
from peft_lntune.planning.types import Plan, PlannedModule

__all__ = ["InsertedMethod"]


class InsertedMethod(Method):
    """Base of the methods whose layers are put beside a module; the layers are `InsertedLayer`s."""

    @abstractmethod
    def make_layer(self, injection: Injection, part: PlannedModule) -> InsertedLayer:
        """Make a layer for a planned module; it is not yet attached.

        Args:
            injection: the injection under way.
            part: the planned module.

        Returns:
            A layer without adapters.
        """

    def host(self, spot: Spot) -> nn.Module:
        """Return the module that gets the layer as a child: the module at the spot, unless a method says otherwise."""
        return spot.target

    def put(self, tuner: BaseTuner, injection: Injection, config: Any, adapter_name: str, spot: Spot) -> None:
        """Attach a layer beside the module at a spot, unless there is one, and give it the adapter.

        Args:
            tuner: the tuner of the model: ours or PEFT's mixed one.
            injection: the injection under way.
            config: config of the part.
            adapter_name: the new adapter.
            spot: the module that PEFT's injection has reached.
        """
        host, layer = self.host(spot), self.make_layer(injection, injection.plan.parts[spot.name])
        known = host._modules.get(layer.child)
        if isinstance(known, InsertedLayer):
            layer = known
        else:
            layer.attach(host)
        layer.update_layer(adapter_name, config, injection.stored)

    def warn(self, config: Any, plan: Plan) -> None:
        """Warn about sub-layers that the config asks for and that have no place.

        Args:
            config: the config.
            plan: the plan of that config.
        """
        warn_of_gaps(config, plan)

    def planned(self, config: Any, name: str, module: nn.Module, place: Any, sizes: Mapping[str, int]) -> PlannedModule:
        """Describe a module in which every entry is trained.

        Args:
            config: its `delta_dtype` is the dtype of the trained parameters.
            name: name of the module.
            module: the module.
            place: facts about the module, such as a `Sublayer`.
            sizes: number of entries of each trained tensor, by a name for the table.

        Returns:
            The plan of the module, with this method's name.
        """
        first = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        itemsize = delta_dtype(first, config.torch_delta_dtype).itemsize
        entries = {what: (count, count) for what, count in sizes.items()}
        size = sum(sizes.values()) * itemsize
        return PlannedModule(name, type(module).__name__, place, entries, size, self.name)
