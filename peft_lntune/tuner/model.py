"""The tuner: it injects layers by a plan, and manages adapters. What a layer does is in `layers/`."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, cast_adapter_dtype
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from peft_lntune.config import BottleneckConfig, LNTuneConfig, LNTuningConfig, UnifiedConfig, parts_of, record_mask
from peft_lntune.config.deltas import recorded
from peft_lntune.core.detour import Detour, patched
from peft_lntune.errors import ConfigError, RoutingError, UnsupportedError
from peft_lntune.layers import PARAMETERS, InsertedLayer, NormLayer, ReplacementLayer
from peft_lntune.layers.held import deltas_of, supermasks_of
from peft_lntune.layers.offloaded import all_onloaded, stored_tensors
from peft_lntune.layers.padded import stop_keeping_padded
from peft_lntune.planning.claims import model_type_of
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.methods import Injection, Spot, WeightedSum, method_of
from peft_lntune.routing.entries import CONTINUOUS, Entries
from peft_lntune.routing.route import BASE, Route
from peft_lntune.routing.stacks import rows_of_layers
from peft_lntune.selection.masks import check_masks
from peft_lntune.storage.adapter_file import cast_values, dropped_tensors
from peft_lntune.storage.keys import of_adapter, without_adapter_name
from peft_lntune.storage.manifest import check_tensors, manifest_of
from peft_lntune.storage.packing import pack
from peft_lntune.tuner.combine import combined_config
from peft_lntune.tuner.continuous import call_continuous
from peft_lntune.tuner.heads import copy_heads, routed_heads
from peft_lntune.tuner.inject import injecting, is_target, prepare, route_of
from peft_lntune.tuner.lora import routed_lora
from peft_lntune.tuner.merge import everywhere, merge_layers, take_out_layers, unmerge_layers
from peft_lntune.tuner.state_dict import as_in_model, check_fit, held_tensors, own_tensors, under_all_names

__all__ = ["LNTuneModel"]


class LNTuneModel(BaseTuner):
    """The one tuner of this package. `get_peft_model` makes it as `peft_model.base_model`."""

    prefix = "lntune_"
    tuner_layer_cls = (ReplacementLayer, InsertedLayer, LoraLayer)
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name; norms are found, not listed
    _warned_of: frozenset[str] = frozenset()
    _looked_for_statistics = False
    _told_missed: frozenset[str] = frozenset()
    _merging = False  # whether `merge_adapter` was called since the last `unmerge_adapter`
    _told_merged: frozenset[object] = frozenset()
    _injection: Injection | None = None  # set during injection, because PEFT's loop over modules cannot pass it on

    # Called by PEFT's injection.

    def _prepare_adapter_config(self, peft_config: LNTuneConfig, model_config: dict) -> LNTuneConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: LNTuneConfig, key: str) -> Any:
        if self._injection is not None:
            return is_target(self._injection, peft_config, key)
        # PEFT's `inspect_matched_modules` calls this after injection.
        names = [name for name, config in self.peft_config.items() if config is peft_config]
        deltas = [place.rpartition(".")[0] for name in names for place in deltas_of(self.model, name)]
        return key in deltas or any(key in supermasks_of(self.model, name) for name in names)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        assert self._injection is not None
        spot = Spot(target, target_name, parent, current_key)
        self._injection.method.put(self, self._injection, peft_config, adapter_name, spot)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter, with all its parts, into the model.

        Args:
            model: the base model.
            adapter_name: the adapter, whose config is in `self.peft_config`.
            *args: further arguments of PEFT's `inject_adapter`.
            **kwargs: further arguments of PEFT's `inject_adapter`.

        Raises:
            ConfigError: the name is not allowed, or the config cannot be injected.
            NoMatchError: a part selects nothing.
            UnsupportedError: a part selects a module that its method does not work on, or this model cannot take
                adapters.
            AdapterFileError: the config was saved with another model, or asks for more than its file holds.
        """
        if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
            raise ConfigError(
                f"an adapter cannot be named {adapter_name!r}: the name is a key of a torch.nn.ModuleDict, which takes "
                "no empty name, no dot and no name of its own attributes. Choose another name."
            )
        if adapter_name == BASE:
            raise ConfigError(
                f"an adapter cannot be named {BASE!r}: in adapter_names, that is the model without an adapter. Choose "
                "another name."
            )
        config = self.peft_config[adapter_name]
        stored = "stored" in config.__dict__
        parts = self._inject(model, adapter_name, *args, **kwargs)
        if isinstance(config, UnifiedConfig):
            given = zip(config.parts or (), parts, strict=True)
            # In place, because PeftModel keeps this config.
            config.parts = [method_of(part).recorded(mine, part) for mine, part in given]
            if not stored:
                _warn_of_combination(config)

    def _inject(
        self, model: nn.Module, adapter_name: str, *args: Any, unmasked: bool = False, **kwargs: Any
    ) -> list[PeftConfig]:
        """Put the parts of an adapter into the model, `unmasked` only those that have masks; returns all its parts."""
        config = self.peft_config[adapter_name]
        prepared = prepare(self.peft_config, adapter_name, model, unmasked=unmasked, told=self._told_missed)
        self._told_missed |= {name for _, injection in prepared for name in injection.plan.missed}
        try:
            for part, injection in prepared:
                if unmasked and not injection.method.has_masks:
                    continue
                # PEFT reads the config to inject from here.
                self.peft_config[adapter_name] = part
                with injecting(self, injection):
                    injection.method.inject(self, model, adapter_name, *args, **kwargs)
        finally:
            self.peft_config[adapter_name] = config
        return [part for part, _ in prepared]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self._layers(LoraLayer):
            cast_adapter_dtype(layer, adapter_name, autocast_adapter_dtype)
        # Ours are made in float32. Without autocast they take the dtype of the base, as PEFT's adapters do.
        config = self.peft_config[adapter_name]
        asked = [p for p in parts_of(config) if isinstance(p, LNTuneConfig) and p.delta_dtype is not None]
        if autocast_adapter_dtype or asked:
            return
        for layer in self._layers((ReplacementLayer, InsertedLayer)):
            layer.to_base_dtype(adapter_name)
        halves = {tensor.dtype for layer in self.tuner_layers() for tensor in layer.trained(adapter_name)}
        halves = {dtype for dtype in halves if dtype.itemsize < torch.float32.itemsize}
        if halves:
            dtype = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
            warnings.warn(
                f"autocast_adapter_dtype=False keeps what adapter {adapter_name!r} trains in {dtype}, the dtype of the "
                "base, where small steps are lost to rounding. Some trainers pass it by themselves. To train in "
                'float32, set delta_dtype="float32" in the config, which wins.',
                stacklevel=2,
            )

    # Merging: every layer is checked before the first is changed.

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, unmergeable: str = "refuse"
    ) -> None:
        """Add the deltas of adapters, and their LoRA, to the base parameters.

        Args:
            adapter_names: the adapters to merge; None for the active ones.
            safe_merge: raise, before anything is written, if a merged value would not be finite.
            unmergeable: what to do about bottlenecks and prefixes, which cannot be merged: `"refuse"`, or `"keep"` them
                active beside the merged parameters, so that the output stays the same.

        Raises:
            ConfigError: `unmergeable` has another value.
            UnsupportedError: an adapter has a part that cannot be merged, and it should not be kept; LoRA would be
                merged behind an active supermask; or a tuned parameter is tied to one that is not tuned.
            ValueError: a merged value is not finite.
        """
        if unmergeable not in ("refuse", "keep"):
            raise ConfigError(f"unmergeable={unmergeable!r} is not allowed; choose one of 'refuse', 'keep'.")
        if unmergeable == "refuse":
            self._check_mergeable(adapter_names, 'merge_adapter(unmergeable="keep") merges the rest')
        if safe_merge:
            self._check_merge(adapter_names)
        self._check_merge_allowed()
        merge_layers(self.model, adapter_names, safe_merge)
        self._merging = True

    def unmerge_adapter(self) -> None:
        """Restore the base parameters, bit for bit. Only LoRA merged by itself is subtracted, with rounding."""
        unmerge_layers(self.model)
        self._merging = False

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names, "unload() takes the adapter off")
            if safe_merge:
                self._check_merge(adapter_names)
        besides = [
            (name.rpartition(".")[0], m) for name, m in self.model.named_modules() if isinstance(m, InsertedLayer)
        ]
        with everywhere(self.model):
            take_out_layers(self.model, merge, safe_merge, adapter_names)
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for host, beside in besides:
            beside.detach(model.get_submodule(host))
        stop_keeping_padded(model)
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ModulesToSaveWrapper):
            # PEFT's would read the weight of what is taken out, and a block such as a pooler has none (peft#3114).
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_mergeable(self, adapter_names: list[str] | None, instead: str) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        for layer in self._layers(InsertedLayer):
            found = [name for name in names if layer.holds(name)]
            if found:
                what = type(layer).__name__.removesuffix("Layer").lower()
                raise UnsupportedError(
                    f"adapter {found[0]!r} has a {what} at {layer.label}, which adds to the graph, so it cannot be "
                    f"merged into a base parameter. {instead}."
                )

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        for layer in self.tuner_layers():
            with all_onloaded(layer):
                layer.check_merge(adapter_names)

    # Storage.

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        # In place: PEFT takes the heads in modules_to_save from the same state dict afterwards.
        kwargs["state_dict"].update(dropped_tensors(model, adapter_name, kwargs["unwanted_adapter_names"]))
        trained = {name: value for name, value in kwargs["state_dict"].items() if of_adapter(name, adapter_name)}
        kwargs["state_dict"].update(stored_tensors(model, trained))
        # Not PEFT's search, which finds nothing in modules that FSDP has wrapped, without an error.
        tensors = held_tensors(model, adapter_name, kwargs["state_dict"])
        stored = {cls._remove_adapter_name_from_key(key, adapter_name): value for key, value in tensors.items()}
        for part in parts_of(config):
            stored = method_of(part).to_file(stored, part)
        stored = cast_values(stored, config.torch_save_dtype)
        # A sharded or empty state dict is not what the file will hold, so it gets no manifest.
        whole = bool(stored) and not any(value.is_meta for value in stored.values())
        norms = config.deltas
        partial = norms is not None and norms.mask_source is not None
        config.manifest = manifest_of(stored, partial=partial) if whole else None
        if config.manifest is not None:
            if "tuned" in config.manifest:
                config.manifest["selected"] = config.__dict__["selected"]
            if (model_type := model_type_of(model)) is not None:
                config.manifest["model_type"] = model_type
        return pack(stored) if whole else stored

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_tensors(None, state_dict, f"the weights for adapter {adapter_name!r}")
        tensors: Mapping[str, Tensor] = state_dict
        for part in parts_of(config):
            tensors = method_of(part).from_file(model, adapter_name, tensors)
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        own = own_tensors(model, adapter_name)
        check_fit(own, adapter_name, renamed)
        return under_all_names(model, as_in_model(own, renamed))

    # Adapters.

    def tuner_layers(self) -> Iterator[ReplacementLayer]:
        """Iterate over the layers that replace modules. Not called `layers`, because many models have that attribute.

        Returns:
            The layers, each once.
        """
        return self._layers(ReplacementLayer)

    def _layers(self, kind: Any) -> Iterator[Any]:
        return (module for module in self.model.modules() if isinstance(module, kind))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, the other active adapters stay active, or else the first one left.

        Args:
            adapter_name: the adapter.

        Raises:
            ValueError: there is no such adapter.
        """
        before = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        if adapter_name not in before:
            return
        # Each layer has chosen among its own adapters; make one choice for the model.
        after = [name for name in before if name != adapter_name] or list(self.peft_config)[:1]
        if after:
            self.set_adapter(after)

    def set_masks(
        self, masks: Mapping[str, Tensor], adapter_name: str = "default", source: Mapping[str, Any] | None = None
    ) -> None:
        """Tune only chosen entries. The deltas become new parameters, so make the optimizer afterwards.

        Use this for masks made by hand, or from other tasks with `combine_masks`. `fit_fisher_masks` makes masks from
        data. Values of entries that stay tuned are kept.

        Args:
            masks: for each tuned base parameter, by its name in the base model, a bool tensor of its shape, True for
                tuned entries. Parameters that are not named, or have no True entry, are no longer tuned.
            adapter_name: the adapter.
            source: how the masks were made, in words and numbers, such as `{"made": "union", "of": ["sst2", "trec"]}`.
                The config keeps it as `mask_source`. None: by hand.

        Raises:
            ConfigError: a name or shape does not fit this adapter, it has no deltas, nothing is chosen, or JSON cannot
                hold `source`. Nothing has changed.

        Example:
            >>> from peft import get_peft_model
            >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), LNTuningConfig())
            >>> model.set_masks({"1.weight": torch.tensor([True, False])})
            >>> [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
            [(1,)]
        """
        self._check_deltas(adapter_name)
        places = self._places(adapter_name)
        shapes = {name: layer.base_parameter(parameter).shape for name, (layer, parameter) in places.items()}
        check_masks(masks, shapes, f"adapter {adapter_name!r}")
        for layer, parameter in places.values():
            first, *others = [name for name in layer.names_of(parameter) if name in masks] or [""]
            if any(not torch.equal(masks[first], masks[other].to(masks[first].device)) for other in others):
                raise ConfigError(f"{first} and {others[0]} are one parameter, and their masks differ. Give one mask.")
        source = recorded({"made": "by hand"} if source is None else source)
        for layer, parameter in places.values():
            given = [masks[name] for name in layer.names_of(parameter) if name in masks]  # tied ones may go by either
            layer.set_mask(parameter, adapter_name, given[0] if given else None)
        record_mask(self.peft_config, adapter_name, source)

    def clear_masks(self, adapter_name: str = "default") -> None:
        """Tune every entry that the config selects, as before `set_masks`. Make the optimizer afterwards.

        Values of entries that were tuned are kept, the others start from zero. Parts other than deltas stay as they
        are.

        Args:
            adapter_name: the adapter.

        Raises:
            ConfigError: there is no such adapter, or it has no deltas.
        """
        self._check_deltas(adapter_name)
        old = {(layer, p): layer.deltas(p)[adapter_name] for layer, p in self._places(adapter_name).values()}
        own_dtype = all(delta.weight.dtype == layer.base_parameter(p).dtype for (layer, p), delta in old.items())
        self._inject(self.model, adapter_name, unmasked=True)
        record_mask(self.peft_config, adapter_name, None)
        for layer in self.tuner_layers() if own_dtype else ():
            layer.to_base_dtype(adapter_name)
        for layer, parameter in self._places(adapter_name).values():
            delta = layer.deltas(parameter)[adapter_name]
            before = old.get((layer, parameter))
            delta.fill(torch.zeros_like(delta.weight) if before is None else before.dense())

    def _check_deltas(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ConfigError(f"adapter {adapter_name!r} not found; this model has {list(self.peft_config)}.")
        config = self.peft_config[adapter_name]
        if config.deltas is None:
            kinds = ", ".join(type(part).__name__ for part in parts_of(config))
            raise ConfigError(
                f"adapter {adapter_name!r} has {kinds}, and no deltas; masks choose entries of deltas. Use an adapter "
                "with LNTuningConfig, FisherLNConfig or ModuleTuningConfig."
            )

    def _places(self, adapter_name: str) -> dict[str, tuple[ReplacementLayer, str]]:
        """Layer and parameter of each delta of an adapter, by the name of the base parameter."""
        return {
            f"{layer.label}.{layer.own_name(parameter)}": (layer, parameter)
            for layer in self.tuner_layers()
            for parameter in PARAMETERS
            if adapter_name in layer.deltas(parameter)
        }

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a weighted combination of others.

        A linear combination is exact: deltas are summed, and bottlenecks and LoRA are concatenated. Prefixes cannot be
        combined.

        Args:
            adapters: names of adapters of this model.
            weights: one weight per adapter; may be negative.
            adapter_name: name of the new adapter.
            combination_type: `"linear"`, or one of PEFT's sparse combinations: `"ties"`, `"dare_linear"`,
                `"dare_ties"`, `"magnitude_prune"`.
            density: fraction of entries that the sparse combinations keep, above 0 and at most 1.
            majority_sign_method: `"total"` or `"frequency"`, for the ties combinations.

        Raises:
            ConfigError: an adapter or the combination is unknown, the number of weights differs from the number of
                adapters, the density is missing, the name is taken, or two adapters save the same module.
            UnsupportedError: the adapters have prefixes, supermasks, DoRA, or bottlenecks that differ in position or
                activation. Nothing has changed.
        """
        self._check_weighted(adapters, weights, adapter_name)
        sources = {name: self.peft_config[name] for name in adapters}
        wanted = WeightedSum(adapters, weights, combination_type, density, majority_sign_method)
        config = combined_config(ModelFacts(self.model), sources, wanted)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        methods = {method_of(part): None for part in parts_of(config)}
        narrowed = [method.sum_into(self.model, wanted, adapter_name) for method in methods]
        if any(narrowed):
            of = {name: source.deltas.mask_source for name, source in sources.items() if source.deltas is not None}
            made = {"made": "combination", "combination_type": combination_type, "of": of}
            record_mask(self.peft_config, adapter_name, made)
        for donor in sources:
            copy_heads(self.model, donor, adapter_name)

    def _check_weighted(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        if adapter_name in self.peft_config:
            raise ConfigError(f"an adapter named {adapter_name!r} exists. Delete it first, or choose another name.")
        if isinstance(adapters, str):
            raise ConfigError(f"adapters should be a list of names, such as [{adapters!r}], but is {adapters!r}.")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ConfigError(f"adapters {unknown or adapters} not found; this model has {list(self.peft_config)}.")
        if len(weights) != len(adapters):
            raise ConfigError(
                f"expected one weight per adapter, got {len(weights)} weights for {len(adapters)} adapters."
            )
        infinite = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if not math.isfinite(weight)]
        if infinite:
            raise ConfigError(
                f"the weight of adapter {infinite[0][0]!r} should be a finite number, but is {infinite[0][1]}: every "
                "entry of the sum would be NaN or infinite."
            )

    # Every forward pass of a PeftModel: training, mixed batches.

    def warn_of_missing_masks(self, names: Sequence[str]) -> None:
        """Warn, once per adapter, if its masks were not fitted, so that it trains more than intended.

        Args:
            names: names of the adapters about to be trained.
        """
        for name in names:
            config = self.peft_config[name].deltas if name in self.peft_config else None
            fits = config is not None and config.chooses_entries and config.mask_source is None
            if fits and name not in self._warned_of:
                self._warned_of |= {name}
                warnings.warn(
                    f"adapter {name!r} has a FisherLNConfig, but no mask was fitted, so all its entries are trained. "
                    f"Call fit_fisher_masks(peft_model, batches, {name!r}) or set_masks before making the optimizer.",
                    stacklevel=3,
                )

    def _warn_of_merged(self) -> None:
        """Warn, once per state, about active adapters that have no effect, or are not trained, as layers are merged."""
        layers = [layer for layer in self.tuner_layers() if layer.merged_adapters and not layer.disable_adapters]
        merged = list(dict.fromkeys(name for layer in layers for name in layer.merged_adapters))
        active = [name for name in self.active_adapters if any(layer.tunes(name) for layer in layers)]
        idle = [name for name in active if name not in merged]
        trains = self.training and torch.is_grad_enabled()
        state = tuple(merged), tuple(idle), trains
        if not merged or not (idle or trains) or state in self._told_merged:
            return
        self._told_merged |= {state}
        effect = f"adapter {idle[0]!r} is active and has no effect there" if idle else "training does not change it"
        warnings.warn(
            f"adapter {merged[0]!r} is merged, and merged layers compute with their merged parameters alone, so "
            f"{effect}. Call unmerge_adapter() first.",
            stacklevel=3,
        )

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return partial(call_continuous, self, name, found) if name in CONTINUOUS else found

    def _warn_of_statistics(self) -> None:
        """Warn, once, if training moves running statistics, which no adapter holds."""
        if self._looked_for_statistics:
            return
        self._looked_for_statistics = True
        moving = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, _NormBase)
            and module.training
            and module.running_mean is not None
            # A head in modules_to_save is trained and saved as a copy, statistics and all.
            and not {"modules_to_save", "original_module"} & set(name.split("."))
        ]
        if moving:
            warnings.warn(
                f"{len(moving)} modules such as {moving[0]} ({type(self.model.get_submodule(moving[0])).__name__}) "
                "keep running statistics, which change in training although their parameters are frozen. A saved "
                "adapter does not hold them, so it would give other outputs in a fresh model. Call .eval() on these "
                "modules after model.train(), or name them in modules_to_save.",
                stacklevel=3,
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            if self._merging and not torch.compiler.is_compiling():
                self._warn_of_merged()
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                # Rows kept from earlier may be out of date once tensors were trained and fixed again.
                route_of(self.model).drop()
                if self.training:
                    self.warn_of_missing_masks(self.active_adapters)
                    self._warn_of_statistics()
            yield
            return
        self._check_route(names)
        layers = [layer for layer in self.tuner_layers() if isinstance(layer, NormLayer)]
        tensors = [tensor for layer in layers for tensor in layer.entries()]
        route = route_of(self.model)
        route.check_idle()
        rows = rows_of_layers([names] if isinstance(names, str) else names, tensors, route.kept)
        with ExitStack() as stack:
            stack.enter_context(route.serving(names, rows, order=(BASE, *self.peft_config)))
            heads = stack.enter_context(routed_heads(self.model, route))
            stack.enter_context(routed_lora(self.model, route))
            if not torch.compiler.is_compiling():
                stack.enter_context(self._entries(route, heads))
            yield

    @contextmanager
    def _entries(self, route: Route, heads: Mapping[str, nn.Module]) -> Iterator[None]:
        """Check calls of the model and of its parts before they run, inside this context."""
        modules = dict(self.model.named_modules())
        kinds = (*self.tuner_layer_cls, ModulesToSaveWrapper)
        places = {name: module for name, module in modules.items() if isinstance(module, kinds)}

        def watched() -> dict[str, nn.Module]:
            """Bottlenecks and prefixes carry the name of the module beside them, which calls them."""
            labels = {getattr(module, "label", name): module for name, module in places.items()}
            return {**{label: modules.get(label) or module for label, module in labels.items()}, **heads}

        with patched(Entries(self.model, route, watched, route.known).detours(modules, places)):
            yield

    def _check_route(self, names: Sequence[str] | str) -> None:
        if self.training:
            raise RoutingError("Cannot pass `adapter_names` when the model is in training mode.")
        forwards = (layer.get_base_layer().__dict__.get("forward") for layer in self.tuner_layers())
        if any(isinstance(forward, Detour) and forward.active for forward in forwards):
            raise RoutingError(
                "Cannot pass `adapter_names` inside the route of an AdapterBank or of ManyTasks, which gives each row "
                "its adapter. Leave `adapter_names` out, or leave the route."
            )
        if any(layer.merged for layer in self._layers(self.tuner_layer_cls)):
            raise RoutingError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        known = list(self.peft_config)
        unknown = {names} if isinstance(names, str) else set(names)
        unknown -= {BASE, *known}
        if unknown:
            raise RoutingError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. "
                f"Known adapters: {', '.join([*known, BASE])}."
            )


def _warn_of_combination(config: UnifiedConfig) -> None:
    """Warn about a combination that a paper found to be worse."""
    ffn = any(isinstance(part, BottleneckConfig) and part.roles == ["ffn"] for part in config.parts or ())
    if ffn and any(isinstance(part, LNTuningConfig) for part in config.parts or ()):
        warnings.warn(
            "an adapter at the FFN together with LN-tuning: Qi et al. 2022 (arXiv 2211.08682) found it worse than the "
            'adapter alone, and one at the attention together with LN-tuning better (preset="mha-adapter+ln").',
            stacklevel=2,
        )
