"""A refused adapter leaves the model unchanged, whichever loader is used.

PEFT injects an adapter before it reads the weights, so a bad file would leave a half-loaded adapter behind, and
transformers' own loader only reports keys that do not fit. The loaders are wrapped: the files are checked first, and if
loading still fails, the model is restored.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from peft import AutoPeftModel, PeftConfig, PeftMixedModel, PeftModel
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers import AutoConfig
from transformers.integrations.peft import PeftAdapterMixin

from peft_lntune.config import LNTuneConfig, StoredConfig, record_mask
from peft_lntune.core.delta import delta_dtype
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import AdapterFileError, UnsupportedError
from peft_lntune.layers.offloaded import is_offloaded
from peft_lntune.planning.claims import check_architecture
from peft_lntune.plugin.wrapping import wrap_once
from peft_lntune.storage.adapter_file import PEFT_TYPE, cast_values
from peft_lntune.storage.keys import has_lora, is_ours, of_adapter, with_lora_name
from peft_lntune.storage.manifest import check_tensors
from peft_lntune.storage.packing import KEEP, SCORES, is_packed
from peft_lntune.storage.renaming import renaming
from peft_lntune.storage.saved_adapter import SavedAdapter, hub_options, read_config
from peft_lntune.tuner.model import LNTuneModel
from peft_lntune.tuner.replacement import check_replacement
from peft_lntune.tuner.restoring import configs_of, restored_on_error, told_by_us
from peft_lntune.tuner.state_dict import further_names, scores_by, unpack_by

__all__ = ["guard_loading"]

HEADS_SINCE = 5, 18
"""The first version of transformers whose own `load_adapter` loads heads (`modules_to_save`)."""


def guard_loading() -> None:
    """Wrap the loaders of PEFT and transformers. Calling it again changes nothing.

    Raises:
        AttributeError: one of the loaders no longer exists. Nothing has changed.
    """
    wrap_once(
        [
            (PeftConfig.__mro__[1], "from_json_file", _guarded_json),
            (PeftModel, "load_adapter", _guarded_load),
            (PeftModel, "from_pretrained", _guarded_from_pretrained),
            (PeftMixedModel, "from_pretrained", _guarded_from_pretrained),
            (AutoPeftModel.__mro__[1], "from_pretrained", _guarded_auto),
            (PeftAdapterMixin, "load_adapter", _guarded_native),
        ]
    )


def _guarded_json(original: Callable[..., Any]) -> Callable[..., Any]:
    """Every loader reads configs with this method, before it knows their type."""

    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> Any:
        config = read_config(path_json_file)
        return config if config.get("peft_type") == PEFT_TYPE else original(cls, path_json_file, **kwargs)

    return from_json_file


def _guarded_load(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        saved = None
        mapping = signature.bind(self, model_id, adapter_name, *args, **kwargs).arguments.get("key_mapping")
        with restored_on_error(self, adapter_name), _loading(self, model_id, kwargs, mapping):
            if isinstance(self.peft_config.get(adapter_name), LNTuneConfig):
                saved = _check_files(model_id, kwargs)  # PEFT does not read the config of an adapter that it has
                if saved is not None:
                    check_replacement(self, adapter_name, saved, str(model_id))
            with _dispatched_as_it_is(self, model_id, kwargs):
                loaded = original(self, model_id, adapter_name, *args, **kwargs)
        norms = saved.deltas if saved is not None else None
        if norms is not None:
            record_mask(self.peft_config, adapter_name, norms.mask_source)
        return loaded

    return load_adapter


def _guarded_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def from_pretrained(cls: type, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(cls, model, model_id, *args, **kwargs).arguments
        config, mapping = given.get("config"), given.get("key_mapping")
        if mapping is None:  # as PEFT does it
            mapping = getattr(model, "_checkpoint_conversion_mapping", None) or None
        with restored_on_error(model, config=config), _loading(model, model_id, kwargs, mapping):
            if isinstance(config, LNTuneConfig):  # given by the caller, so its files are not checked yet
                config.take_sizes(_check_files(model_id, kwargs) or config)
            with _dispatched_as_it_is(model, model_id, kwargs):
                return original(cls, model, model_id, *args, **kwargs)

    return from_pretrained


def _guarded_auto(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: type, path: Any, *args: Any, **kwargs: Any) -> Any:
        # Check the adapter before the weights of its model are read. Errors in the model's own files pass unchanged.
        with told_by_us(path, lambda: SavedAdapter(path, kwargs).seems_ours):
            if SavedAdapter(path, kwargs).seems_ours:
                config = StoredConfig.from_pretrained(str(path), **hub_options(kwargs))
                check_architecture(config, _base_config(config, kwargs), str(path))
        return original(cls, path, *args, **kwargs)

    return from_pretrained


def _base_config(config: LNTuneConfig, kwargs: Mapping[str, Any]) -> Any:
    """The config of the model that an adapter names; None if it cannot be loaded."""
    try:
        hub = {name: value for name, value in hub_options(kwargs).items() if name not in ("subfolder", "revision")}
        return AutoConfig.from_pretrained(config.base_model_name_or_path, revision=config.revision or "main", **hub)
    except Exception:
        return None  # loading the model then reports it


def _guarded_native(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(self, peft_model_id, *args, **kwargs)
        given = bound.arguments
        name = given.get("adapter_name") or "default"
        source = given.get("load_config")
        model_id = peft_model_id or getattr(source, "pretrained_model_name_or_path", None)
        places = [
            getattr(source, "download_kwargs", None),
            given.get("kwargs", {}).get("download_kwargs"),
            given.get("adapter_kwargs"),
        ]
        hub = {name: value for place in places for name, value in (place or {}).items()}
        with restored_on_error(self, config=given.get("peft_config")), _loading(self, model_id, hub):
            _check_not_offloaded(self, given.get("peft_config"), model_id, hub)
            _read_ours(self, given, model_id, hub)
            try:
                info = original(*bound.args, **bound.kwargs)
            except RuntimeError:
                _explain_misfit(self, name, model_id, hub)
                raise
            _check_report(info, name, further_names(self, name))
            return info

    return load_adapter


def _check_not_offloaded(model: nn.Module, config: Any, model_id: Any, hub: dict[str, Any]) -> None:
    if not is_offloaded(model):
        return
    if isinstance(config, LNTuneConfig) or (model_id is not None and SavedAdapter(model_id, hub).is_ours):
        raise UnsupportedError(
            "this model is offloaded, and transformers' own load_adapter would leave the adapter without values. Load "
            "the adapter with PeftModel.from_pretrained(model, ...)."
        )


def _read_ours(model: nn.Module, given: dict[str, Any], model_id: Any, hub: dict[str, Any]) -> None:
    """Check what transformers is about to load, and unpack masked deltas, because it matches tensors by name.

    Args:
        model: the model to load into.
        given: the arguments of its `load_adapter`. Config and tensors are added if transformers should not read them
            itself.
        model_id: the adapter's folder or repository, if any.
        hub: keyword arguments that say where to look on the Hub.
    """
    config, tensors = given.get("peft_config"), given.get("adapter_state_dict")
    if config is None and model_id is not None and SavedAdapter(model_id, hub).is_ours:
        config = _check_files(model_id, hub)
    elif isinstance(config, LNTuneConfig) and not tensors and model_id is not None:
        config.take_sizes(_check_files(model_id, hub) or config)
    if not isinstance(config, LNTuneConfig) or (not tensors and model_id is None):
        return
    if config.modules_to_save:
        _check_heads_load()
    where, name = str(model_id), given.get("adapter_name") or "default"
    if tensors:
        where = f"the state dict for adapter {name!r}"
        check_tensors(None, tensors, where)
    else:
        tensors = load_peft_weights(str(model_id), device="cpu", **hub_options(hub))
    has_masks = any(key.endswith((KEEP, SCORES)) for key in tensors)
    given["peft_config"] = config  # it records what is in the file
    adapts = given.get("adapter_kwargs")  # transformers ignores them if it is given a config
    if is_packed(tensors) or has_lora(tensors) or has_masks or config.save_dtype is not None or adapts:
        # transformers knows where the adapter's name belongs only for the containers of this PEFT type.
        unpacked = unpack_by(base_modules(model), config, tensors, where)
        if has_masks:
            unpacked = scores_by(model, config, unpacked, bool(given.get("is_trainable")), name)
        if config.save_dtype is not None:
            unpacked = cast_values(unpacked, delta_dtype(next(model.parameters()).dtype, config.torch_delta_dtype))
        given["adapter_state_dict"] = {with_lora_name(key, name): value for key, value in unpacked.items()}


def _check_heads_load() -> None:
    """Refuse heads if transformers does not find their places in a model, which it does since 5.18."""
    major, minor, *_ = transformers.__version__.split(".")
    if (int(major), int(minor)) < HEADS_SINCE:
        raise UnsupportedError(
            f"transformers {transformers.__version__} does not load the heads of an adapter (modules_to_save) with its "
            f"own `load_adapter`. Install transformers>={'.'.join(map(str, HEADS_SINCE))}, or load the adapter with "
            "`PeftModel.from_pretrained`."
        )


def _check_files(model_id: Any, kwargs: dict[str, Any]) -> LNTuneConfig | None:
    """Check a saved adapter. Returns its config, or None if it has none, as PEFT allows if the model has a config."""
    saved = SavedAdapter(model_id, kwargs)
    if saved.fields is not None:
        return StoredConfig.from_pretrained(str(model_id), **hub_options(kwargs))
    if saved.weights is not None:
        saved.check(None)
    return None


@contextmanager
def _loading(model: nn.Module, model_id: Any, hub: Mapping[str, Any], key_mapping: Any = None) -> Iterator[None]:
    """Set the name mapping, and turn errors into errors of this package, while a loader runs."""
    with (
        told_by_us(model_id, lambda: bool(configs_of(model)) or SavedAdapter(model_id, hub).seems_ours),
        renaming(key_mapping),
    ):
        yield


@contextmanager
def _dispatched_as_it_is(model: nn.Module, model_id: Any, hub: dict[str, Any]) -> Iterator[None]:
    """Keep PEFT from dispatching a model again that accelerate has spread over devices, for an adapter of ours.

    PEFT would first remove accelerate's hooks. Weights on disk, and adapters with them, would then be on meta until
    files with both are written, and masks fit none of these files. Our layers work beneath the hooks: an adapter lives
    on the device on which its module computes.
    """
    holder = next((part for part in model.modules() if "hf_device_map" in part.__dict__), None)
    if holder is None or not SavedAdapter(model_id, hub).is_ours:
        yield
        return
    device_map = holder.__dict__.pop("hf_device_map")
    try:
        yield
    finally:
        holder.__dict__["hf_device_map"] = device_map


def _explain_misfit(model: nn.Module, adapter_name: str, model_id: Any, hub: dict[str, Any]) -> None:
    """Raise the error of PEFT's loader for shapes that differ, which transformers only logs."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if isinstance(config, LNTuneConfig) and model_id is not None:
        tensors = load_peft_weights(str(model_id), device="cpu", **hub_options(hub))
        LNTuneModel._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)


def _check_report(info: Any, adapter_name: str, further: Collection[str]) -> None:
    """Refuse keys that do not fit an adapter of ours, which transformers only reports.

    Args:
        info: the report of transformers.
        adapter_name: the adapter that was loaded.
        further: names that no file holds, because the model has the same layer under another name.

    Raises:
        AdapterFileError: keys are missing or unexpected, or shapes differ.
    """
    problems = {
        "missing": [key for key in info.missing_keys if of_adapter(key, adapter_name) and key not in further],
        # These have the adapter's name in them if transformers knows the container, else they are as in the file.
        "unexpected": [key for key in info.unexpected_keys if of_adapter(key, adapter_name) or is_ours(key)],
        "of another shape": [key for key, *_ in info.mismatched_keys if of_adapter(key, adapter_name)],
    }
    found = [f"{len(keys)} {what}, such as {min(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise AdapterFileError(
            f"the saved adapter does not fit this model: {'; '.join(found)}. It was trained on another model, or the "
            "file or its config was changed."
        )
