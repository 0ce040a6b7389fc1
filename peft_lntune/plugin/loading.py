"""A refused adapter leaves no trace, whichever way it is loaded.

PEFT puts an adapter into the model before it reads the weights, so a bad file would leave a half-loaded adapter
behind, and transformers' own loader only reports keys that do not fit. The loaders are wrapped: the files are checked
first, and where loading fails all the same, the model is put back as it was.
"""

import functools
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from peft_lntune.config import LNTuneConfig, StoredConfig, delta_part, record_mask
from peft_lntune.config.base import PEFT_TYPE
from peft_lntune.core.delta import delta_dtype
from peft_lntune.core.norms import base_modules
from peft_lntune.errors import AdapterFileError, PeftLNTuneError
from peft_lntune.fit import further_names, scores_by, unpack_by
from peft_lntune.model import LNTuneModel
from peft_lntune.packing import KEEP, SCORES, is_packed
from peft_lntune.storage import (
    cast_values,
    check_directory,
    check_tensors,
    has_lora,
    hub_options,
    is_ours,
    of_adapter,
    with_lora_name,
)

__all__ = ["guard_loading"]

_MARK = "_lntune_guarded"


def guard_loading() -> None:
    """Wrap PEFT's and transformers' loaders. Idempotent."""
    wraps: list[tuple[type, str, Callable[..., Any]]] = [
        (PeftModel, "load_adapter", _guarded_load),
        (PeftModel, "from_pretrained", _guarded_from_pretrained),
        (PeftMixedModel, "from_pretrained", _guarded_from_pretrained),
        (PeftAdapterMixin, "load_adapter", _guarded_native),
    ]
    # Everything is looked up before anything is changed.
    _ = PeftConfig._get_peft_type
    originals = [getattr(owner, name) for owner, name, _ in wraps]
    for (owner, name, wrap), original in zip(wraps, originals, strict=True):
        if getattr(original, _MARK, False):
            continue
        function = getattr(original, "__func__", original)
        wrapped = functools.wraps(function)(wrap(function))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, classmethod(wrapped) if inspect.ismethod(original) else wrapped)


def _guarded_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        saved = None
        with _restored_on_error(self, adapter_name), _explained(self, model_id):
            if isinstance(self.peft_config.get(adapter_name), LNTuneConfig):
                saved = _check_files(model_id, kwargs)  # PEFT reads the config only of adapters it does not have yet
            with _dispatched_as_it_is(self, model_id, kwargs):
                loaded = original(self, model_id, adapter_name, *args, **kwargs)
        norms = delta_part(saved) if saved is not None else None
        if norms is not None:
            record_mask(self.peft_config, adapter_name, norms.mask_source)
        return loaded

    return load_adapter


def _guarded_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: type, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        config = inspect.signature(original).bind(cls, model, model_id, *args, **kwargs).arguments.get("config")
        with _restored_on_error(model), _explained(model, model_id):
            if isinstance(config, LNTuneConfig):  # then it was not our own class that loaded it
                config.take_sizes(_check_files(model_id, kwargs) or config)
            with _dispatched_as_it_is(model, model_id, kwargs):
                return original(cls, model, model_id, *args, **kwargs)

    return from_pretrained


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
        with _restored_on_error(self), _explained(self, model_id):
            _read_ours(self, given, model_id, hub)
            try:
                info = original(*bound.args, **bound.kwargs)
            except RuntimeError:
                _explain_misfit(self, name, model_id, hub)
                raise
            _check_report(info, name, further_names(self, name))
            return info

    return load_adapter


def _read_ours(model: nn.Module, given: dict[str, Any], model_id: Any, hub: dict[str, Any]) -> None:
    """Check what transformers is about to load, and give it masked deltas unpacked: it matches tensors by their names.

    Args:
        model: the model to load into.
        given: the arguments of its `load_adapter`; config and tensors are put in where transformers should not read
            them itself.
        model_id: the adapter's folder or repository, if any.
        hub: where on the Hub to look.
    """
    config, tensors = given.get("peft_config"), given.get("adapter_state_dict")
    if config is None and model_id is not None and _holds_ours(model_id, hub):
        config = _check_files(model_id, hub)
    elif isinstance(config, LNTuneConfig) and not tensors and model_id is not None:
        config.take_sizes(_check_files(model_id, hub) or config)
    if not isinstance(config, LNTuneConfig) or (not tensors and model_id is None):
        return
    where = str(model_id)
    if tensors:
        where = f"the state dict for adapter {given.get('adapter_name') or 'default'!r}"
        check_tensors(None, tensors, where)
    else:
        tensors = load_peft_weights(str(model_id), device="cpu", **hub_options(hub))
    has_masks = any(key.endswith((KEEP, SCORES)) for key in tensors)
    if is_packed(tensors) or has_lora(tensors) or has_masks or config.save_dtype is not None:
        # Of the containers of this PEFT type alone it knows where the adapter's name belongs.
        unpacked = unpack_by(base_modules(model), config, tensors, where)
        name = given.get("adapter_name") or "default"
        if has_masks:
            unpacked = scores_by(model, config, unpacked, bool(given.get("is_trainable")), name)
        if config.save_dtype is not None:
            unpacked = cast_values(unpacked, delta_dtype(next(model.parameters()).dtype, config.torch_delta_dtype))
        named = {with_lora_name(key, name): value for key, value in unpacked.items()}
        given.update(peft_config=config, adapter_state_dict=named)


def _holds_ours(model_id: Any, hub: dict[str, Any]) -> bool:
    try:
        return PeftConfig._get_peft_type(str(model_id), **hub_options(hub)) == PEFT_TYPE
    except (ValueError, KeyError):
        return False  # the loader itself will say what is missing


def _check_files(model_id: Any, kwargs: dict[str, Any]) -> LNTuneConfig | None:
    hub = hub_options(kwargs)
    try:
        PeftConfig._get_peft_type(str(model_id), **hub)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # there is no config, and where PEFT has one already it needs no other
        check_directory(None, str(model_id), **hub)
        return None
    return StoredConfig.from_pretrained(str(model_id), **hub)


@contextmanager
def _explained(model: nn.Module, model_id: Any) -> Iterator[None]:
    """Say which file is meant where JSON is broken, or what is missing where PEFT has a bare key."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterFileError(
            f"adapter_config.json of {model_id} is damaged: {error}. Get a good copy of the adapter."
        ) from error
    except KeyError as error:
        # PEFT looks up each tensor of a head in modules_to_save by its name in the file.
        if not _configs(model) or "." not in str(error):
            raise
        raise AdapterFileError(
            f"{model_id} lacks {error}, a tensor of a module in modules_to_save. It was saved from another model, or "
            "the file was changed."
        ) from error


@contextmanager
def _dispatched_as_it_is(model: nn.Module, model_id: Any, hub: dict[str, Any]) -> Iterator[None]:
    """Keep PEFT from dispatching a model anew that accelerate has spread over devices, where an adapter of ours is loaded.

    PEFT takes accelerate's hooks off first. Weights that are on disk are then on meta, and an adapter with them, until
    files are written that hold both; a mask fits none of them. Our layers work beneath the hooks: an adapter lives on
    the device on which its module computes.
    """
    holder = next((part for part in model.modules() if "hf_device_map" in part.__dict__), None)
    if holder is None or not _holds_ours(model_id, hub):
        yield
        return
    device_map = holder.__dict__.pop("hf_device_map")
    try:
        yield
    finally:
        holder.__dict__["hf_device_map"] = device_map


def _explain_misfit(model: nn.Module, adapter_name: str, model_id: Any, hub: dict[str, Any]) -> None:
    """transformers only logs which shapes differ; raise what PEFT's way of loading would have raised."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if isinstance(config, LNTuneConfig) and model_id is not None:
        tensors = load_peft_weights(str(model_id), device="cpu", **hub_options(hub))
        LNTuneModel._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)


def _check_report(info: Any, adapter_name: str, further: Collection[str]) -> None:
    """transformers reports keys that do not fit, and goes on; for ours that is an error, as with PEFT.

    Args:
        info: the report.
        adapter_name: which adapter was loaded.
        further: names that are not in a file, because the model has the same layer under another one.
    """
    problems = {
        "missing": [key for key in info.missing_keys if of_adapter(key, adapter_name) and key not in further],
        # These come with the adapter's name in them where transformers knows the container, or else as in the file.
        "unexpected": [key for key in info.unexpected_keys if of_adapter(key, adapter_name) or is_ours(key)],
        "of another shape": [key for key, *_ in info.mismatched_keys if of_adapter(key, adapter_name)],
    }
    found = [f"{len(keys)} {what}, such as {min(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise AdapterFileError(
            f"the saved adapter does not fit this model: {'; '.join(found)}. It was trained on another model, or the "
            "file or its config was changed."
        )


@contextmanager
def _restored_on_error(model: nn.Module, adapter_name: str | None = None) -> Iterator[None]:
    """Put the model back as it was where an adapter of ours could not be loaded.

    Args:
        model: the model to load into.
        adapter_name: the adapter whose tensors may be written over, where it exists.
    """
    before = set(_configs(model))
    restore = _remember(model, adapter_name)
    try:
        yield
    except BaseException as error:  # an interrupted load leaves no half adapter either
        if isinstance(error, PeftLNTuneError) or before or set(_configs(model)):
            restore()
        raise


def _configs(model: nn.Module) -> dict[str, LNTuneConfig]:
    configs = getattr(model, "peft_config", None) or {}
    return {name: config for name, config in configs.items() if isinstance(config, LNTuneConfig)}


def _remember(model: nn.Module, adapter_name: str | None) -> Callable[[], None]:
    """What puts the attributes of all modules back, and so the modules, adapters and modes; flags and values too.

    Containers are put back in place, because PEFT shares them (`peft_config`) between its model, tuner and base model.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    containers: dict[int, tuple[Any, Any]] = {}
    for _, saved in attributes:
        for value in saved.values():
            for container in _containers(value, 3):
                containers[id(container)] = container, container.copy()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in _tensors(model, adapter_name)]

    @torch.no_grad()
    def restore() -> None:
        for module, saved in attributes:
            vars(module).clear()
            vars(module).update(saved)
        for container, content in containers.values():
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for tensor, value in values:
            tensor.copy_(value)

    return restore


def _containers(value: Any, depth: int) -> Iterator[Any]:
    """A container and those in it, as deep as layers are put into them."""
    if type(value) in (dict, OrderedDict, list, set):
        yield value
        for item in (value.values() if isinstance(value, dict) else value) if depth else ():
            yield from _containers(item, depth - 1)


def _tensors(model: nn.Module, adapter_name: str | None) -> list[Tensor]:
    if adapter_name is None:
        return []
    named = [*model.named_parameters(), *model.named_buffers()]
    return [tensor for name, tensor in named if of_adapter(name, adapter_name)]
