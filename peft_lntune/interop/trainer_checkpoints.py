"""Finds the checkpoint of transformers' Trainer from which a killed run can continue."""

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from peft_lntune.config import StoredConfig
from peft_lntune.config.base import CONFIG_FILE, PEFT_TYPE
from peft_lntune.errors import AdapterFileError, ConfigError, PeftLNTuneError
from peft_lntune.storage.adapter_file import WEIGHTS_FILE

__all__ = ["last_whole_checkpoint"]

_NAME = re.compile(r"checkpoint-(\d+)")
_SHARDED = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+")
STATE_FILE = "trainer_state.json"
NEEDED = (("*model*", "*/*model*"), ("optimizer*",), ("scheduler.pt",), ("rng_state*.pth",), (STATE_FILE,))
"""The files needed to continue bit for bit, one of each group, as Trainer names them in one process or in several."""


def last_whole_checkpoint(directory: str | os.PathLike) -> str | None:
    """Find the newest complete checkpoint in a Trainer's output directory.

    A process killed while writing a checkpoint leaves an incomplete one. With `resume_from_checkpoint=True`, Trainer
    takes the highest number, and so fails at every start. This function skips incomplete checkpoints, with a warning
    that says what is wrong:

        trainer.train(resume_from_checkpoint=last_whole_checkpoint("runs"))

    A checkpoint is complete if every adapter matches its config, no file is cut off, and the states of optimizer,
    schedule, random numbers and Trainer are there. Checkpoints of `save_only_model=True` are therefore skipped too.

    DeepSpeed and sharded FSDP write one file per process, in their own formats, without a list of the files. For such a
    checkpoint only the marker of a finished save is checked, and a warning says what was not checked.

    Args:
        directory: the `output_dir` of the run; it may be missing.

    Returns:
        The folder of the checkpoint; None if there is no complete checkpoint, so that training starts from the
        beginning. If checkpoints exist and all are incomplete, a warning says so.

    Raises:
        ConfigError: `directory` is a checkpoint itself.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(last_whole_checkpoint(folder))
        None
    """
    root = Path(directory)
    found = [(_NAME.fullmatch(entry.name), entry) for entry in (root.iterdir() if root.is_dir() else ())]
    numbered = [(int(match[1]), entry) for match, entry in found if match and entry.is_dir()]
    folders = [entry for _, entry in sorted(numbered, reverse=True)]
    if not folders and _NAME.fullmatch(root.name) and (root / STATE_FILE).is_file():
        raise ConfigError(f"{directory} is a checkpoint itself. Give the output_dir that it is in.")
    for folder in folders:
        try:
            unseen = _check(folder)
        except PeftLNTuneError as error:
            warnings.warn(f"{folder} is skipped: {error}", stacklevel=2)
            continue
        if unseen:
            warnings.warn(f"{folder} is taken, but {unseen}", stacklevel=2)
        return str(folder)
    if folders:
        warnings.warn(
            f"none of the {len(folders)} checkpoints in {directory} is complete, so training starts from the "
            "beginning.",
            stacklevel=2,
        )
    return None


def _check(folder: Path) -> str | None:
    """Raise a `PeftLNTuneError` if a checkpoint is incomplete. Returns what could not be checked, if anything."""
    unseen = _check_deepspeed(folder) if _is_deepspeed(folder) else _check_sharded(folder)
    needed = NEEDED[3:] if _is_deepspeed(folder) else NEEDED
    missing = [names[0] for names in needed if not _files(folder, names)]
    if missing:
        raise AdapterFileError(f"it has no {missing[0]}. The save was not finished, or training cannot resume from it.")
    _check_json(folder / STATE_FILE)
    for file in _files(folder, ("*.pt", "*.pth", "*.bin", "*.safetensors", "*/*.safetensors")):
        _check_end(file)
    adapters = _files(folder, (WEIGHTS_FILE, CONFIG_FILE, f"*/{WEIGHTS_FILE}", f"*/{CONFIG_FILE}"))
    for own in sorted({file.parent for file in adapters}):
        _check_adapter(own)
    return unseen


def _is_deepspeed(folder: Path) -> bool:
    return (folder / "latest").exists() or any(folder.glob("global_step*"))


def _check_deepspeed(folder: Path) -> str:
    """Check `latest`, which DeepSpeed writes when every process has written its part of the step."""
    latest = folder / "latest"
    step = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    if not step or not (folder / step).is_dir():
        raise AdapterFileError(
            "DeepSpeed's `latest` is missing, or names no folder beside it, so the save was not finished."
        )
    files = _files(folder, (f"{step}/*.pt",))
    if not any("model_states" in file.name for file in files):
        raise AdapterFileError(f"{step} has no model states, so the save was not finished.")
    for file in files:
        _check_end(file)
    return (
        f"it is DeepSpeed's: whether {step} has the files of every process cannot be checked. It holds {len(files)} "
        "files; compare with the number of processes."
    )


def _check_sharded(folder: Path) -> str | None:
    """Check `.metadata`, which torch writes when every process has written its shard."""
    sharded = sorted(
        {file.parent for file in folder.glob("*/*.distcp")} | {f.parent for f in folder.glob("*/.metadata")}
    )
    sharded += [entry for entry in folder.iterdir() if _SHARDED.fullmatch(entry.name) and entry not in sharded]
    for own in sharded:
        if not (own / ".metadata").is_file() or not (own / ".metadata").stat().st_size or not any(own.glob("*.distcp")):
            raise AdapterFileError(f"{own.name} has no .metadata, or no shard, so the save was not finished.")
    if not sharded:
        return None
    return (
        f"{', '.join(own.name for own in sharded)} are FSDP's: whether the shard of every process is there and "
        "complete cannot be checked."
    )


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files that match a pattern, without those in temporary folders, whose names begin with a dot."""
    found = [file for pattern in patterns for file in folder.glob(pattern)]
    return sorted(file for file in found if not file.relative_to(folder).parts[0].startswith("."))


def _check_json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise AdapterFileError(f"{file.name} is missing or cut off ({error}).") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{file.name} holds no JSON object.")
    return content


def _check_end(file: Path) -> None:
    """Refuse a file that is cut off: safetensors states its length, and torch's zip files end with their directory."""
    try:
        with safe_open(file, framework="pt") if file.suffix == ".safetensors" else zipfile.ZipFile(file):
            pass
    except (SafetensorError, zipfile.BadZipFile, OSError) as error:
        raise AdapterFileError(f"{file.name} is cut off ({error}).") from error


def _check_adapter(folder: Path) -> None:
    """Check an adapter of this package against its config. Adapters of other types have no digest."""
    if _check_json(folder / CONFIG_FILE).get("peft_type") == PEFT_TYPE:
        StoredConfig.from_pretrained(str(folder))
