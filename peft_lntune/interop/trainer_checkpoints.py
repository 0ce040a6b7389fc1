"""Which checkpoint of transformers' Trainer a killed run goes on from."""

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
"""What going on bit for bit needs, one of each, as Trainer names it in one process or in several."""


def last_whole_checkpoint(directory: str | os.PathLike) -> str | None:
    """The newest checkpoint in a Trainer's output directory that was written to its end.

    A process that is killed while it writes a checkpoint leaves a part of one, and with `resume_from_checkpoint=True`
    Trainer takes the highest number, stops with an error, and does so at every start. Here such a checkpoint is passed
    over, with a warning that says what is wrong with it:

        trainer.train(resume_from_checkpoint=last_whole_checkpoint("runs"))

    Whole means: every adapter is the one that its config was saved with, no file is cut off, and the states of
    optimizer, schedule, random numbers and Trainer are there, so one of `save_only_model=True` is passed over too.

    DeepSpeed and sharded FSDP write a file per process, in formats of their own, and no list of the files that there
    should be. Of such a checkpoint the end of the save is looked at, and a warning says what was not.

    Args:
        directory: the `output_dir` of the run; it need not be there yet.

    Returns:
        The folder of the checkpoint; None where there is none, and training starts from the beginning. Where there are
        checkpoints, and none of them is whole, a warning says so.

    Raises:
        ConfigError: `directory` is a checkpoint itself.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(last_whole_checkpoint(folder))
        None
    """
    folders = sorted(_checkpoints(Path(directory)), key=_number, reverse=True)
    if not folders and _NAME.fullmatch(Path(directory).name) and Path(directory, STATE_FILE).is_file():
        raise ConfigError(f"{directory} is a checkpoint itself. Give the output_dir that it is in.")
    for folder in folders:
        try:
            unseen = _check(folder)
        except PeftLNTuneError as error:
            warnings.warn(f"{folder} is passed over: {error}", stacklevel=2)
            continue
        if unseen:
            warnings.warn(f"{folder} is taken, but {unseen}", stacklevel=2)
        return str(folder)
    if folders:
        warnings.warn(
            f"none of the {len(folders)} checkpoints in {directory} is whole, so training starts from the beginning.",
            stacklevel=2,
        )
    return None


def _checkpoints(directory: Path) -> list[Path]:
    entries = directory.iterdir() if directory.is_dir() else ()
    return [entry for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()]


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _check(folder: Path) -> str | None:
    """Raise a `PeftLNTuneError` where a checkpoint is not whole; say what could not be looked at."""
    unseen = _check_deepspeed(folder) if _is_deepspeed(folder) else _check_sharded(folder)
    needed = NEEDED[3:] if _is_deepspeed(folder) else NEEDED
    missing = [names[0] for names in needed if not _files(folder, names)]
    if missing:
        raise AdapterFileError(f"it has no {missing[0]}. It was not written to its end, or is not meant to go on from.")
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
    """The name of the step's folder is written to `latest` when every process has written its part of the step."""
    latest = folder / "latest"
    step = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    if not step or not (folder / step).is_dir():
        raise AdapterFileError(
            "DeepSpeed's `latest` is missing, or names no folder beside it, so it was not written to its end."
        )
    files = _files(folder, (f"{step}/*.pt",))
    if not any("model_states" in file.name for file in files):
        raise AdapterFileError(f"{step} has no model states. It was not written to its end.")
    for file in files:
        _check_end(file)
    return (
        f"it is DeepSpeed's: whether {step} has the part of every process cannot be told from here. It holds "
        f"{len(files)} files; compare with the number of processes."
    )


def _check_sharded(folder: Path) -> str | None:
    """torch writes `.metadata` when every process has written its shard."""
    sharded = sorted(
        {file.parent for file in folder.glob("*/*.distcp")} | {f.parent for f in folder.glob("*/.metadata")}
    )
    sharded += [entry for entry in folder.iterdir() if _SHARDED.fullmatch(entry.name) and entry not in sharded]
    for own in sharded:
        if not (own / ".metadata").is_file() or not (own / ".metadata").stat().st_size or not any(own.glob("*.distcp")):
            raise AdapterFileError(f"{own.name} has no .metadata, or no shard, so it was not written to its end.")
    if not sharded:
        return None
    return (
        f"{', '.join(own.name for own in sharded)} are FSDP's: whether the shard of every process is there and whole "
        "cannot be told from here."
    )


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """What was left in a temporary folder, whose name begins with a dot, is of no checkpoint."""
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
    """The header of safetensors says how long a file is; what torch saves is a zip file, whose directory comes last."""
    try:
        with safe_open(file, framework="pt") if file.suffix == ".safetensors" else zipfile.ZipFile(file):
            pass
    except (SafetensorError, zipfile.BadZipFile, OSError) as error:
        raise AdapterFileError(f"{file.name} is cut off ({error}).") from error


def _check_adapter(folder: Path) -> None:
    """The config is written last, and says what the weights are; other types of adapters say nothing of it."""
    if _check_json(folder / CONFIG_FILE).get("peft_type") == PEFT_TYPE:
        StoredConfig.from_pretrained(str(folder))
