"""Base of the methods whose layers replace modules."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_lntune.core.delta import PARAMETERS, ParameterSlice, delta_dtype
from peft_lntune.core.override import check_not_computed
from peft_lntune.errors import UnsupportedError
from peft_lntune.layers import ModuleLayer, NormLayer, ReplacementLayer
from peft_lntune.layers.offloaded import all_onloaded
from peft_lntune.norms.find import Norm
from peft_lntune.planning.methods.method import Counts, Injection, Method, Spot
from peft_lntune.planning.types import PlannedModule
from peft_lntune.storage.packing import ROOT

__all__ = ["ReplacingMethod"]


class ReplacingMethod(Method):
    """Base of the methods whose layers are put around a module; the layers are `ReplacementLayer`s."""

    replaces = True

    @abstractmethod
    def update(self, layer: Any, adapter_name: str, config: Any, part: PlannedModule, stored: bool) -> None:
        """Add an adapter to a layer.

        Args:
            layer: the layer around the module.
            adapter_name: the new adapter.
            config: config of the part.
            part: the plan of the module.
            stored: whether the values come from a file.
        """

    def put(self, tuner: BaseTuner, injection: Injection, config: Any, adapter_name: str, spot: Spot) -> None:
        """Put a layer around the module at a spot, wherever the model holds it, and give it the adapter.

        Args:
            tuner: the tuner of the model: ours or PEFT's mixed one.
            injection: the injection under way.
            config: config of the part.
            adapter_name: the new adapter.
            spot: the module that PEFT's injection has reached.

        Raises:
            UnsupportedError: the module is not in the plan and has no floating weight.
        """
        target = spot.target
        # PEFT may also inject into modules that a state dict names and the plan does not.
        part = injection.plan.parts.get(spot.name) or self.select(config, spot.name, target).tuned
        layer: Any = target
        if not isinstance(target, ReplacementLayer):
            if isinstance(part.place, Norm):
                layer = NormLayer(target, injection.route, part.place)
            else:
                # A mixed model injects its second adapter into itself, so its names begin with PEFT's prefix.
                layer = ModuleLayer(target, injection.route, part.name.removeprefix(ROOT))
            layer.set_adapter(adapter_name)
        _tie(injection, layer, part)
        with all_onloaded(layer):  # an adapter lives where the module computes
            self._update(layer, adapter_name, config, part, injection)
            if layer is target:
                return
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
                # Masks are buffers: copy them. Parameters start anew. Not in place: a new buffer may be on meta.
                for name, _ in list(held[adapter_name].named_buffers()):
                    setattr(held[adapter_name], name, getattr(held[injection.source], name).clone())

    def select(
        self,
        config: Any,
        name: str,
        module: nn.Module,
        norm: Norm | None = None,
        counts: Counts = None,
        only: Mapping[str, ParameterSlice | None] | None = None,
    ) -> PlannedModule:
        """Describe what a config selects in one module, including parameters of which `counts` tunes no entry.

        Args:
            config: a config with `parameters`, the parameters to tune.
            name: name of the module.
            module: the module.
            norm: facts about the module if it is a norm.
            counts: for each tuned parameter, `<module>.lntune_<parameter>`, the number of tuned entries, None for all.
            only: the parameters that may be tuned, each with the slice to tune (None: whole); None: no restriction.

        Returns:
            The plan of the module, with this method's name.

        Raises:
            UnsupportedError: the module has no floating weight, or what would be tuned is computed in each call.
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
        found = {p: getattr(module, names[p] or p, None) for p in config.parameters if only is None or p in only}
        for parameter in found:
            check_not_computed(module, names[parameter] or parameter, name)
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
    """Whether a delta can be added. Quantized tensors may claim to be floating, so tensor subclasses are tried."""
    if type(weight.data) is torch.Tensor or not weight.is_floating_point():
        return weight.is_floating_point()
    try:
        _ = weight.detach() + 0.0
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _count(counts: Counts, name: str, parameter: str, size: int) -> int:
    """Number of tuned entries of one parameter. If `counts` lists any, a parameter it does not list is not tuned."""
    count = counts.get(f"{name}.lntune_{parameter}", 0) if counts else None
    return size if count is None else count
