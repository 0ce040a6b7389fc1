"""The layer around any other module with a floating-point weight: a full delta, or a mask over its weight."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.delta import ParameterSlice, delta_dtype
from peft_lntune.core.override import forward_with, overridden, runs_own_forward
from peft_lntune.core.rebuild import can_rebuild, is_plain, rebuilt_in_backward, unwritten
from peft_lntune.core.supermask import Supermask
from peft_lntune.layers.replacing import CachedCall, ReplacementLayer
from peft_lntune.routing.route import BASE, Route

__all__ = ["ModuleLayer"]


class ModuleLayer(ReplacementLayer):
    """A module that a config names (Linear, Embedding, Conv, ...), with its deltas and the masks over its weight.

        y = f(x; round(mask(w) + dw), round(b + db))

    The sum is rounded to the base dtype, as in mixed-precision training, since a matrix product in float32 would be
    expensive. The delta itself stays in float32, so that small steps add up. With several active adapters, masks are
    applied first: a mask switches off weights of the base, not the deltas of another adapter.

    Args:
        base_layer: the module to tune, or another tuner's layer around it (in a mixed model).
        route: which row of a batch uses which adapter; one object shared by all layers of a model.
        label: name of the module in the model, for errors.
    """

    adapter_layer_names = (*ReplacementLayer.adapter_layer_names, "lntune_supermask")

    def __init__(self, base_layer: nn.Module, route: Route, label: str) -> None:
        super().__init__(base_layer, route, label)
        self.lntune_supermask = nn.ModuleDict()

    def add_supermask(self, adapter_name: str, config: Any, block: ParameterSlice | None, stored: bool) -> None:
        """Add an adapter that masks the weight.

        Args:
            adapter_name: the new adapter.
            config: its `SupermaskConfig`.
            block: the part of the weight to mask; None: all of it.
            stored: whether its values will be loaded from a file.
        """
        base, base_layer = self.unmerged("weight"), self.get_base_layer()
        mask = Supermask(
            base,
            config.initial_sparsity,
            config.initial_score,
            delta_dtype(base.dtype, config.torch_delta_dtype),
            trained=not config.inference_mode,
            block=block,
            blank=stored,
        )
        if not config.init_weights and mask.weight is not None:
            nn.init.normal_(mask.weight)
        mask.train(base_layer.training)  # a new module is in training mode and would draw masks in evaluation
        for layer in (self, *self.tied_to("weight", adapter_name)):
            layer.lntune_supermask[adapter_name] = mask  # the plan ties masks only to masks
            layer._forget()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._forget()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def sample(self, adapter_name: str, sampling: bool) -> None:
        """Set whether the mask of an adapter is drawn outside training too.

        Args:
            adapter_name: the adapter.
            sampling: whether to draw it.
        """
        self.lntune_supermask[adapter_name].sampling = sampling  # type: ignore[assignment]  # a module's attribute
        self._forget()

    def _cached(self, adapters: Sequence[str]) -> CachedCall | None:
        masks: Any = self._modules["lntune_supermask"]._modules  # type: ignore[union-attr]
        if any(masks[name].drawn for name in adapters if name in masks):
            self._cache = None  # each call draws another mask
            return None
        return super()._cached(adapters)

    def _tuned(self, adapters: Any) -> list[tuple[str, Any]]:
        masks = self._modules["lntune_supermask"]._modules  # type: ignore[union-attr]
        return [("weight", masks[name]) for name in adapters if name in masks] + super()._tuned(adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        masks: Any = self.lntune_supermask
        if adapter_name in masks and not getattr(masks[adapter_name], masks[adapter_name].stored).is_meta:
            masks[adapter_name].to(device or self.base_parameter("weight").device)

    def _call(self, adapters: Sequence[str]) -> Callable[..., Tensor] | None:
        cached = self._cached(adapters)
        if cached is not None:
            return cached.call
        tuned = self._tuned(adapters)
        masks_and_deltas = [module for parameter, module in tuned if parameter == "weight"]
        if not masks_and_deltas or not can_rebuild() or not is_plain(self.get_base_layer(), "weight"):
            return partial(self.run, self._sums(tuned)) if tuned else None
        sums = self._sums([found for found in tuned if found[0] != "weight"])
        return partial(self._run_rebuilding, masks_and_deltas, sums)

    def run(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        inner = self.get_base_layer()
        rounded = {name: value.to(getattr(inner, name).dtype) for name, value in parameters.items()}
        if self.base_layer is inner and runs_own_forward(inner):
            return forward_with(inner, rounded, inner.forward, *args, **kwargs)
        # Hooks run, and layers of other tuners in between (LoRA in a mixed model), which see these parameters.
        return overridden(inner, rounded, self.base_layer, *args, **kwargs)

    def _run_rebuilding(
        self, masks_and_deltas: Sequence[Any], others: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Like `run`, but the effective weight is recomputed in the backward pass instead of being saved."""
        base: Any = self.get_base_layer().weight
        read, value, steps = unwritten(base), base, []
        for module in masks_and_deltas:
            value, step = module.with_rebuild(value)
            steps.append(step)
        parameters = {"weight": value.to(base.dtype), **others}
        if None in steps:
            return self.run(parameters, *args, **kwargs)

        def make() -> Tensor:
            again = read()
            for step in steps:
                again = step(again)
            return again.to(base.dtype)

        with rebuilt_in_backward([(parameters["weight"], make)]):
            return self.run(parameters, *args, **kwargs)

    def run_routed(self, *args: Any, **kwargs: Any) -> Tensor:
        """One pass per adapter in the batch, as in PEFT's LoRA: a full delta per row would not fit in memory."""
        x, *others = args
        return self._route.by_adapter(x, self.label, lambda name, rows: self._run_one(name, rows, *others, **kwargs))

    def _run_one(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        call = self._call([] if adapter == BASE else [adapter]) or self.base_layer
        return call(*args, **kwargs)
