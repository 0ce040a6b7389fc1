"""A folder that a command writes appears whole or not at all. For a file see `storage.new_file`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from peft_lntune.errors import ConfigError

__all__ = ["new_folder"]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place at `path` when all is written.

    Raises:
        ConfigError: there is something at `path` already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not an empty folder. Give a new one; nothing is overwritten.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        made = Path(folder, path.name)
        made.mkdir()
        yield made
        if path.exists():
            path.rmdir()
        os.replace(made, path)
