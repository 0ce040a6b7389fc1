"""What the methods share whose layers stand beside the model's own modules."""

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
    """Base of the methods whose layers are put beside a module, see `InsertedLayer`."""

    @abstractmethod
    def make_layer(self, injection: Injection, part: PlannedModule) -> InsertedLayer:
        """Make a layer for a planned module; it is not yet attached.

        Args:
            injection: the one under way.
            part: the planned module.

        Returns:
            The layer.
        """

    def host(self, spot: Spot) -> nn.Module:
        """The module of which the layer becomes a child."""
        return spot.target

    def put(self, tuner: BaseTuner, injection: Injection, config: Any, adapter_name: str, spot: Spot) -> None:
        host, layer = self.host(spot), self.make_layer(injection, injection.plan.parts[spot.name])
        known = host._modules.get(layer.child)
        if isinstance(known, InsertedLayer):
            layer = known
        else:
            layer.attach(host)
        layer.update_layer(adapter_name, config, injection.stored)

    def warn(self, config: Any, plan: Plan) -> None:
        warn_of_gaps(config, plan)

    def planned(self, config: Any, name: str, module: nn.Module, place: Any, sizes: Mapping[str, int]) -> PlannedModule:
        """A planned module.

        Args:
            config: says in which dtype its parameters are.
            name: of the module.
            module: itself.
            place: what is known of it.
            sizes: entries of what is trained there.

        Returns:
            The plan of the module, with this method's name.
        """
        first = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        itemsize = delta_dtype(first, config.torch_delta_dtype).itemsize
        entries = {what: (count, count) for what, count in sizes.items()}
        size = sum(sizes.values()) * itemsize
        return PlannedModule(name, type(module).__name__, place, entries, size, self.name)
