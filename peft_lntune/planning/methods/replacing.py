"""What the methods share whose layers take the places of modules."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_lntune.config import LNTuneConfig
from peft_lntune.core.delta import PARAMETERS, ParameterSlice, delta_dtype
from peft_lntune.errors import UnsupportedError
from peft_lntune.layers import ModuleLayer, NormLayer, ReplacementLayer
from peft_lntune.layers.offloaded import all_onloaded
from peft_lntune.norms.find import Norm
from peft_lntune.planning.methods.method import Counts, Injection, Method, Spot
from peft_lntune.planning.types import PlannedModule
from peft_lntune.storage.packing import ROOT

__all__ = ["ReplacingMethod"]


class ReplacingMethod(Method):
    """Base of the methods whose layers are put around a module, see `ReplacementLayer`."""

    replaces = True

    @abstractmethod
    def update(self, layer: Any, adapter_name: str, config: Any, part: PlannedModule, stored: bool) -> None:
        """Give a layer the adapter.

        Args:
            layer: around the module.
            adapter_name: the new adapter.
            config: its part.
            part: what the plan says of the module.
            stored: whether the values come from a file.
        """

    def put(self, tuner: BaseTuner, injection: Injection, config: Any, adapter_name: str, spot: Spot) -> None:
        target = spot.target
        # PEFT may come with modules that a state dict names, and not the plan.
        part = injection.plan.parts.get(spot.name) or self.select(config, spot.name, target).tuned
        if isinstance(target, ReplacementLayer):
            _tie(injection, target, part)
            with all_onloaded(target):  # an adapter lives where the module computes
                self._update(target, adapter_name, config, part, injection)
            return
        layer: ReplacementLayer
        if isinstance(part.place, Norm):
            layer = NormLayer(target, injection.route, part.place)
        else:
            # A mixed model injects its second adapter into itself, and so gives names from there.
            layer = ModuleLayer(target, injection.route, part.name.removeprefix(ROOT))
        layer.set_adapter(adapter_name)
        _tie(injection, layer, part)
        with all_onloaded(layer):
            self._update(layer, adapter_name, config, part, injection)
            if adapter_name not in tuner.active_adapters:
                layer.requires_grad_(False)
            tuner._replace_module(spot.parent, spot.target_name, layer, target)
        for place in injection.places.get(target, ()):
            assert place.put is not None
            place.put(layer)

    def _update(
        self, layer: ReplacementLayer, adapter_name: str, config: Any, part: PlannedModule, injection: Injection
    ) -> None:
        self.update(layer, adapter_name, config, part, injection.stored)
        for container in layer.adapter_layer_names:
            held: Any = getattr(layer, container)
            if adapter_name in held and injection.source in held:
                # Masks are buffers, and fixed; what is trained starts anew. Not in place: a new buffer may be on meta.
                for name, _ in list(held[adapter_name].named_buffers()):
                    setattr(held[adapter_name], name, getattr(held[injection.source], name).clone())

    def select(
        self,
        config: LNTuneConfig,
        name: str,
        module: nn.Module,
        norm: Norm | None = None,
        counts: Counts = None,
        only: Mapping[str, ParameterSlice | None] | None = None,
    ) -> PlannedModule:
        """What a config selects of one module, also parameters of which `counts` leaves nothing.

        Args:
            config: says which parameters.
            name: of the module.
            module: itself.
            norm: what is known of it, where it is a norm.
            counts: see `plan`.
            only: which of its parameters may be tuned, and which part of each.

        Returns:
            The plan of the module, with this method's name.

        Raises:
            UnsupportedError: the module has no floating weight.
        """
        names = dict.fromkeys(PARAMETERS) if norm is None else norm.parameters
        weight = getattr(module, names["weight"] or "weight", None)
        if not isinstance(weight, torch.Tensor) or not _takes_delta(weight):
            kind: Any = getattr(weight, "data", weight)
            plain = type(kind) is torch.Tensor
            has = "none" if weight is None else f"one of {kind.dtype if plain else type(kind).__name__}"
            raise UnsupportedError(
                f"{name} ({type(module).__name__}) is chosen to be tuned, but that needs a floating "
                f"`weight`, and it has {has}. Name its submodules instead, or leave it out."
            )
        wanted: Any = config
        found = {p: getattr(module, names[p] or p, None) for p in wanted.parameters if only is None or p in only}
        tuned = {p: t for p, t in found.items() if isinstance(t, torch.Tensor)}
        blocks = {p: block for p, block in (only or {}).items() if block is not None and p in tuned}
        sizes = {p: (blocks[p].shape_in(t.shape) if p in blocks else t.shape).numel() for p, t in tuned.items()}
        entries = {p: (_count(counts, name, p, size), size) for p, size in sizes.items()}
        size = sum(n * delta_dtype(tuned[p].dtype, config.torch_delta_dtype).itemsize for p, (n, _) in entries.items())
        return PlannedModule(name, type(module).__name__, norm, entries, size, self.name, blocks)


def _tie(injection: Injection, layer: ReplacementLayer, part: PlannedModule) -> None:
    injection.layers[part.name] = layer
    for parameter in part.entries:
        for other, its in injection.ties.get((part.name, parameter), ()):
            if other in injection.layers:
                layer.tie(parameter, injection.layers[other], its)


def _takes_delta(weight: torch.Tensor) -> bool:
    """Whether a delta can be added. Quantized tensors may call themselves floating, so a tensor class is tried."""
    if type(weight.data) is torch.Tensor or not weight.is_floating_point():
        return weight.is_floating_point()
    try:
        _ = weight.detach() + 0.0
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _count(counts: Counts, name: str, parameter: str, size: int) -> int:
    """Tuned entries of one parameter. Where some are listed, one that is not is not tuned."""
    count = counts.get(f"{name}.lntune_{parameter}", 0) if counts else None
    return size if count is None else count
