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
from peft_lntune.errors import AdapterFileError, PeftLNTuneError
from peft_lntune.storage import WEIGHTS_FILE

__all__ = ["last_whole_checkpoint"]

_NAME = re.compile(r"checkpoint-(\d+)")
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

    Args:
        directory: the `output_dir` of the run; it need not be there yet.

    Returns:
        The folder of the checkpoint; None where there is none, and training starts from the beginning.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(last_whole_checkpoint(folder))
        None
    """
    for folder in sorted(_checkpoints(Path(directory)), key=_number, reverse=True):
        try:
            _check(folder)
        except PeftLNTuneError as error:
            warnings.warn(f"{folder} is passed over: {error}", stacklevel=2)
        else:
            return str(folder)
    return None


def _checkpoints(directory: Path) -> list[Path]:
    entries = directory.iterdir() if directory.is_dir() else ()
    return [entry for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()]


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _check(folder: Path) -> None:
    """Raise a `PeftLNTuneError` where a checkpoint is not whole."""
    missing = [names[0] for names in NEEDED if not _files(folder, names)]
    if missing:
        raise AdapterFileError(f"it has no {missing[0]}. It was not written to its end, or is not meant to go on from.")
    _check_json(folder / STATE_FILE)
    for file in _files(folder, ("*.pt", "*.pth", "*.bin")):
        _check_pickled(file)
    for file in _files(folder, ("*.safetensors", "*/*.safetensors")):
        _check_header(file)
    adapters = _files(folder, (WEIGHTS_FILE, CONFIG_FILE, f"*/{WEIGHTS_FILE}", f"*/{CONFIG_FILE}"))
    for own in sorted({file.parent for file in adapters}):
        _check_adapter(own)


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


def _check_pickled(file: Path) -> None:
    """What torch saves is a zip file, whose directory is written last."""
    try:
        zipfile.ZipFile(file).close()
    except (zipfile.BadZipFile, OSError) as error:
        raise AdapterFileError(f"{file.name} is cut off ({error}).") from error


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file.name} is cut off ({error}).") from error


def _check_adapter(folder: Path) -> None:
    """The config is written last, and says what the weights are; other types of adapters say nothing of it."""
    if _check_json(folder / CONFIG_FILE).get("peft_type") == PEFT_TYPE:
        StoredConfig.from_pretrained(str(folder))
