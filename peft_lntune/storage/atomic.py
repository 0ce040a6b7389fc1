"""Files that appear whole or not at all, and leave nothing behind where a process was killed while it wrote them."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["STAGING", "new_file", "put", "staging"]

STAGING = ".lntune-writing-"
"""How the names begin of folders in which files are written that have not taken their places yet."""

_DAY = 24 * 60 * 60


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """A file to write, of the same name elsewhere, which takes its place at `path` when all of it is written.

    Who has the old file open keeps it. Where the block raises or the process is killed, the old file stays.

    Args:
        path: of the file; its folder is made if it is missing.

    Example:
        >>> import tempfile
        >>> with new_file(Path(tempfile.mkdtemp(), "table.csv")) as made:
        ...     _ = made.write_text("norm,score")
    """
    target = Path(path)
    with staging(target.parent) as folder:
        made = folder / target.name
        yield made
        put(made, target)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, made if it is missing, for files that `put` then moves to their places.

    It is gone afterwards. Those that killed processes have left are cleared first: each is locked by the process that
    made it, and a lock ends with its process. Where the file system has no locks, those older than a day are cleared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.glob(f"{STAGING}*"):
        _clear_if_left(entry)
    with ExitStack() as stack:
        made = Path(mkdtemp(dir=folder, prefix=STAGING))
        while stack.enter_context(_locked(made)) is False or not made.is_dir():
            made = Path(mkdtemp(dir=folder, prefix=STAGING))  # another process found that one before it was locked
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def put(made: Path, target: Path) -> None:
    """Move a finished file to its place, in one step, with the mode that a file has which is simply opened for writing.

    safetensors and `tempfile` make files that nobody else may read.

    Args:
        made: the file, inside a folder that `staging` gave.
        target: its place, on the same file system.
    """
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.chmod(_usual_mode(made.parent))
    os.replace(made, target)


def _usual_mode(folder: Path) -> int:
    """Asked of a new file: the umask can only be read by setting it, which other threads would notice."""
    probe = folder / f"{STAGING}mode"
    opened = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return os.fstat(opened).st_mode & 0o777
    finally:
        os.close(opened)
        probe.unlink()


def _clear_if_left(entry: Path) -> None:
    with _locked(entry) as held:
        try:
            old = time.time() - entry.stat().st_mtime > _DAY
        except OSError:
            return  # its own process has just finished
        if held or (held is None and old):
            shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """A lock on a folder: True; False where another process has it; None where there are no locks."""
    opened = None
    held: bool | None = None
    if fcntl is not None:
        try:
            opened = os.open(folder, os.O_RDONLY)
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError as error:
            held = False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    try:
        yield held
    finally:
        if opened is not None:
            os.close(opened)
