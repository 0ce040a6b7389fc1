"""Tensors by name, from a model, a dict, or safetensors files of any size, read one at a time."""

import json
from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peft_lntune.core.module_tree import base_model, base_modules, below
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.selection.effective import effective_parameters

__all__ = ["Checkpoint", "CheckpointSource", "check_same", "facts_of", "match_tensors", "open_tensors", "pair_names"]

CheckpointSource = nn.Module | Mapping[str, Tensor] | str | PathLike[str]
"""A model, tensors by name, or the path of a safetensors checkpoint: a file, the index of a sharded one, a folder."""

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The first BERT checkpoints use TensorFlow's names.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_SMALL = ("I8", "U8", "int8", "uint8")  # dtypes that store quantized weights


class TensorFacts(NamedTuple):
    """Shape and dtype of a tensor, known without its values; the dtype in torch's or safetensors' (`F32`) spelling."""

    shape: tuple[int, ...]
    dtype: str
    floating: bool
    meta: bool = False


class _Named(Mapping[str, Tensor]):
    """Tensors that are read on access, under names known beforehand."""

    names: Mapping[str, Any]

    def __contains__(self, name: object) -> bool:
        return name in self.names  # Mapping's own test would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Checkpoint(_Named):
    """The tensors of safetensors files by name, each read on access and not cached.

    The headers of all files are read at once, so a truncated or missing file is noticed before any work is done. Names
    are in numerical order: layer 2 comes before layer 10.

    Args:
        path: a file, an index `*.safetensors.index.json` with its shards beside it, or a folder with either.

    Attributes:
        facts: shape and dtype of each tensor.
        names: file and key of each tensor.

    Raises:
        AdapterFileError: the file is missing, damaged, or not a safetensors file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> file = f"{tempfile.mkdtemp()}/model.safetensors"
        >>> save_file({"norm.weight": torch.ones(3)}, file)
        >>> Checkpoint(file)["norm.weight"]
        tensor([1., 1., 1.])
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.facts: dict[str, TensorFacts] = {}
        self.names: dict[str, tuple[Path, str]] = {}
        found = [(*place, facts) for place, facts in _headers(Path(path))]
        for file, key, facts in sorted(found, key=lambda one: _counting(one[1])):
            name = _new_name(key)
            self.facts[name], self.names[name] = facts, (file, key)

    def __getitem__(self, name: str) -> Tensor:
        file, key = self.names[name]
        # Opened for each tensor: an open file keeps the pages it has mapped in memory.
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error


class _View(_Named):
    """Some tensors of another mapping, possibly under other names."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]


def open_tensors(source: CheckpointSource) -> Mapping[str, Tensor]:
    """The floating-point tensors of a source by name; tensors of files are read on access.

    For a model with adapters, the active adapters are merged into its parameters. A tensor that a dict holds under
    several names appears under the first. Integer tensors, such as position ids and counters, are left out.

    Args:
        source: a model, tensors by name, or the path of a checkpoint: a safetensors file, the index of a sharded one,
            or a folder.

    Returns:
        A mapping that reads a tensor from its file on each access and does not cache it.

    Raises:
        AdapterFileError: the path is not a safetensors checkpoint, or the checkpoint is damaged.
        ConfigError: a tensor is quantized or on the meta device, so it has no values to read.

    Example:
        >>> tied = torch.ones(2, 2)
        >>> list(open_tensors({"wte.weight": tied, "lm_head.weight": tied, "position_ids": torch.arange(2)}))
        ['wte.weight']
    """
    if isinstance(source, nn.Module):
        tensors: Mapping[str, Tensor] = effective_parameters(source)
    else:
        tensors = Checkpoint(source) if isinstance(source, (str, PathLike)) else source
    facts = facts_of(tensors)
    for name, fact in facts.items():
        if fact.meta or fact.dtype in _SMALL:
            raise ConfigError(
                f"{name} should have floating-point values, but is {fact.dtype}{' on meta' if fact.meta else ''}. "
                "Load the model unquantized and off meta."
            )
    return _View(tensors, {name: name for name in _untied(tensors) if facts[name].floating})


def match_tensors(
    before: CheckpointSource, after: CheckpointSource, *, shared: bool = False
) -> tuple[Mapping[str, Tensor], ...]:
    """Match the tensors of two sources by name and shape; of files, only the headers are read.

    Args:
        before: a model, tensors by name, or the path of a checkpoint.
        after: the model, tensors or path to compare with.
        shared: True: keep the tensors that both have in the same shape and leave out the rest, such as heads. A prefix
            that only one side has before all names (`bert.`) is then ignored.

    Returns:
        Both mappings, under the names of `before`.

    Raises:
        ConfigError: names or shapes differ, or no tensor is shared; the message names the first difference.
        AdapterFileError: a path is not a safetensors checkpoint, or the checkpoint is damaged.

    Example:
        >>> body = {"norm.weight": torch.ones(2)}
        >>> tuned = {"bert.norm.weight": torch.zeros(2), "head.bias": torch.ones(1)}
        >>> before, after = match_tensors(body, tuned, shared=True)
        >>> list(before), after["norm.weight"]
        (['norm.weight'], tensor([0., 0.]))
    """
    # Files hold some buffers (BART's `final_logits_bias`), which are not among a model's parameters.
    buffers = _buffers(before) | _buffers(after)
    opened = [open_tensors(source) for source in (before, after)]
    old, new = (_View(tensors, {name: name for name in tensors if name not in buffers}) for tensors in opened)
    facts, others = facts_of(old), facts_of(new)
    if shared and old:
        names = {
            name: other for name, other in pair_names(facts, others).items() if facts[name].shape == others[other].shape
        }
        if not names:
            raise ConfigError(
                f"before and after share no tensor of one name and shape: {_such(facts)} before, {_such(others)} after."
            )
    else:
        check_same(facts, others)
        names = {name: name for name in facts}
    return _View(old, {name: name for name in names}), _View(new, names)


def _buffers(source: CheckpointSource) -> set[str]:
    if not isinstance(source, nn.Module):
        return set()
    modules = base_modules(base_model(source))
    return {below(name, key) for name, module in modules.items() for key in module._buffers}


def check_same(before: Mapping[str, TensorFacts], after: Mapping[str, TensorFacts]) -> None:
    """Check that two sets of tensors have the same names and shapes.

    Args:
        before: shape and dtype of each tensor by name, from `facts_of`.
        after: shape and dtype of each tensor of the other set, by name.

    Raises:
        ConfigError: `before` is empty, or a name or a shape differs; the message names the first difference.

    Example:
        >>> check_same(facts_of({"w": torch.ones(2)}), facts_of({"w": torch.zeros(2)}))
    """
    if not before:
        raise ConfigError("there is no tensor to compare: before is empty.")
    sides = {"before": [n for n in before if n not in after], "after": [n for n in after if n not in before]}
    if any(sides.values()):
        said = " and ".join(f"{len(names)} only {side}, such as {names[0]}" for side, names in sides.items() if names)
        raise ConfigError(
            f"before and after should have the same tensors, but {said}; {sum(name in after for name in before)} are "
            "in both. To compare those, match them with shared=True (--shared)."
        )
    changed = [name for name in before if before[name].shape != after[name].shape]
    if changed:
        first = changed[0]
        raise ConfigError(
            f"{first} is {before[first].shape} before and {after[first].shape} after (and {len(changed) - 1} more have "
            "other shapes). To leave out what differs, such as a head, match them with shared=True (--shared)."
        )


def pair_names(old: Collection[str], new: Collection[str]) -> dict[str, str]:
    """Pair names of two checkpoints, with the one prefix added or removed that makes most names agree, if any does.

    Args:
        old: names before.
        new: names after.

    Returns:
        Name after by name before, of those in both.

    Example:
        >>> pair_names(["norm.weight", "head.bias"], ["bert.norm.weight"])
        {'norm.weight': 'bert.norm.weight'}
    """

    def paired(on: str, off: str) -> dict[str, str]:
        named = {name: on + name.removeprefix(off) for name in old if name.startswith(off)}
        return {name: other for name, other in named.items() if other in new}

    firsts = [{"", *(name.partition(".")[0] + "." for name in names)} for names in (new, old)]
    choices = [(on, "") for on in sorted(firsts[0])] + [("", off) for off in sorted(firsts[1])]
    return max((paired(*choice) for choice in choices), key=len)


def _such(facts: Mapping[str, TensorFacts]) -> str:
    first = next(iter(facts), None)
    return f"{len(facts)} tensors" + (f" such as {first} {facts[first].shape}" if first else "")


def facts_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorFacts]:
    """Shape and dtype of each tensor; for tensors in files, from the headers alone."""
    if isinstance(tensors, Checkpoint):
        return tensors.facts
    if isinstance(tensors, _View):
        known = facts_of(tensors.tensors)
        return {name: known[other] for name, other in tensors.names.items()}
    return {
        name: TensorFacts(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.is_floating_point(), t.is_meta)
        for name, t in tensors.items()
    }


def _untied(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors; of several names for the same memory, only the first."""
    if isinstance(tensors, (Checkpoint, _View)):
        return list(tensors)  # a file holds each tensor once
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        place = tensor.data_ptr() if tensor.layout == torch.strided else 0
        first.setdefault((place, tensor.shape, tensor.stride()) if place else name, name)
    return list(first.values())


def _headers(path: Path) -> Iterator[tuple[tuple[Path, str], TensorFacts]]:
    """File and key of each tensor of a checkpoint, with the shape and dtype from its header."""
    path = _resolve(path)
    listed = _read_index(path) if path.name.endswith(".json") else {path: None}
    for file, wanted in listed.items():
        try:
            with safe_open(file, framework="pt") as opened:
                keys = list(opened.keys())
                slices = {key: opened.get_slice(key) for key in keys}
                found = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
        missing = sorted(set(wanted or ()) - found.keys())
        if missing:
            raise AdapterFileError(
                f"{file} should hold {missing[0]} (and {len(missing) - 1} more) by {path.name}, but does not. The "
                "shards are from different saves; get the whole checkpoint."
            )
        for key in found if wanted is None else wanted:
            shape, dtype = found[key]
            yield (file, key), TensorFacts(shape, dtype, dtype.startswith(("F", "BF")))


def _resolve(path: Path) -> Path:
    """The file to open first: for a folder, its weights or their index."""
    if path.is_file():
        if path.name.endswith((".safetensors", ".safetensors.index.json")):
            return path
        raise AdapterFileError(
            f"{path} is not a safetensors file, and pickled weights are not read: they may run code. Save the model "
            "again with save_pretrained, which writes safetensors."
        )
    if not path.is_dir():
        raise AdapterFileError(
            f"{path} does not exist. Give a safetensors file, the index of a sharded one, or a folder."
        )
    for name in (INDEX, WHOLE):
        if (path / name).is_file():
            return path / name
    others = sorted(file.name for file in path.iterdir() if file.name.endswith((".safetensors", ".bin", ".json")))
    hint = (
        "It is an adapter: give the merged model (`peft-lntune merge`)."
        if (path / "adapter_config.json").is_file()
        else "Give the file that holds the weights, or save the model again with save_pretrained."
    )
    raise AdapterFileError(f"{path} has neither {WHOLE} nor {INDEX}, but {', '.join(others) or 'no weights'}. {hint}")


def _read_index(path: Path) -> dict[Path, list[str] | None]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, list[str] | None] = {path.parent / file: [] for file in places.values()}
        for key, file in places.items():
            names = shards[path.parent / file]
            assert names is not None
            names.append(key)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterFileError(f"{path} is not the index of a checkpoint: {error!r}. Get a good copy.") from error
    lost = [file.name for file in shards if not file.is_file()]
    if lost:
        raise AdapterFileError(f"{path} names {len(lost)} missing shards, such as {lost[0]}. Get all of them.")
    return shards


def _damaged(file: Path, error: Exception) -> AdapterFileError:
    return AdapterFileError(f"{file} is damaged or cut off ({error}). Get a good copy of the checkpoint.")


def _new_name(key: str) -> str:
    for old, new in _OLD_NAMES.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _counting(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
