"""Edits of a few byte ranges in a large file: into a copy, or in place with a way back.

In place, the original bytes are first written to a file beside it, the undo file, which appears whole or not at all. A
process that is killed at any moment leaves either the original, or an undo file from which it is restored.
"""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.storage.atomic import locked, new_file

__all__ = ["UNDO", "ByteEdit", "edit_in_place", "refuse_edited", "undo_edits", "undo_file", "write_edited"]

UNDO = ".lntune-undo.json"
"""Ending of the name of an undo file, after the whole name of the edited file."""

_FORMAT = 1
_BEGINNING = 1 << 16  # identifies the file; in GGUF the metadata begins there


class ByteEdit(NamedTuple):
    """Bytes of a file and what replaces them.

    Attributes:
        offset: position of the first byte in the file.
        before: the bytes that are there.
        after: the new bytes, of the same length.
    """

    offset: int
    before: bytes
    after: bytes


def undo_file(file: str | os.PathLike) -> Path:
    """The path of the undo file of a file.

    Args:
        file: the edited file.

    Returns:
        A path in the same folder.

    Example:
        >>> undo_file("model.gguf").name
        'model.gguf.lntune-undo.json'
    """
    return Path(file).with_name(Path(file).name + UNDO)


def write_edited(source: str | os.PathLike, target: str | os.PathLike, edits: Sequence[ByteEdit]) -> None:
    """Copy a file with some of its bytes replaced. The copy appears whole or not at all.

    Args:
        source: the file; it is only read.
        target: the new file; it must not exist.
        edits: the byte ranges, which must not overlap.

    Raises:
        ConfigError: `target` exists.
        AdapterFileError: the source does not hold the bytes that the edits replace.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a").write_bytes(b"norm")
        >>> write_edited(folder / "a", folder / "b", [ByteEdit(1, b"o", b"0")])
        >>> (folder / "b").read_bytes()
        b'n0rm'
    """
    if Path(target).exists():
        raise ConfigError(f"{target} exists. Give a new path; nothing is overwritten.")
    with new_file(target) as made:
        shutil.copyfile(source, made)
        _check(made, edits)
        _write(made, [(edit.offset, edit.after) for edit in edits])


def edit_in_place(file: str | os.PathLike, edits: Sequence[ByteEdit], source: str) -> Path:
    """Replace bytes of a file in place, after its original bytes are safe in an undo file.

    A program that has the file mapped, such as a running server, sees the bytes change. Stop it first.

    Args:
        file: the file.
        edits: the byte ranges, which must not overlap.
        source: what the new bytes come from, for the message of a later call.

    Returns:
        The undo file.

    Raises:
        ConfigError: the file was edited before and not restored, or another process edits it now.
        AdapterFileError: the file does not hold the bytes that the edits replace. Nothing has changed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "model")
        >>> _ = file.write_bytes(b"norm")
        >>> _ = edit_in_place(file, [ByteEdit(1, b"o", b"0")], "an adapter")
        >>> file.read_bytes(), undo_edits(file), file.read_bytes()
        (b'n0rm', 'an adapter', b'norm')
    """
    path, undo = Path(file), undo_file(file)
    with _alone(path):
        refuse_edited(path)
        _check(path, edits)
        with new_file(undo) as made:
            made.write_text(json.dumps(_record(path, edits, source)), encoding="utf-8")
        _sync_folder(path.parent)  # the undo file must be on the disk before the first new byte
        _write(path, [(edit.offset, edit.after) for edit in edits])
    return undo


def undo_edits(file: str | os.PathLike) -> str:
    """Restore the bytes that `edit_in_place` replaced, and remove the undo file.

    It also restores a file whose edit, or whose restoring, was killed halfway.

    Args:
        file: the edited file.

    Returns:
        What the replaced bytes came from.

    Raises:
        ConfigError: there is no undo file, or another process edits the file now.
        AdapterFileError: the undo file is damaged, or the file was changed by something else. Nothing has changed.
    """
    path, undo = Path(file), undo_file(file)
    with _alone(path):
        if not undo.exists():
            raise ConfigError(f"there is nothing to undo: {undo} not found. {path} is as it was, or it was copied.")
        record = _read(undo)
        edits = [ByteEdit(at, base64.b64decode(old), base64.b64decode(new)) for at, old, new in record["edits"]]
        if path.stat().st_size != record["size"]:
            raise _changed(path, undo, f"it has {path.stat().st_size:,} bytes, and had {record['size']:,}")
        if _beginning(path, edits) != record["beginning"]:
            raise _changed(path, undo, f"its first {_BEGINNING:,} bytes differ")
        with path.open("rb") as opened:
            for edit in edits:
                opened.seek(edit.offset)
                now = opened.read(len(edit.before))
                # A killed write may have stopped anywhere, so each byte is either the old or the new one.
                if now not in (edit.before, edit.after) and any(
                    byte not in pair for byte, *pair in zip(now, edit.before, edit.after, strict=True)
                ):
                    raise _changed(path, undo, f"the bytes at {edit.offset:,} are neither the old nor the new ones")
        _write(path, [(edit.offset, edit.before) for edit in edits])
        undo.unlink()
    return str(record["source"])


def refuse_edited(file: str | os.PathLike) -> None:
    """Refuse a file that was edited in place and not restored.

    Args:
        file: the file.

    Raises:
        ConfigError: there is an undo file.
        AdapterFileError: there is one, and it is damaged.
    """
    undo = undo_file(file)
    if undo.exists():
        raise ConfigError(
            f"{file} already holds {_read(undo)['source']}, at least in part: {undo.name} has the original bytes. "
            "Restore them first: peft-lntune export --gguf FILE --undo."
        )


def _record(file: Path, edits: Sequence[ByteEdit], source: str) -> dict[str, Any]:
    """The content of an undo file."""
    record: dict[str, Any] = {
        "format_version": _FORMAT,
        "source": source,
        "size": file.stat().st_size,
        "beginning": _beginning(file, edits),
        "edits": [
            [edit.offset, base64.b64encode(edit.before).decode(), base64.b64encode(edit.after).decode()]
            for edit in edits
        ],
    }
    return {**record, "checksum": _checksum(record)}


def _read(undo: Path) -> dict[str, Any]:
    try:
        record = json.loads(undo.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise AdapterFileError(f"{undo} is damaged: {error}. Get a good copy of it, or of the model.") from error
    if not isinstance(record, dict) or record.get("checksum") != _checksum(record):
        raise AdapterFileError(
            f"{undo} is damaged or was edited: its checksum differs. Get a good copy of it, or of the model."
        )
    if record["format_version"] != _FORMAT:
        raise AdapterFileError(
            f"{undo} is of format {record['format_version']}, and this version reads {_FORMAT}. Upgrade peft-lntune."
        )
    return record


def _checksum(record: dict[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _beginning(file: Path, edits: Sequence[ByteEdit]) -> str:
    """Digest of the beginning of a file, without the bytes that are edited."""
    with file.open("rb") as opened:
        start = bytearray(opened.read(_BEGINNING))
    for edit in edits:
        inside = len(start[edit.offset : edit.offset + len(edit.before)])
        start[edit.offset : edit.offset + inside] = bytes(inside)
    return hashlib.sha256(start).hexdigest()


def _check(file: Path, edits: Sequence[ByteEdit]) -> None:
    ends = 0
    with file.open("rb") as opened:
        for edit in sorted(edits):
            if len(edit.before) != len(edit.after) or edit.offset < ends:
                raise ValueError(f"edits must keep the length and must not overlap: one at {edit.offset:,} does not")
            ends = edit.offset + len(edit.before)
            opened.seek(edit.offset)
            if opened.read(len(edit.before)) != edit.before:
                raise AdapterFileError(f"{file} was changed while it was read, at byte {edit.offset:,}. Try again.")


def _write(file: Path, ranges: Sequence[tuple[int, bytes]]) -> None:
    with file.open("r+b") as opened:
        for offset, content in ranges:
            opened.seek(offset)
            opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    with locked(file) as held:
        if held is False:
            raise ConfigError(f"another process of peft-lntune is changing {file}. Wait until it has finished.")
        yield


def _changed(file: Path, undo: Path, how: str) -> AdapterFileError:
    return AdapterFileError(
        f"{file} is not the file that {undo.name} belongs to: {how}. If the model was replaced on purpose, delete "
        f"{undo.name}."
    )
