"""Output folders that appear whole or not at all. For files, use `peft_lntune.storage.atomic.new_file`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from peft_lntune.errors import ConfigError

__all__ = ["new_folder"]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder to write into, and move it to `path` when the block ends.

    Args:
        path: the folder to make; it must be missing or empty.

    Yields:
        The folder to write into.

    Raises:
        ConfigError: `path` exists and is not an empty folder.
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
