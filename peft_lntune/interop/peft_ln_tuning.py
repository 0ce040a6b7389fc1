"""Conversion to and from PEFT's own LN_TUNING format, which holds whole norms and loads without this package."""

import os
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_lntune.config import LNTuningConfig, parts_of
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import AdapterFileError, UnsupportedError
from peft_lntune.interop.foreign import check_foreign, own_config, read_foreign
from peft_lntune.layers import PARAMETERS, ReplacementLayer
from peft_lntune.layers.offloaded import all_onloaded, onloaded
from peft_lntune.norms.names import role_of
from peft_lntune.storage.adapter_file import WEIGHTS_FILE
from peft_lntune.storage.keys import is_ours
from peft_lntune.storage.manifest import digest_of
from peft_lntune.storage.packing import ROOT
from peft_lntune.storage.saving import new_adapters
from peft_lntune.tuner.restoring import restored_on_error, told_by_us

__all__ = ["CONTAINER", "from_stock", "to_stock"]

CONTAINER = "ln_tuning_layers"
_DIGEST = "peft_lntune_digest"  # key in the metadata of the weight file, which PEFT does not read


def to_stock(peft_model: PeftModel, directory: str | os.PathLike, adapter_name: str = "default") -> None:
    """Write an adapter in PEFT's own LN_TUNING format, for use without this package.

    The file holds each tuned module whole, base plus delta, rounded to the base dtype. Over a bfloat16 base, small
    deltas are lost to that rounding. Heads in `modules_to_save` are included.

    Args:
        peft_model: a model with adapters of this package, not merged.
        directory: folder for `adapter_config.json` and `adapter_model.safetensors`; made if it is missing.
        adapter_name: the adapter.

    Raises:
        ConfigError: there is no such adapter.
        UnsupportedError: an adapter is merged into the model, or the adapter has parts other than norms.

    Example:
        >>> import tempfile
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), LNTuningConfig())
        >>> directory = tempfile.mkdtemp()
        >>> to_stock(model, directory)
        >>> PeftConfig.from_pretrained(directory).peft_type.value
        'LN_TUNING'
    """
    config = own_config(peft_model, adapter_name)
    others = [type(part).__name__ for part in parts_of(config) if not isinstance(part, LNTuningConfig)]
    if others:
        raise UnsupportedError(
            f"adapter {adapter_name!r} has parts ({', '.join(others)}) that PEFT's LN_TUNING format cannot hold. Save "
            "it with save_pretrained, or merge what can be merged."
        )
    every = [module for module in peft_model.modules() if isinstance(module, ReplacementLayer)]
    layers = [layer for layer in every if any(adapter_name in layer.deltas(parameter) for parameter in PARAMETERS)]
    if any(layer.merged for layer in layers):
        raise UnsupportedError("the adapter is merged into the base model; call unmerge_adapter() first.")
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    tensors = {key: value for key, value in state.items() if not is_ours(key)}  # heads
    for layer in layers:
        for name, value in _whole(layer, adapter_name).items():
            tensors[f"{ROOT}{layer.label}.{CONTAINER}.{name}"] = value
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    saved = peft.LNTuningConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
        target_modules=[layer.label for layer in layers],
        modules_to_save=config.modules_to_save,
    )
    with new_adapters(directory) as folder:
        said = {"format": "pt", _DIGEST: _digest(tensors, saved)}
        save_file(tensors, folder / WEIGHTS_FILE, said)
        saved.save_pretrained(str(folder))


def from_stock(model: nn.Module, directory: str | os.PathLike, adapter_name: str = "default") -> PeftModel:
    """Load an adapter in PEFT's own LN_TUNING format as an adapter of this package.

    The file holds whole norms, so the deltas are those norms minus the norms of `model`. Give the base model that the
    adapter was trained on: the file does not say which one that is.

    Args:
        model: the base model, or a `PeftModel` with adapters of this package, to which this one is added.
        directory: the folder that PEFT's `save_pretrained` wrote, or a repository on the Hub.
        adapter_name: name of the new adapter.

    Returns:
        The model with the adapter.

    Raises:
        AdapterFileError: not an LN_TUNING adapter, damaged, or from another model. Nothing has changed.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), LNTuningConfig())
        >>> to_stock(model, directory)
        >>> from_stock(model.unload(), directory).peft_config["default"].kind
        'LNTuningConfig'
    """
    with restored_on_error(model, adapter_name), told_by_us(directory, lambda: True):
        return _from_peft(model, directory, adapter_name)


def _from_peft(model: nn.Module, directory: str | os.PathLike, adapter_name: str) -> PeftModel:
    saved, files = read_foreign(directory, "LN_TUNING", "from_stock")
    loaded = files.tensors
    _check_digest(files.weights, loaded, saved)
    base = base_modules(model.get_base_model() if isinstance(model, PeftModel) else model)
    heads = {key: value for key, value in loaded.items() if f".{CONTAINER}." not in key}
    deltas = _deltas(loaded, base, str(directory))
    config = LNTuningConfig(
        task_type=saved.task_type,
        base_model_name_or_path=saved.base_model_name_or_path,
        target_modules=sorted({key.rpartition(".lntune_")[0].removeprefix(ROOT) for key in deltas}),
        modules_to_save=saved.modules_to_save,
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name)
    result = set_peft_model_state_dict(model, {**heads, **deltas}, adapter_name)
    if result.unexpected_keys:
        raise AdapterFileError(
            f"{directory} holds {min(result.unexpected_keys)}, which is neither in this model nor in modules_to_save "
            "of its config. It was trained on another model, or its config was changed."
        )
    return model


def _digest(tensors: Mapping[str, Tensor], config: PeftConfig) -> str:
    """Digest of what decides the outputs of an adapter in this format: its tensors, heads and task."""
    return f"{digest_of(tensors)} {','.join(sorted(config.modules_to_save or ()))} {config.task_type}"


def _check_digest(file: Path | None, tensors: Mapping[str, Tensor], config: PeftConfig) -> None:
    """Refuse a file of `to_stock` that was changed after writing. PEFT's own files have no digest."""
    if file is None or file.name != WEIGHTS_FILE:
        return
    try:
        with safe_open(file, framework="pt") as opened:
            saved = (opened.metadata() or {}).get(_DIGEST)
    except SafetensorError as error:
        raise AdapterFileError(f"{file} is damaged or cut off ({error}). Get a good copy of the adapter.") from error
    if saved is not None and saved != _digest(tensors, config):
        raise AdapterFileError(
            f"{file} or its adapter_config.json was changed after to_stock wrote them: the digests differ. "
            "Get both files from one export."
        )


@torch.no_grad()
def _whole(layer: ReplacementLayer, adapter_name: str) -> dict[str, Tensor]:
    """The state of the wrapped module with the adapter in it, as PEFT's own tuner saves it."""
    with all_onloaded(layer):
        state = dict(layer.get_base_layer().state_dict())
        for parameter in PARAMETERS:
            if adapter_name in layer.deltas(parameter):
                own = layer.own_name(parameter)
                state[own] = layer.effective(parameter, [adapter_name]).to(state[own].dtype)
    return state


def _deltas(loaded: Mapping[str, Tensor], base: Mapping[str, nn.Module], where: str) -> dict[str, Tensor]:
    deltas: dict[str, Tensor] = {}
    check_foreign(loaded, _like(loaded, base), where)
    for key, value in loaded.items():
        path, found, parameter = key.partition(f".{CONTAINER}.")
        if not found:
            continue
        name = path.removeprefix(ROOT)
        own = getattr(base.get(name), parameter, None)
        parameter = role_of(base[name], parameter) if name in base else parameter
        if parameter not in PARAMETERS or own is None or own.shape != value.shape:
            has = "has none" if own is None else f"has one of shape {tuple(own.shape)}"
            raise AdapterFileError(
                f"{where} tunes {parameter} of shape {tuple(value.shape)} in {name}, and this model {has} there. "
                "It was trained on another model."
            )
        with onloaded(base[name]):
            own = getattr(base[name], parameter).detach().cpu()
        deltas[f"{ROOT}{name}.lntune_{parameter}.weight"] = _difference(value, own)
    if not deltas:
        raise AdapterFileError(f"{where} holds no tensor named `...{CONTAINER}...`; it is not an LN_TUNING adapter.")
    return deltas


def _like(loaded: Mapping[str, Tensor], base: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The model's own tensors, by their names in the file."""
    found = {}
    for key in loaded:
        path, _, parameter = key.replace(f".{CONTAINER}.", ".").removeprefix(ROOT).rpartition(".")
        own = getattr(base.get(path), parameter, None)
        if isinstance(own, Tensor):
            found[key] = own
    return found


def _difference(tuned: Tensor, base: Tensor) -> Tensor:
    """A delta that gives `tuned` when `base` is added to it."""
    wide = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), torch.float32)
    tuned, base = tuned.to(wide), base.to(wide)
    delta = tuned - base
    return delta + (tuned - (base + delta))  # corrects the rounding of the first subtraction
