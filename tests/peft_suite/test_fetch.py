"""Getting PEFT's tests: what is unpacked, and what is said when they cannot be had."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from . import fetch
from .fetch import SuiteUnavailableError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fetch, "version", lambda name: "9.9.9")
    return tmp_path / "cache"


def write_archive(cache: Path, names: list[str]) -> None:
    cache.mkdir()
    with tarfile.open(cache / "peft-9.9.9.tar.gz", "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"\n"))


def test_only_the_tests_are_unpacked(cache: Path) -> None:
    write_archive(cache, ["peft-9.9.9/tests/test_a.py", "peft-9.9.9/src/peft/config.py", "peft-9.9.9/tests/data.bin"])
    root = fetch.fetch_tests(cache)
    assert sorted(path.name for path in root.rglob("*")) == ["__init__.py", "peft_tests", "pytest.ini", "test_a.py"]
    (cache / "peft-9.9.9.tar.gz").unlink()
    assert fetch.fetch_tests(cache) == root  # the second call needs nothing


def test_a_member_that_leaves_the_folder_is_refused(cache: Path) -> None:
    write_archive(cache, ["peft-9.9.9/tests/../../outside.py"])
    with pytest.raises(tarfile.OutsideDestinationError, match="outside the destination"):
        fetch.fetch_tests(cache)
    assert not list(cache.rglob("outside.py"))


def test_an_archive_without_tests_is_named(cache: Path) -> None:
    write_archive(cache, ["peft-9.9.9/setup.py"])
    with pytest.raises(SuiteUnavailableError, match=r"peft-9\.9\.9\.tar\.gz holds no file under peft-9\.9\.9/tests/"):
        fetch.fetch_tests(cache)


def test_a_failed_download_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: No matching distribution found")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **kwargs: failure)
    with pytest.raises(SuiteUnavailableError, match=r"(?s)No matching distribution.*put peft-9\.9\.9\.tar\.gz into"):
        fetch.fetch_tests(cache)
