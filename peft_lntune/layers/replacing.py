"""The state machine of the layers that wrap a module: active, disabled, merged, routed.

A layer wraps one leaf module and holds, per adapter, a `Delta` of its weight and of its bias. Subclasses implement how
the wrapped module runs with given parameters.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from peft_lntune.core.cache import TensorState, is_traced, is_valid, state_of, states_of, unwatch
from peft_lntune.core.delta import PARAMETERS, ParameterSlice, delta_dtype
from peft_lntune.core.delta_module import Delta
from peft_lntune.core.detour import Detour
from peft_lntune.core.override import check_not_computed
from peft_lntune.layers.offloaded import call_onloaded, check_trainable, offload_hook, onloaded
from peft_lntune.layers.routed import RoutedParameter
from peft_lntune.routing.route import Route

__all__ = ["PARAMETERS", "ReplacementLayer"]


class CachedCall(NamedTuple):
    """Cached forward call and the tensors it was built from.

    Attributes:
        adapters: the adapters whose deltas are in the parameters.
        sources: states of the tensors from which the parameters were computed.
        parameters: the effective parameters that differ from the base's.
        call: runs the wrapped module with these parameters; None where no parameter differs.
        wrapped: the wrapped module, perhaps another tuner's layer, and the model's own module inside it.
    """

    adapters: Sequence[str]
    sources: tuple[TensorState, ...]
    parameters: dict[str, Tensor]
    call: Callable[..., Tensor] | None
    wrapped: tuple[nn.Module, nn.Module]


class ReplacementLayer(nn.Module, BaseTunerLayer):
    """Base of the layers that replace a target module.

    Args:
        base_layer: the module to tune, or another tuner's layer around it (in a mixed model).
        route: which row of a batch uses which adapter; one object shared by all layers of a model.
        label: name of the module in the model, for errors.
    """

    adapter_layer_names: tuple[str, ...] = ("lntune_weight", "lntune_bias")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, route: Route, label: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lntune_weight = nn.ModuleDict()
        self.lntune_bias = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.label = label
        # PEFT expects these two on every layer; norms have neither.
        self.in_features = getattr(base_layer, "in_features", None)
        self.out_features = getattr(base_layer, "out_features", None)
        self._route = route
        self._unmerged: dict[str, Tensor] = {}
        # For each parameter the layers whose modules share it, and its role there.
        self._tied: dict[str, list[tuple[ReplacementLayer, str]]] = {}
        self._cache: CachedCall | None = None

    # Implemented by subclasses.

    @abstractmethod
    def run(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run the wrapped module with these parameters in place of its own.

        Args:
            parameters: effective weight and bias, in the shapes of the module's own; unchanged ones are left out.
            *args: arguments of the module's forward.
            **kwargs: keyword arguments of the module's forward.

        Returns:
            The module's output.
        """

    def bind(self, parameters: dict[str, Tensor]) -> Callable[..., Tensor]:
        """Prepare `run` for these parameters.

        Args:
            parameters: effective weight and bias, in the shapes of the module's own; unchanged ones are left out.

        Returns:
            A function with the arguments of the module's forward; not for traced operations.
        """
        return partial(self.run, parameters)

    @abstractmethod
    def run_routed(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run each sample of the batch with the adapter that the route assigns to it."""

    # Deltas.

    def deltas(self, parameter: str) -> Any:
        """The `nn.ModuleDict` of deltas of the weight or the bias, by adapter; torch types its items loosely."""
        return self.lntune_weight if parameter == "weight" else self.lntune_bias

    def get_base_layer(self) -> nn.Module:
        # Like PEFT's method, but with dict reads: a failing `hasattr` on a module is too slow for a norm's call.
        base: Any = self._modules["base_layer"]
        while "base_layer" in base._modules:
            base = base._modules["base_layer"]
        return base

    def own_name(self, parameter: str) -> str:
        """The wrapped module's own name for its weight or bias."""
        return parameter

    def base_parameter(self, parameter: str) -> Tensor:
        # Read as an attribute, not from `_parameters`: sharding and outer layers put tensors in the `__dict__`.
        return getattr(self.get_base_layer(), self.own_name(parameter))

    def unmerged(self, parameter: str) -> Tensor:
        """The base parameter without adapters, whether or not some are merged into it now."""
        base = self.base_parameter(parameter)
        before = self._before_merging(parameter)
        return base if before is None else before.to(base.device, base.dtype)

    def _before_merging(self, parameter: str) -> Tensor | None:
        """The base parameter before merging here or in a layer that shares it; None where nothing is merged."""
        places = [(self, parameter), *self._tied.get(parameter, ())]
        return next((layer._unmerged[name] for layer, name in places if name in layer._unmerged), None)

    @property
    def weight(self) -> Tensor:
        """The weight with which this layer computes now, rounded to the dtype of the base.

        For code that computes with a layer's parameters instead of calling the layer: fused kernels, torch's fused
        encoder and attention. Gradients reach the deltas through it. While adapters are disabled or merged, it is the
        weight of the base.

        Raises:
            RoutingError: by any computation with it while each row of the batch has its own adapter; its shape, dtype
                and device can be read.
        """
        return self._read("weight")

    @property
    def bias(self) -> Tensor:
        """The bias with which this layer computes now, rounded to the dtype of the base.

        For code that computes with a layer's parameters instead of calling the layer: fused kernels, torch's fused
        encoder and attention. Gradients reach the deltas through it. While adapters are disabled or merged, it is the
        bias of the base.

        Raises:
            RoutingError: by any computation with it while each row of the batch has its own adapter; its shape, dtype
                and device can be read.
        """
        return self._read("bias")

    def _read(self, parameter: str) -> Tensor:
        base_layer = self.get_base_layer()
        if offload_hook(base_layer) is None:
            return self._read_loaded(parameter)
        try:
            with onloaded(base_layer):
                return self._read_loaded(parameter)
        finally:
            self._cache = None

    def _read_loaded(self, parameter: str) -> Tensor:
        base = self.base_parameter(parameter)
        if base is None:
            return base
        if self._differs(parameter):
            return RoutedParameter.like(base, f"the {parameter} of {self.label}")
        if self._disable_adapters:
            return self.unmerged(parameter)
        if self.merged_adapters:
            return base
        cached = self._cached(self.active_adapters)
        sums = self._sums(self._tuned(self.active_adapters)) if cached is None else cached.parameters
        return sums[parameter].to(base.dtype) if parameter in sums else base

    def _differs(self, parameter: str) -> bool:
        """Whether a parameter may differ per row now, by a route of this model or of a bank around it."""
        detour = self.get_base_layer().__dict__.get("forward")
        if isinstance(detour, Detour) and detour.active:
            return True
        if self._disable_adapters or not self._route.active:
            return False
        names = {name for container in self.adapter_layer_names for name in getattr(self, container)}
        return any(tuned == parameter for tuned, _ in self._tuned([*names]))

    # Parameters that other modules share.

    def tie(self, parameter: str, other: "ReplacementLayer", its: str) -> None:
        """Declare that this layer's module and another's share a parameter: one delta tunes both.

        Args:
            parameter: `"weight"` or `"bias"` of this layer's module.
            other: the layer around the other module.
            its: `"weight"` or `"bias"`, the role of the parameter in the other module.
        """
        for layer, name, to in ((self, parameter, (other, its)), (other, its, (self, parameter))):
            known = layer._tied.setdefault(name, [])
            if to not in known:
                known.append(to)

    def tied_to(self, parameter: str, adapter_name: str) -> list["ReplacementLayer"]:
        """The other layers in which an adapter tunes the same shared parameter.

        Args:
            parameter: `"weight"` or `"bias"`.
            adapter_name: the adapter.

        Returns:
            The layers, without this one.
        """
        return [other for other, its in self._tied.get(parameter, ()) if its in other.tunes(adapter_name)]

    def tunes(self, adapter_name: str) -> list[str]:
        """Which parameters an adapter tunes here, the weight first; a set would have another order in each run."""
        return [parameter for parameter, _ in self._tuned([adapter_name])]

    def names_of(self, parameter: str) -> list[str]:
        """The names of a parameter in the model: more than one where modules share it."""
        places = [(self, parameter), *self._tied.get(parameter, ())]
        return [f"{layer.label}.{layer.own_name(name)}" for layer, name in places]

    def put(self, parameter: str, adapter_name: str, delta: Delta | None) -> None:
        """Set or remove the delta of an adapter, here and in the layers that share the parameter and have one.

        Args:
            parameter: `"weight"` or `"bias"`.
            adapter_name: the adapter.
            delta: the delta; None: remove it.
        """
        others = [(o, its) for o, its in self._tied.get(parameter, ()) if adapter_name in o.deltas(its)]
        for layer, name in [(self, parameter), *others]:
            if delta is None:
                del layer.deltas(name)[adapter_name]
            else:
                layer.deltas(name)[adapter_name] = delta
            layer._forget()

    def trained(self, adapter_name: str) -> list[nn.Parameter]:
        """The trainable tensors of an adapter here: values of deltas, scores of masks."""
        tuned = [module for _, module in self._tuned([adapter_name])]
        return [module.weight for module in tuned if module.weight is not None]

    def to_base_dtype(self, adapter_name: str) -> None:
        """Cast an adapter to the dtype of the parameters it changes, on request of the user."""
        for parameter, module in self._tuned([adapter_name]):
            if module.weight is not None:
                module.weight.data = module.weight.data.to(self.base_parameter(parameter).dtype)
        self._forget()

    def update_layer(
        self,
        adapter_name: str,
        config: Any,
        counts: Mapping[str, int | None],
        blocks: Mapping[str, ParameterSlice] | None = None,
    ) -> None:
        """Add an adapter, with one zero delta per tuned parameter.

        Args:
            adapter_name: the new adapter.
            config: its config.
            counts: for each tuned parameter the number of entries that a mask chooses; None: all entries.
            blocks: for parameters that are tuned in part, that part.
        """
        for parameter, count in counts.items():
            base = self.base_parameter(parameter)
            dtype = delta_dtype(base.dtype, config.torch_delta_dtype)
            delta = Delta(base.shape, dtype, base.device, count, (blocks or {}).get(parameter))
            if not config.init_weights:
                nn.init.normal_(delta.weight, std=0.1)
            self.put(parameter, adapter_name, delta)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._forget()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_mask(self, parameter: str, adapter_name: str, mask: Tensor | None) -> None:
        """Tune only some entries of a parameter, keeping their values.

        Args:
            parameter: `"weight"` or `"bias"`.
            adapter_name: an adapter that tunes it.
            mask: bool, of the shape of the parameter, True for entries to tune. None or an empty mask removes the
                delta.
        """
        if adapter_name not in self.deltas(parameter):  # removed together with that of a layer that shares it
            return
        old = self.deltas(parameter)[adapter_name]
        if mask is not None and old.block is not None:
            mask = mask.to(old.weight.device) & old.tuned()
            if torch.equal(mask, old.tuned()):
                return
        delta = None
        if mask is not None and mask.any():
            delta = Delta.masked(mask, old.weight.dtype, old.weight.device)
            delta.fill(old.dense())
            delta.requires_grad_(old.weight.requires_grad)
        self.put(parameter, adapter_name, delta)

    def effective(self, parameter: str, adapters: Sequence[str]) -> Tensor:
        """The parameter under these adapters: the base plus their deltas.

        Args:
            parameter: `"weight"` or `"bias"`.
            adapters: their names; adapters without a delta here change nothing.

        Returns:
            A tensor of the shape of the parameter, in float32 or wider where a delta was added.
        """
        tuned = [found for found in self._tuned(adapters) if found[0] == parameter]
        with onloaded(self.get_base_layer()):
            return self._sums(tuned).get(parameter, self.base_parameter(parameter))

    def _tuned(self, adapters: Sequence[str]) -> list[tuple[str, Any]]:
        """Parameter and delta, for each delta of these adapters; with plain dict reads, since it runs in forward."""
        modules = self._modules
        weight, bias = modules["lntune_weight"]._modules, modules["lntune_bias"]._modules  # type: ignore[union-attr]
        tuned = [("weight", weight[name]) for name in adapters if name in weight]
        return tuned + [("bias", bias[name]) for name in adapters if name in bias]

    def _sums(self, tuned: list[tuple[str, Any]]) -> dict[str, Tensor]:
        """The effective parameters: base plus each delta."""
        base = self.get_base_layer()
        sums: dict[str, Tensor] = {}
        for parameter, delta in tuned:
            sums[parameter] = delta(sums[parameter] if parameter in sums else getattr(base, self.own_name(parameter)))
        return sums

    def _call(self, adapters: Sequence[str]) -> Callable[..., Tensor] | None:
        """The function to call in place of the wrapped module; None where these adapters have no delta here."""
        cached = self._cached(adapters)
        if cached is not None:
            return cached.call
        sums = self._sums(self._tuned(adapters))
        return None if not sums else partial(self.run, sums) if is_traced() else self.bind(sums)

    def _cached(self, adapters: Sequence[str]) -> CachedCall | None:
        """The call under these adapters, where it may be cached because its sources are frozen.

        So an adapter that was loaded for inference adds no operation to a forward pass.
        """
        cache = self._cache
        if is_traced():
            if cache is not None and not torch.compiler.is_exporting():
                self._cache = None  # a compiled step may train its sources
            return None
        if cache is not None and cache.adapters == adapters and is_valid(*cache.sources):
            return cache
        tuned = self._tuned(adapters)
        sources = self._sources(tuned)
        if sources is None:
            if cache is not None:
                self._cache = None
            if torch.is_grad_enabled() and not self._route.active:
                self._route.drop()  # the stacks for mixed batches came from the same deltas
            return None
        with torch.inference_mode(False), torch.no_grad():  # the cached tensors may be needed in a graph later
            sums = self._sums(tuned)
            wrapped = self.base_layer, self.get_base_layer()
            self._cache = CachedCall(list(adapters), sources, sums, self.bind(sums) if sums else None, wrapped)
        return self._cache

    def _sources(self, tuned: list[tuple[str, Any]]) -> tuple[TensorState, ...] | None:
        """States of the tensors behind the effective parameters; None where one of them may be trained."""
        trained = [module.weight for _, module in tuned if module.weight is not None and module.weight.requires_grad]
        if trained:
            for weight in trained:
                unwatch(weight)
            return None
        base = self.get_base_layer()
        sources = [state_of(base, self.own_name(parameter)) for parameter, _ in tuned]
        sources += [state for _, module in tuned for state in states_of(module)]
        return None if any(state.tensor is None for state in sources) else tuple(sources)

    def __getstate__(self) -> dict[str, Any]:
        # A copy builds its own cache: this one refers to this layer's tensors.
        return {**self.__dict__, "_cache": None}

    def _forget(self) -> None:
        self._cache = None
        self._route.drop()

    # The state machine.

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        cache = self._cache
        if (  # the usual call of a frozen adapter, with as few checks as possible
            cache is not None
            and not is_traced()
            and cache.adapters == self._active_adapter
            and not (self._disable_adapters or self.merged_adapters or "adapter_names" in kwargs)
            and is_valid(*cache.sources)
            and not self._route.held()
            and cache.call is not None
            and cache.wrapped[0] is self._modules["base_layer"]  # attributes of a module are slow to read
            and "_hf_hook" not in cache.wrapped[1].__dict__
        ):
            return cache.call(*args, **kwargs)
        kwargs.pop("adapter_names", None)  # hooks of other tuners pass it on; here the route has the names
        base = self.get_base_layer()
        if offload_hook(base) is None:
            return self._forward(*args, **kwargs)
        if self.training and torch.is_grad_enabled():
            check_trainable(self.label, (delta for _, delta in self._tuned(self.active_adapters)))
        try:
            return call_onloaded(base, self._forward, args, kwargs)
        finally:
            self._cache = None  # it refers to parameters that are offloaded again

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.merged_adapters:
            return self.base_layer(*args, **kwargs)
        if self._route.on():
            return self.run_routed(*args, **kwargs)
        call = self._call(self.active_adapters) or self.base_layer
        return call(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective parameters, rounded to the base dtype, into the base module.

        Args:
            safe_merge: raise before anything is written where a merged value is NaN or infinite.
            adapter_names: the adapters to merge; None: the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite; nothing was merged in this layer.
            UnsupportedError: the module computes a parameter in each call, and would not keep the merged one.
        """
        added = [name for name in check_adapters_to_merge(self, adapter_names) if self._tuned([name])]
        if not added:
            return
        with onloaded(self.get_base_layer(), keep=True):
            self._check_kept(added)
            merged = self._merged([*self.merged_adapters, *added])
            if safe_merge:
                self._check_finite(merged, added)
            for parameter, value in merged.items():
                base = self.base_parameter(parameter)
                # A copy, because subtracting the delta again would not restore the values in bfloat16.
                before = self._before_merging(parameter)
                self._unmerged[parameter] = base.detach().clone() if before is None else before
                base.data = value
        self.merged_adapters.extend(added)
        self._forget()

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Check that merged values would be finite, without merging.

        Args:
            adapter_names: the adapters to check; None: the active ones.

        Raises:
            ValueError: a merged value would be NaN or infinite.
        """
        added = self.added(adapter_names)
        with onloaded(self.get_base_layer()):
            self._check_kept(added)
            self._check_finite(self._merged([*self.merged_adapters, *added]), added)

    def added(self, adapter_names: Sequence[str] | None = None) -> list[str]:
        """The adapters that `merge` would merge here.

        Args:
            adapter_names: the adapters to choose from; None: the active ones.

        Returns:
            The adapters with a delta here that are not merged yet.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if name not in self.merged_adapters and self._tuned([name])]

    def unmerge(self) -> None:
        """Restore the base parameters bit for bit, after unmerging the layers of other tuners inside."""
        if not self.merged:
            return
        inner: Any = self.base_layer
        while isinstance(inner, BaseTunerLayer):
            if inner.merged:
                inner.unmerge()
            inner = inner.base_layer
        with onloaded(self.get_base_layer(), keep=True):
            for parameter in self._unmerged:
                self.base_parameter(parameter).data = self.unmerged(parameter)
        self._unmerged = {}
        self.merged_adapters = []
        self._forget()

    def _check_kept(self, adapters: Sequence[str]) -> None:
        for parameter, _ in self._tuned(adapters):
            check_not_computed(self.get_base_layer(), self.own_name(parameter), self.label)

    def _check_finite(self, merged: dict[str, Tensor], added: list[str]) -> None:
        for parameter, value in merged.items():
            if not value.isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(added)} seems to be broken: the "
                    f"{parameter} of {self.label} would not be finite. Nothing was merged here."
                )

    @torch.no_grad()
    def _merged(self, adapters: Sequence[str]) -> dict[str, Tensor]:
        """The merged parameters: summed in the wide dtype from the unmerged ones, then rounded once."""
        sums: dict[str, Tensor] = {}
        for parameter, delta in self._tuned(adapters):
            sums[parameter] = delta.merged_value(sums[parameter] if parameter in sums else self.unmerged(parameter))
        return {parameter: value.to(self.base_parameter(parameter).dtype) for parameter, value in sums.items()}

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._forget()

    # Methods of torch and PEFT after which the cache is dropped.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See `peft.tuners.tuners_utils.BaseTunerLayer.set_adapter`; caches are dropped.

        Args:
            adapter_names: the adapters to make active.
            inference_mode: whether they stay frozen.
        """
        super().set_adapter(adapter_names, inference_mode)
        self._forget()  # other tensors may be trained from here on

    def train(self, mode: bool = True) -> "ReplacementLayer":
        self._forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "ReplacementLayer":
        self._forget()
        return super()._apply(*args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own method also casts to the dtype of the base, which a delta must not have.
        for parameter in PARAMETERS:
            deltas = self.deltas(parameter)
            if adapter_name in deltas and not deltas[adapter_name].weight.is_meta:
                deltas[adapter_name].to(device or self.base_parameter(parameter).device)

    def __getattr__(self, name: str) -> Any:
        """Read missing attributes from the wrapped module: other libraries read `eps`, `normalized_shape`, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in ("base_layer", "weight", "bias"):
                raise
        return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "lntune." + super().__repr__()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
