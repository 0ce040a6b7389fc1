"""Whether the norms of a model learned, from two folders."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from peft_lntune.analysis import Checkpoint
from peft_lntune.doctor import Report, compare_norms
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.interop.peft_ln_tuning import CONTAINER
from peft_lntune.interop.trainer_checkpoints import STATE_FILE
from peft_lntune.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from peft_lntune.storage.packing import PACKED, ROOT
from peft_lntune.storage.saved_adapter import read_config

__all__ = ["examine_checkpoints", "learning_rate_of"]


def examine_checkpoints(before: str, after: str, *, learning_rate: float | None = None) -> Report:
    """Look at the norms of two saved checkpoints, reading one tensor at a time.

    Args:
        before: a safetensors file, the index of a sharded checkpoint, the folder of a model, or the folder of an
            adapter of any PEFT type.
        after: a later one in the same forms; an adapter is compared with the model it was trained on, or with an
            earlier adapter.
        learning_rate: the largest of the run; None: the largest in the `trainer_state.json` beside `after`, if there
            is one.

    Returns:
        The report.

    Raises:
        ConfigError: no norm is in both, shapes differ, or the configs name two architectures.
        AdapterFileError: a file is missing or damaged.
    """
    _check_types(before, after)
    if learning_rate is None:
        learning_rate = learning_rate_of(after)
    return compare_norms(_opened(before), _opened(after), learning_rate=learning_rate, adapter=_is_adapter(Path(after)))


def learning_rate_of(folder: str) -> float | None:
    """The largest learning rate that Trainer logged for a checkpoint.

    Args:
        folder: folder of the checkpoint.

    Returns:
        The rate; None if there is no `trainer_state.json`, or it has none.

    Raises:
        AdapterFileError: the file is damaged.
    """
    file = Path(folder, STATE_FILE)
    if not file.is_file():
        return None
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        rates = [float(entry["learning_rate"]) for entry in history if "learning_rate" in entry]
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{file} is damaged ({error!r}). Give the rate yourself: --learning-rate.") from error
    return max(rates, default=None)


def _check_types(before: str, after: str) -> None:
    """Refuse two architectures: they may share names of norms, which would be compared as if one became the other."""
    types = [_model_type(Path(path)) for path in (before, after)]
    if None not in types and types[0] != types[1]:
        raise ConfigError(
            f"{before} is of type {types[0]!r}, and {after} of type {types[1]!r}: they are not from one run. Give two "
            "checkpoints of one model, or for an adapter the model that it was trained on. If they are one model all "
            "the same, give their safetensors files in place of the folders."
        )


def _model_type(folder: Path) -> str | None:
    """The architecture that a config names, as transformers calls it."""
    if _is_adapter(folder):
        return (read_config(folder / CONFIG_FILE).get("manifest") or {}).get("model_type")
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise AdapterFileError(f"{file} is damaged ({error}). Get a good copy of the model.") from error
    return config.get("model_type") if isinstance(config, dict) else None


def _is_adapter(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def _opened(path: str) -> Mapping[str, Tensor] | str:
    """The path of a model's checkpoint, or the tensors of an adapter by their names in the base model."""
    folder = Path(path)
    if not _is_adapter(folder):
        return path
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterFileError(f"{path} holds a config, but no {WEIGHTS_FILE}. Save the adapter as safetensors.")
    stored = Checkpoint(folder / WEIGHTS_FILE)
    floating = [name for name in stored if stored.facts[name].floating]
    tensors = {name.removeprefix(ROOT).replace(f".{CONTAINER}.", "."): stored[name] for name in floating}
    values = tensors.pop(f"{PACKED}.weight", None)
    if values is None:
        return tensors
    counts = ((read_config(folder / CONFIG_FILE).get("manifest") or {}).get("tuned") or {}).items()
    # In a file, the values of all masked deltas stand one after the other, in the order of their names.
    masked = sorted((name, count) for name, count in counts if count is not None)
    if sum(count for _, count in masked) != values.numel():
        raise AdapterFileError(
            f"{path} holds {values.numel():,} masked values, and its config counts {sum(n for _, n in masked):,}. Get "
            "a good copy of the adapter."
        )
    pieces = values.split([count for _, count in masked])
    return tensors | {f"{name}.weight": piece for (name, _), piece in zip(masked, pieces, strict=True)}
