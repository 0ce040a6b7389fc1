"""Atomic writes: a file appears whole or not at all, and a killed process leaves nothing behind."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp

from peft_lntune.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["STAGING", "is_special", "locked", "new_file", "put", "staging"]

STAGING = ".lntune-writing-"
"""Prefix of the names of folders that hold files before they are moved to their places."""

_DAY = 24 * 60 * 60
_DEVICES = (Path("/dev"), Path("/dev/fd"))


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file of the same name elsewhere, and move it to `path` when the block ends.

    A process that has the old file open keeps reading it. If the block raises or the process is killed, the old file
    stays.

    Args:
        path: path of the file; its folder is made if it is missing.

    Yields:
        The path to write to.

    Raises:
        ConfigError: the path is a device or a pipe. Moving a file there would take its place.

    Example:
        >>> import tempfile
        >>> with new_file(Path(tempfile.mkdtemp(), "table.csv")) as made:
        ...     _ = made.write_text("norm,score")
    """
    target = Path(path)
    if is_special(target):
        raise ConfigError(
            f"{target} is a device or a pipe, and a file that appears whole would take its place. Give the path of an "
            "ordinary file."
        )
    with staging(target.parent) as folder:
        made = folder / target.name
        yield made
        put(made, target)


def is_special(path: Path) -> bool:
    """Whether a path is a device, a pipe or a socket, such as `/dev/stdout`, rather than a file or a folder.

    Args:
        path: the path.

    Returns:
        True also for links in `/dev` that lead to an ordinary file, because a file moved there would replace the link.
    """
    return (path.exists() and not path.is_file() and not path.is_dir()) or path.absolute().parent in _DEVICES


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Make a temporary folder inside `folder`, for files that `put` then moves to their places.

    The temporary folder is removed at the end. Folders left by killed processes are removed first: each is locked by
    the process that made it, and the lock ends with the process. On a file system without locks, folders older than a
    day are removed.

    Args:
        folder: the folder; made if it is missing.

    Yields:
        The temporary folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.glob(f"{STAGING}*"):
        _clear_if_left(entry)
    with ExitStack() as stack:
        made = Path(mkdtemp(dir=folder, prefix=STAGING))
        while stack.enter_context(locked(made)) is False or not made.is_dir():
            made = Path(mkdtemp(dir=folder, prefix=STAGING))  # another process removed the first before it was locked
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def put(made: Path, target: Path) -> None:
    """Move a finished file to its place in one step, with the mode of an ordinary new file.

    Without this, files made by safetensors and `tempfile` could not be read by other users.

    Args:
        made: the file, inside a folder from `staging`.
        target: its new path, on the same file system.
    """
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.chmod(_usual_mode(made.parent))
    os.replace(made, target)


def _usual_mode(folder: Path) -> int:
    """Mode of a new file. Reading the umask would mean setting it, which affects other threads."""
    probe = folder / f"{STAGING}mode"
    opened = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return os.fstat(opened).st_mode & 0o777
    finally:
        os.close(opened)
        probe.unlink()


def _clear_if_left(entry: Path) -> None:
    with locked(entry) as held:
        try:
            old = time.time() - entry.stat().st_mtime > _DAY
        except OSError:
            return  # its process has just removed it
        if held or (held is None and old):
            shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Lock a folder or a file inside this context against other calls of this function. The process holds the lock.

    Args:
        path: the folder or file.

    Yields:
        True; False if another process holds the lock; None if the path cannot be locked.
    """
    opened = None
    held: bool | None = None
    if fcntl is not None:
        try:
            opened = os.open(path, os.O_RDONLY)
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError as error:
            held = False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    try:
        yield held
    finally:
        if opened is not None:
            os.close(opened)
