"""Merging an adapter of norms into the safetensors files of a model, quantized or not, byte for byte.

Quantizers leave norms alone. So the bytes of norms are changed where they are in the files, and everything else, packed
integers, scales, zero points, statistics and the headers, is copied. No model is loaded, and no quantizer is needed.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from peft_lntune.interop.norm_deltas import (
    NormAdapter,
    NormMerge,
    Place,
    check_apart,
    check_base,
    edit_of,
    folder_of,
    said,
)
from peft_lntune.norms.names import spellings
from peft_lntune.storage.byte_edits import ByteEdit, write_edited
from peft_lntune.storage.folders import new_folder

__all__ = ["is_quantized", "merge_into_safetensors", "norms_alone", "read_places", "tensors_of", "weight_files"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SINGLE = "model.safetensors"
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
_MAX_HEADER = 100_000_000  # as safetensors itself has it


def merge_into_safetensors(adapter: str | os.PathLike, model: str | os.PathLike, out: str | os.PathLike) -> NormMerge:
    """Copy a model's folder with the deltas of an adapter added to its norms; every other byte is kept.

    The sum is made in float32 and rounded once to the dtype of the norm, as `merge_and_unload` does it. Weight files
    beside those that transformers loads, and subfolders, are not copied: they would still hold the old norms.

    Args:
        adapter: folder of an adapter that holds deltas alone.
        model: folder of the model, with `model.safetensors` or with shards and their index.
        out: folder to make; it appears when everything is written.

    Returns:
        What was changed.

    Raises:
        ConfigError: `out` exists and is not an empty folder, or `model` is not a folder.
        AdapterFileError: the adapter is damaged, or from another model.
        UnsupportedError: the adapter holds more than deltas, a tuned tensor is quantized, or the model has no
            safetensors.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> from peft_lntune import LNTuningConfig
        >>> folder = Path(tempfile.mkdtemp())
        >>> model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2))
        >>> model.save_pretrained(folder / "model")
        >>> get_peft_model(model, LNTuningConfig()).save_pretrained(folder / "adapter")
        >>> merge_into_safetensors(folder / "adapter", folder / "model", folder / "merged").tensors
        6
    """
    saved, source = NormAdapter(adapter), folder_of(model)
    if source is None:
        raise ConfigError(f"{model} is not a folder on this machine. Give the folder of the model.")
    _check_type(saved, source)
    files = weight_files(source)
    places = read_places(saved.names, tensors_of(files), f"{saved.where} does not fit {source}")
    checked = _check_trained_on(saved, source, places)
    deltas = saved.deltas({name: place.shape for name, place in places.items()})
    edits: dict[Path, list[ByteEdit]] = {file: [] for file in files}
    lost = 0
    for name, (values, index) in deltas.items():
        edit, rounded = edit_of(places[name], values, index)
        edits[places[name].file].append(edit)
        lost += rounded
    with new_folder(Path(out)) as made:
        for file in sorted(source.iterdir()):
            if file in edits:
                write_edited(file, made / file.name, edits[file])
            elif file.is_file() and not file.name.startswith(".") and file.suffix not in _OTHER_WEIGHTS:
                shutil.copyfile(file, made / file.name)
    return NormMerge(Path(out), len(deltas), sum(values.numel() for values, _ in deltas.values()), lost, checked)


def norms_alone(adapter: str | os.PathLike) -> bool:
    """Whether an adapter holds deltas alone, and so can be added to the bytes of norms.

    Args:
        adapter: folder of the adapter, or its repository on the Hub.

    Returns:
        False if it has heads, LoRA, bottlenecks, prefixes or supermasks.

    Raises:
        AdapterFileError: the adapter is damaged, or of another PEFT type.
    """
    try:
        NormAdapter(adapter)
    except UnsupportedError:
        return False
    return True


def is_quantized(folder: Path) -> bool:
    """Whether a folder holds a quantized model in safetensors.

    Args:
        folder: folder of a model.

    Returns:
        True if its config says how it was quantized, and it has safetensors.
    """
    known = {"quantization_config", "compression_config"} & _json(folder / "config.json").keys()
    return bool(known) and any((folder / name).is_file() for name in (_SINGLE, f"{_SINGLE}.index.json"))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder.

    Args:
        folder: folder of a model.

    Returns:
        `model.safetensors`, or the shards that the index names.

    Raises:
        UnsupportedError: there are none.
        AdapterFileError: the index is damaged, or a shard is missing.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / f"{_SINGLE}.index.json"
    if not index.is_file():
        raise UnsupportedError(
            f"{folder} holds neither {_SINGLE} nor {index.name}. Save the model with save_pretrained, which writes "
            "safetensors."
        )
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise AdapterFileError(f"{index} is damaged ({error!r}). Get a good copy of the model.") from error
    strange = sorted(str(name) for name in names if not isinstance(name, str) or Path(name).name != name)
    missing = sorted(name for name in names if name not in strange and not (folder / name).is_file())
    if strange or missing:
        raise AdapterFileError(
            f"{index} names {(strange or missing)[0]}, which is not a file beside it. Get the whole model."
        )
    return [folder / name for name in sorted(names)]


def tensors_of(files: Iterable[Path]) -> dict[str, Place]:
    """The tensors of safetensors files, by name. Only headers are read.

    Args:
        files: the files.

    Returns:
        Where each tensor is.

    Raises:
        AdapterFileError: a header is damaged, or two files hold a tensor of one name.
    """
    found: dict[str, Place] = {}
    for file in files:
        for place in _header(file):
            if place.name in found:
                raise AdapterFileError(f"{found[place.name].file} and {file} both hold {place.name}. Get a good copy.")
            found[place.name] = place
    return found


def read_places(names: Iterable[str], tensors: Mapping[str, Place], problem: str) -> dict[str, Place]:
    """Find the tensor of a checkpoint for each tuned parameter.

    A checkpoint may lack a prefix that the model has, such as `model.` or `bert.`, or have another one. The one
    exchange of prefixes with which every name is found is used.

    Args:
        names: tuned parameters, `<module>.lntune_<parameter>`.
        tensors: tensors of the checkpoint by name.
        problem: the beginning of an error.

    Returns:
        By tuned name, the tensor.

    Raises:
        AdapterFileError: there is no such exchange, or several.
    """
    names = list(names)
    answers: dict[tuple[str, ...], dict[str, Place]] = {}
    for cut, put in _exchanges(names[0], tensors):
        found = {name: place for name in names if (place := _place(name, cut, put, tensors)) is not None}
        if len(found) == len(names):
            if not cut and not put:
                return found
            answers[tuple(place.name for place in found.values())] = found
    if len(answers) == 1:
        return next(iter(answers.values()))
    if answers:
        several = " and ".join(sorted(next(iter(found.values())).name for found in answers.values())[:3])
        raise AdapterFileError(f"{problem}: {said(names[0])} may be {several}. Give the model's own folder.")
    direct = [name for name in names if _place(name, "", "", tensors) is None]
    raise AdapterFileError(
        f"{problem}: {len(direct)} of its {len(names)} tuned parameters are not there, the first is {said(direct[0])}. "
        "It was trained on another model, or the files name or store its parameters in another way."
    )


def _exchanges(name: str, tensors: Mapping[str, Place]) -> Iterator[tuple[str, str]]:
    """Prefixes to cut from tuned names, and to put before them, with which this name is in the checkpoint."""
    yield "", ""
    steps = said(name).split(".")
    for count in range(len(steps) - 1):
        cut, rest = "".join(f"{step}." for step in steps[:count]), ".".join(steps[count:])
        if rest in tensors and cut:
            yield cut, ""
        # A last name alone, such as `norm.weight`, ends many names, of which no two are one module.
        if len(steps) - count > 2 or not cut:
            for other in tensors:
                if other.endswith(f".{rest}"):
                    yield cut, other.removesuffix(rest)


def _place(name: str, cut: str, put: str, tensors: Mapping[str, Place]) -> Place | None:
    module, _, parameter = said(name).rpartition(".")
    if not f"{module}.".startswith(cut):
        return None
    found = [tensors.get(f"{put}{module.removeprefix(cut)}.{own}") for own in spellings(parameter)]
    return next((place for place in found if place is not None), None)


def _check_type(saved: NormAdapter, source: Path) -> None:
    config = _json(source / "config.json")
    own = config.get("model_type")
    if saved.model_type and own and saved.model_type != own:
        raise AdapterFileError(
            f"{saved.where} was saved from a model of type {saved.model_type!r}, and {source} is of type {own!r}. Use "
            "the model that it was trained on."
        )


def _check_trained_on(saved: NormAdapter, source: Path, places: Mapping[str, Place]) -> bool:
    """Compare the norms with those of the model that the adapter was trained on, if that is another folder."""
    base = folder_of(saved.base)
    if base is not None and base.resolve() == source.resolve():
        return True
    if base is None:
        same_name = saved.base is not None and Path(saved.base).name == source.name
        method = (_json(source / "config.json").get("quantization_config") or {}).get("quant_method")
        if method == "awq" and not same_name:
            raise UnsupportedError(
                f"{source} is quantized by AWQ, which moves scales into norms, and {saved.where} was trained on "
                f"{saved.base or 'a model that its config does not name'}, which is not on this machine. Train "
                "the adapter over the AWQ model; or, if it was, set base_model_name_or_path of its config to "
                "this folder."
            )
        return False
    known = read_places(saved.names, tensors_of(weight_files(base)), f"{saved.where} does not fit {base}")
    check_base(places, known, 0.0, saved.where)
    return True


def _header(file: Path) -> Iterator[Place]:
    """The tensors that the header of a safetensors file lists."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = opened.read(8)
        bytes_of_header = struct.unpack("<Q", length)[0] if len(length) == 8 else size
        if bytes_of_header > min(size - 8, _MAX_HEADER):
            raise AdapterFileError(f"{file} is damaged or cut off: its header is longer than the file.")
        content = opened.read(bytes_of_header)
    spans: list[tuple[int, int, str]] = []
    try:
        listed = json.loads(content)
        for name, one in listed.items():
            if name == "__metadata__":
                continue
            begin, end = one["data_offsets"]
            shape, dtype = torch.Size(one["shape"]), _DTYPES.get(one["dtype"])
            if not 0 <= begin <= end <= size - 8 - bytes_of_header or (
                dtype is not None and end - begin != shape.numel() * dtype.itemsize
            ):
                raise ValueError(f"{name} does not fit into the file")
            spans.append((begin, end, name))
            yield Place(file, name, dtype, str(one["dtype"]), shape, 8 + bytes_of_header + begin)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"{file} is damaged or cut off ({error}). Get a good copy of the model.") from error
    check_apart(spans, file)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise AdapterFileError(f"{file} is damaged ({error}). Get a good copy of the model.") from error
    return found if isinstance(found, dict) else {}
