"""Edits of byte ranges: a copy, or in place with a way back that survives being killed at any moment."""

import json
import os
import signal
import subprocess
import sys

import pytest

from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.storage import byte_edits
from peft_lntune.storage.byte_edits import ByteEdit, edit_in_place, undo_edits, undo_file, write_edited

EDITS = [ByteEdit(70_000, b"old norm", b"new norm"), ByteEdit(100, b"\x00" * 4, b"gain")]


@pytest.fixture
def file(tmp_path):
    content = bytearray(80_000)
    content[70_000:70_008] = b"old norm"
    (tmp_path / "model.gguf").write_bytes(content)
    return tmp_path / "model.gguf"


def edited(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[70_000:70_008], changed[100:104] = b"new norm", b"gain"
    return bytes(changed)


def test_a_copy(file, tmp_path):
    before = file.read_bytes()
    write_edited(file, tmp_path / "copy", EDITS)
    assert (tmp_path / "copy").read_bytes() == edited(before)
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        write_edited(file, tmp_path / "copy", EDITS)


def test_in_place_and_back(file):
    before = file.read_bytes()
    undo = edit_in_place(file, EDITS, "adapter a")
    assert file.read_bytes() == edited(before)
    with pytest.raises(ConfigError, match=r"already holds adapter a.*--undo"):
        edit_in_place(file, EDITS, "adapter b")
    assert undo_edits(file) == "adapter a"
    assert file.read_bytes() == before
    assert not undo.exists()
    with pytest.raises(ConfigError, match="nothing to undo"):
        undo_edits(file)


@pytest.mark.parametrize("edits", [[ByteEdit(0, b"x", b"y")], [EDITS[0], ByteEdit(0, b"x", b"y")]])
def test_other_bytes_than_expected(file, tmp_path, edits):
    before = file.read_bytes()
    with pytest.raises(AdapterFileError, match="was changed while it was read, at byte 0"):
        edit_in_place(file, edits, "a")
    with pytest.raises(AdapterFileError, match="was changed while it was read"):
        write_edited(file, tmp_path / "copy", edits)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_edits_that_overlap_or_change_the_length(file):
    with pytest.raises(ValueError, match="must not overlap"):
        edit_in_place(file, [ByteEdit(0, bytes(4), b"abcd"), ByteEdit(2, bytes(4), b"abcd")], "a")
    with pytest.raises(ValueError, match="must keep the length"):
        edit_in_place(file, [ByteEdit(0, bytes(4), b"abc")], "a")


class Killed(BaseException):
    """Ends a call where a killed process would end: nothing between here and the test catches it."""


def kill_in(monkeypatch, moment: str) -> None:
    write = byte_edits._write

    def killed(path, ranges):
        offset, content = ranges[0]
        done = {
            "undo file": [],
            "first byte": [(offset, content[:1])],
            "half a range": [(offset, content[:4])],
            "last byte": ranges,
        }
        write(path, done[moment])
        raise Killed

    monkeypatch.setattr(byte_edits, "_write", killed)


@pytest.mark.parametrize("moment", ["undo file", "first byte", "half a range", "last byte"])
@pytest.mark.parametrize("call", ["edit", "undo"])
def test_killed_at_any_moment(file, moment, call, monkeypatch):
    before = file.read_bytes()
    if call == "undo":
        edit_in_place(file, EDITS, "a")
    with monkeypatch.context() as patch:
        kill_in(patch, moment)
        with pytest.raises(Killed):
            undo_edits(file) if call == "undo" else edit_in_place(file, EDITS, "a")
    assert undo_file(file).is_file()
    undo_edits(file)
    assert file.read_bytes() == before


@pytest.mark.end_to_end
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_real_process_is_killed(file):
    """SIGKILL between the undo file and the last byte, with locks and temporary folders as they are."""
    before = file.read_bytes()
    program = f"""
import os, signal
from pathlib import Path
from peft_lntune.storage import byte_edits
from tests.storage.test_byte_edits import EDITS

write = byte_edits._write

def killed(path, ranges):
    write(path, ranges[:1])
    os.kill(os.getpid(), signal.SIGKILL)

byte_edits._write = killed
byte_edits.edit_in_place(Path({str(file)!r}), EDITS, "a")
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert file.read_bytes() not in (before, edited(before))
    undo_edits(file)
    assert file.read_bytes() == before


def test_a_process_killed_before_the_undo_file(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(byte_edits, "new_file", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edit_in_place(file, EDITS, "a")
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "a byte", "no checksum", "newer"])
def test_a_damaged_undo_file(file, damage):
    undo = edit_in_place(file, EDITS, "a")
    content, now = undo.read_text(), file.read_bytes()
    record = json.loads(content)
    if damage == "newer":
        record["format_version"] = 2
        record["checksum"] = byte_edits._checksum(record)
    if damage == "no checksum":
        del record["checksum"]
    if damage == "a byte":
        record["edits"][0][1] = "AAAAAAAAAAA="
    undo.write_text(content[:-5] if damage == "cut" else json.dumps(record))
    said = "is of format 2, and this version reads 1" if damage == "newer" else "is damaged"
    with pytest.raises(AdapterFileError, match=said):
        undo_edits(file)
    assert file.read_bytes() == now


@pytest.mark.parametrize(("at", "said"), [(5, "first 65,536 bytes"), (70_001, "at 70,000"), (None, "80,001 bytes")])
def test_the_undo_file_of_another_file(file, at, said):
    edit_in_place(file, EDITS, "a")
    content = bytearray(file.read_bytes())
    if at is None:
        content.append(0)
    else:
        content[at] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(AdapterFileError, match=f"not the file that .* belongs to: .*{said}"):
        undo_edits(file)
    assert file.read_bytes() == content


@pytest.mark.skipif(os.name == "nt", reason="no locks of files")
def test_two_processes(file):
    with byte_edits.locked(file), pytest.raises(ConfigError, match="another process"):
        edit_in_place(file, EDITS, "a")
    assert not undo_file(file).exists()
