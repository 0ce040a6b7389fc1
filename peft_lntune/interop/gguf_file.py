"""Norms of a GGUF file take the deltas of an adapter: nothing is requantized, all other bytes are kept.

llama.cpp stores norms in float32, in quantized files too, and loads no adapter of norms. So the deltas are added to the
file's norms, in a copy or in place with a way back. `gguf` has the names of tensors for each architecture. What the
conversion does to norms is in the table below, which was read from llama.cpp's converter.

Source: https://github.com/ggml-org/llama.cpp, `conversion/` (`modify_tensors` of each architecture).
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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
from peft_lntune.interop.safetensors_files import read_places, tensors_of, weight_files
from peft_lntune.storage.byte_edits import ByteEdit, edit_in_place, refuse_edited, undo_edits, write_edited

__all__ = ["ARCHITECTURES", "Conversion", "edit_gguf", "restore_gguf", "to_gguf"]


class Conversion(NamedTuple):
    """What the conversion of an architecture to GGUF does to its norms.

    Attributes:
        model_types: the architecture's names in transformers.
        shift: what is added to the weight of each norm. A delta is added to the sum all the same: `(w + 1) + d`.
    """

    model_types: tuple[str, ...]
    shift: float = 0.0


ARCHITECTURES: Mapping[str, Conversion] = {
    "arcee": Conversion(("arcee",)),
    "bert": Conversion(("bert", "roberta", "xlm-roberta")),
    "bloom": Conversion(("bloom",)),
    "cohere2": Conversion(("cohere2",)),
    "command-r": Conversion(("cohere",)),
    "deepseek2": Conversion(("deepseek_v2", "deepseek_v3")),
    "ernie4_5": Conversion(("ernie4_5",)),
    "exaone4": Conversion(("exaone4",)),
    "falcon": Conversion(("falcon",)),
    "gemma": Conversion(("gemma",), 1.0),
    "gemma2": Conversion(("gemma2",), 1.0),
    "gemma3": Conversion(("gemma3", "gemma3_text"), 1.0),
    "glm4": Conversion(("glm4",)),
    "glm4moe": Conversion(("glm4_moe",)),
    "gpt-oss": Conversion(("gpt_oss",)),
    "gpt2": Conversion(("gpt2",)),
    "gptneox": Conversion(("gpt_neox",)),
    "granite": Conversion(("granite",)),
    "granitemoe": Conversion(("granitemoe",)),
    "hunyuan-dense": Conversion(("hunyuan_v1_dense",)),
    "lfm2": Conversion(("lfm2",)),
    "llama": Conversion(("llama", "mistral", "mixtral")),
    "mpt": Conversion(("mpt",)),
    "nemotron": Conversion(("nemotron",), 1.0),
    "olmo2": Conversion(("olmo2", "olmo3")),
    "olmoe": Conversion(("olmoe",)),
    "phi2": Conversion(("phi",)),
    "phi3": Conversion(("phi3",)),
    "qwen2": Conversion(("qwen2",)),
    "qwen2moe": Conversion(("qwen2_moe",)),
    "qwen3": Conversion(("qwen3",)),
    "qwen3moe": Conversion(("qwen3_moe",)),
    "seed_oss": Conversion(("seed_oss",)),
    "smollm3": Conversion(("smollm3",)),
    "stablelm": Conversion(("stablelm",)),
    "starcoder2": Conversion(("starcoder2",)),
}
"""The GGUF architectures whose converted norms take a delta as it is. All others are refused by name."""

# Why some are not in the table. Those that are in neither were not read.
_CHANGED = {
    "chameleon": "it permutes the q and k norms and repeats them per head",
    "dots3-note": "it multiplies norms by a scale",
    "falcon-h1": "it reshapes the norms of its mixers",
    "kimi-k3": "it multiplies norms with the projections behind them",
    "mamba2": "it reshapes the norms of its mixers",
    "muse-glimmer": "it moves a scale into the q and k norms",
    "plamo2": "it adds another constant to each kind of norm",
    "plamo3": "it adds another constant to each kind of norm",
    "qwen35": "it adds 1 to some norms and not to others",
    "qwen3next": "it adds 1 to some norms and not to others",
}


def to_gguf(
    adapter: str | os.PathLike,
    gguf: str | os.PathLike,
    out: str | os.PathLike,
    model: str | os.PathLike | None = None,
) -> NormMerge:
    """Copy a GGUF file with the deltas of an adapter added to its norms.

    Args:
        adapter: folder of an adapter that holds deltas of norms alone.
        gguf: the file, quantized or not; it is only read.
        out: the new file; it must not exist.
        model: folder of the model that the adapter was trained on, to compare its norms with those of the file. None:
            the one that the adapter's config names, if it is on this machine.

    Returns:
        What was changed.

    Raises:
        ConfigError: `out` exists, `gguf` holds an adapter that `edit_gguf` wrote, or `model` is not a folder.
        AdapterFileError: the adapter is damaged, or the file is damaged or of another model.
        UnsupportedError: the adapter holds more than deltas of norms; the file is split; its architecture is not in
            `ARCHITECTURES`; a tuned norm is quantized.
        ImportError: the package `gguf` is missing.

    Example:
        >>> to_gguf("my-adapter", "model-Q4_K_M.gguf", "tuned-Q4_K_M.gguf")  # doctest: +SKIP
    """
    refuse_edited(gguf)
    edits, merged = _edits(NormAdapter(adapter), Path(gguf), model)
    write_edited(gguf, out, edits)
    return replace(merged, file=Path(out))


def edit_gguf(adapter: str | os.PathLike, gguf: str | os.PathLike, model: str | os.PathLike | None = None) -> NormMerge:
    """Add the deltas of an adapter to the norms of a GGUF file in place. `restore_gguf` takes them out, bit for bit.

    The original bytes of the norms are first written to a file beside it, with a checksum. Stop servers that have the
    file mapped before: they would see it change.

    Args:
        adapter: folder of an adapter that holds deltas of norms alone.
        gguf: the file, quantized or not.
        model: folder of the model that the adapter was trained on, to compare its norms with those of the file. None:
            the one that the adapter's config names, if it is on this machine.

    Returns:
        What was changed.

    Raises:
        ConfigError: the file already holds an adapter, or `model` is not a folder.
        AdapterFileError: the adapter is damaged, or the file is damaged or of another model.
        UnsupportedError: the adapter holds more than deltas of norms; the file is split; its architecture is not in
            `ARCHITECTURES`; a tuned norm is quantized. After an error nothing has changed.
        ImportError: the package `gguf` is missing.

    Example:
        >>> edit_gguf("my-adapter", "model-Q4_K_M.gguf")  # doctest: +SKIP
    """
    saved = NormAdapter(adapter)
    refuse_edited(gguf)
    edits, merged = _edits(saved, Path(gguf), model)
    edit_in_place(gguf, edits, f"the adapter {saved.where} (digest {saved.digest[:12]})")
    return merged


def restore_gguf(gguf: str | os.PathLike) -> str:
    """Restore the norms of a GGUF file that `edit_gguf` changed, and remove the file with its original bytes.

    Args:
        gguf: the file.

    Returns:
        Which adapter was taken out.

    Raises:
        ConfigError: the file was not changed by `edit_gguf`.
        AdapterFileError: the original bytes are damaged, or belong to another file. Nothing has changed.

    Example:
        >>> restore_gguf("model-Q4_K_M.gguf")  # doctest: +SKIP
    """
    return undo_edits(gguf)


def _edits(saved: NormAdapter, file: Path, model: str | os.PathLike | None) -> tuple[list[ByteEdit], NormMerge]:
    """The edits that add an adapter to a file. Nothing is written."""
    reader, architecture = _opened(file)
    conversion = ARCHITECTURES[architecture]
    if saved.model_type is not None and saved.model_type not in conversion.model_types:
        raise AdapterFileError(
            f"{saved.where} was saved from a model of type {saved.model_type!r}, and {file} holds one of architecture "
            f"{architecture!r}, which is {' or '.join(conversion.model_types)} in transformers. Use a file made from "
            "the model that the adapter was trained on."
        )
    places = _places(saved.names, reader, architecture, file, saved.where)
    deltas = saved.deltas({name: place.shape for name, place in places.items()})
    found = [(name, *edit_of(places[name], values, index)) for name, (values, index) in deltas.items()]
    checked = _check_trained_on(saved, places, conversion.shift, model)
    entries = sum(values.numel() for values, _ in deltas.values())
    lost = sum(rounded for *_, rounded in found)
    return [edit for _, edit, _ in found], NormMerge(file, len(deltas), entries, lost, checked)


def _opened(file: Path) -> tuple[Any, str]:
    """A reader of the file, and its architecture, which must be in the table."""
    library = _library()
    if not file.is_file():
        raise ConfigError(f"{file} is not a file. Give the GGUF file of a model.")
    try:
        reader = library.GGUFReader(file, "r")
        architecture = str(reader.fields["general.architecture"].contents())
        parts = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
        if architecture in ARCHITECTURES and parts == 1:
            int(reader.fields[f"{architecture}.block_count"].contents())
    except Exception as error:  # the reader views any bytes as lengths, and raises what numpy raises
        raise AdapterFileError(f"{file} is not a GGUF file, or is damaged ({error}). Get a good copy.") from error
    check_apart([(int(t.data_offset), int(t.data_offset + t.n_bytes), t.name) for t in reader.tensors], file)
    if parts > 1:
        raise UnsupportedError(
            f"{file} is one of {parts} parts of a model. Join them first: llama-gguf-split --merge FIRST_PART WHOLE."
        )
    if reader.byte_order != "I":
        raise UnsupportedError(f"{file} has the byte order of another machine. Convert it for this one.")
    if architecture not in ARCHITECTURES:
        why = _CHANGED.get(architecture)
        raise UnsupportedError(
            f"{file} is of architecture {architecture!r}. "
            + (
                f"Its conversion changes norms: {why}. So a delta cannot be added as it is. "
                if why
                else "What its conversion does to norms was not examined. "
            )
            + f"Merge the adapter, and convert the merged model. Supported: {', '.join(ARCHITECTURES)}."
        )
    return reader, architecture


def _places(names: Iterable[str], reader: Any, architecture: str, file: Path, where: str) -> dict[str, Place]:
    """The tensor of a GGUF file for each tuned parameter."""
    library = _library()
    kinds = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    blocks = int(reader.fields[f"{architecture}.block_count"].contents())
    names_of = library.get_tensor_name_map(kinds[architecture], blocks)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    places: dict[str, Place] = {}
    for name in names:
        mapped = [names_of.get_type_and_name(one, (".weight", ".bias")) for one in _in_checkpoints(said(name))]
        found = sorted({own for kind, own in filter(None, mapped) if "NORM" in kind.name and own in tensors})
        if len(found) != 1:
            raise AdapterFileError(
                f"{where} tunes {said(name)}, for which {file}, of architecture {architecture!r} with {blocks} blocks, "
                f"has {'several tensors: ' + ', '.join(found) if found else 'no norm'}. It was trained on another "
                "model, or tunes a norm that this file lacks (one of a vision tower) or joins with others (norms per "
                "head). If the model is the same, merge the adapter, and convert the merged model."
            )
        tensor = tensors[found[0]]
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.tensor_type.name)
        shape = torch.Size(int(size) for size in reversed(tensor.shape))  # GGUF has the fastest axis first
        places[name] = Place(file, tensor.name, dtype, tensor.tensor_type.name, shape, int(tensor.data_offset))
    twice = {place.name for place in places.values()}
    if len(twice) != len(places):
        raise AdapterFileError(f"{where} tunes two parameters that are one tensor of {file}. It is of another model.")
    return places


# What models with a head put before the names of the model inside. The converter takes it off.
_WRAPPERS = ("transformer.", "bert.", "roberta.", "model.language_model.", "language_model.model.", "language_model.")


def _in_checkpoints(name: str) -> list[str]:
    """The names that a parameter may have in a checkpoint, as the converter sees it."""
    bare = name
    for prefix in _WRAPPERS:
        bare = bare.removeprefix(prefix)
    return list(dict.fromkeys([name, bare, f"model.{name}", f"model.{bare}"]))


def _check_trained_on(
    saved: NormAdapter, places: Mapping[str, Place], shift: float, model: str | os.PathLike | None
) -> bool:
    """Compare the file's norms with those of the adapter's base model, if that is on this machine."""
    base = folder_of(saved.base if model is None else model)
    if base is None and model is not None:
        raise ConfigError(f"{model} is not a folder on this machine. Give the folder of the model.")
    try:
        files = weight_files(base) if base is not None else []
    except UnsupportedError:
        if model is not None:
            raise
        files = []
    if not files:
        return False
    known = read_places(saved.names, tensors_of(files), f"{saved.where} does not fit {base}")
    check_base(places, known, shift, saved.where)
    return True


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the package gguf: pip install 'peft-lntune[gguf]'.") from error
    return gguf
