"""A refused adapter leaves no trace, whichever way it is loaded.

PEFT puts an adapter into the model before it reads the weights, so a bad file would leave a half-loaded adapter
behind, and transformers' own loader only reports keys that do not fit. The three loaders are wrapped: the files are
checked first, and where loading fails all the same, the adapter is taken out again.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from peft_lntune.config import LNTuneConfig, StoredConfig
from peft_lntune.config.base import PEFT_TYPE
from peft_lntune.errors import AdapterFileError
from peft_lntune.layers import LNTuneLayer
from peft_lntune.storage import is_ours

__all__ = ["guard_loading"]

_MARK = "_lntune_guarded"


def guard_loading() -> None:
    """Wrap PEFT's and transformers' loaders. Idempotent."""
    loaders = [
        (PeftModel, "load_adapter", PeftModel.load_adapter, _guarded_load),
        (PeftModel, "from_pretrained", PeftModel.from_pretrained.__func__, _guarded_from_pretrained),
        (PeftAdapterMixin, "load_adapter", PeftAdapterMixin.load_adapter, _guarded_native),
    ]
    for owner, name, original, wrap in loaders:
        if getattr(original, _MARK, False):
            continue
        wrapped = functools.wraps(original)(wrap(original))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, classmethod(wrapped) if inspect.ismethod(getattr(owner, name)) else wrapped)


def _guarded_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if adapter_name in self.peft_config and isinstance(self.peft_config[adapter_name], LNTuneConfig):
            _check_files(model_id, kwargs)  # PEFT reads the config only of adapters it does not have yet
        with _restored_on_error(self):
            return original(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


def _guarded_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: type[PeftModel], model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> PeftModel:
        config = inspect.signature(original).bind(cls, model, model_id, *args, **kwargs).arguments.get("config")
        if isinstance(config, LNTuneConfig):
            _check_files(model_id, kwargs)  # a config that is passed in was not loaded by our own class
        with _restored_on_error(model):
            return original(cls, model, model_id, *args, **kwargs)

    return from_pretrained


def _guarded_native(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(self, peft_model_id, *args, **kwargs).arguments
        hub = {**(given.get("adapter_kwargs") or {})}
        if peft_model_id is not None and _holds_ours(peft_model_id, hub):
            _check_files(peft_model_id, hub)
        with _restored_on_error(self):
            info = original(self, peft_model_id, *args, **kwargs)
            _check_report(info)
        return info

    return load_adapter


def _holds_ours(model_id: Any, hub: dict[str, Any]) -> bool:
    try:
        return PeftConfig._get_peft_type(str(model_id), **_hub_only(hub)) == PEFT_TYPE
    except (ValueError, KeyError):
        return False  # the loader itself will say what is missing


def _check_files(model_id: Any, kwargs: dict[str, Any]) -> None:
    if isinstance(model_id, (str, bytes)) or hasattr(model_id, "__fspath__"):
        StoredConfig.from_pretrained(str(model_id), **_hub_only(kwargs))


def _hub_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    return PeftConfig._split_kwargs(kwargs)[0]


def _check_report(info: Any) -> None:
    """transformers reports keys that do not fit, and goes on; for ours that is an error, as with PEFT."""
    problems = {
        "missing": [key for key in info.missing_keys if is_ours_in_model(key)],
        "unexpected": [key for key in info.unexpected_keys if is_ours(key)],
        "of another shape": [key for key, *_ in info.mismatched_keys if is_ours_in_model(key)],
    }
    found = [f"{len(keys)} {what}, such as {min(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise AdapterFileError(
            f"the saved adapter does not fit this model: {'; '.join(found)}. It was trained on another model, or the "
            "file or its config was changed."
        )


def is_ours_in_model(key: str) -> bool:
    """Whether a key of a model's state dict, adapter name included, names a tensor of ours."""
    parts = key.split(".")
    return len(parts) > 2 and parts[-3].startswith("lntune_")


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Take adapters of ours out of the model again where loading them fails."""
    before = set(getattr(model, "peft_config", None) or ())
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    native = getattr(model, "_hf_peft_config_loaded", None)
    try:
        yield
    except Exception:
        added = _adapters(model) - before
        if added:
            _eject(model, added)
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)
            if native is not None:
                model._hf_peft_config_loaded = native
        raise


def _adapters(model: nn.Module) -> set[str]:
    configs = getattr(model, "peft_config", None) or {}
    inside = {name for m in model.modules() if isinstance(m, LNTuneLayer) for d in (m.lntune_weight, m.lntune_bias) for name in d}
    return {name for name, config in configs.items() if isinstance(config, LNTuneConfig)} | inside


def _eject(model: nn.Module, adapters: set[str]) -> None:
    for name in adapters:
        if isinstance(model, PeftModel):
            model.delete_adapter(name)
            continue
        for module in list(model.modules()):
            if isinstance(module, LNTuneLayer):
                module.delete_adapter(name)
            elif isinstance(module, AuxiliaryTrainingWrapper) and name in module._adapters:
                module.delete_adapter(name, new_active_adapters=None)
        getattr(model, "peft_config", {}).pop(name, None)
    if getattr(model, "peft_config", None):
        return
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, LNTuneLayer):
                setattr(parent, child_name, child.base_layer)
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, child_name, child.original_module)
    if hasattr(model, "peft_config"):
        del model.peft_config


