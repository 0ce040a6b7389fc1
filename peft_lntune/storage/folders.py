"""Output folders that appear whole or not at all. For files, use `peft_lntune.storage.atomic.new_file`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from peft_lntune.errors import ConfigError

__all__ = ["check_new_folder", "new_folder"]


def check_new_folder(path: Path) -> None:
    """Refuse a folder that `new_folder` could not make, without making anything.

    Args:
        path: the folder.

    Raises:
        ConfigError: `path` exists and is not an empty folder, or its place cannot be written to.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not an empty folder. Give a new one; nothing is overwritten.")
    above = _existing(path)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{path} cannot be made: {above} is not a folder that can be written to. Give another path.")


def _existing(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder to write into, and move it to `path` when the block ends. If the block raises, nothing is left.

    Args:
        path: the folder to make, with the folders above it; it must be missing or empty.

    Yields:
        The folder to write into.

    Raises:
        ConfigError: `path` exists and is not an empty folder, or its place cannot be written to.
    """
    check_new_folder(path)
    with TemporaryDirectory(dir=_existing(path), prefix=f".{path.name}-") as folder:
        made = Path(folder, path.name)
        made.mkdir()
        yield made
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rmdir()
        os.replace(made, path)
