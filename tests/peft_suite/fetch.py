"""The tests of the installed PEFT, taken from its source distribution."""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peft_suite"
PACKAGE = "peft_tests"  # not `tests`, which is a name that half of all projects use


class SuiteUnavailableError(RuntimeError):
    """PEFT's tests could not be had; the message says why and how to supply them by hand."""


def fetch_tests(cache: Path = CACHE) -> Path:
    """The folder to put on the import path so that `peft_tests` is PEFT's test package.

    Args:
        cache: kept between runs; the second call with the same PEFT touches no network.

    Raises:
        SuiteUnavailableError: pip found no source distribution of exactly this version, or it holds no tests.
    """
    release = version("peft")
    root = cache / f"peft-{release}"
    if not (root / PACKAGE).is_dir():
        archive = cache / f"peft-{release}.tar.gz"
        if not archive.is_file():
            download(release, cache)
        unpack(archive, release, root)
    return root


def download(release: str, folder: Path) -> None:
    """Let pip put `peft-<release>.tar.gz` in `folder`, from whatever index pip is set up with.

    pip insists on asking setuptools for the metadata of a source distribution, but builds nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"peft=={release}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise SuiteUnavailableError(
            f"pip could not download the source distribution of peft {release}, whose tests are run here.\n"
            f"{reason}\nTo go on without an index, put peft-{release}.tar.gz into {folder}."
        )


def unpack(archive: Path, release: str, root: Path) -> None:
    """Extract the test modules of `archive` to `root/peft_tests`; an interrupted call leaves nothing behind."""
    root.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"peft-{release}/tests/"
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                if member.name.startswith(prefix) and member.name.endswith(".py"):
                    inside = member.name.removeprefix(prefix)
                    tar.extract(member.replace(name=f"{PACKAGE}/{inside}"), scratch, filter="data")
        package = Path(scratch, PACKAGE)
        if not package.is_dir():
            raise SuiteUnavailableError(
                f"{archive.name} holds no file under {prefix}: this PEFT ships without its tests."
            )
        (package / "__init__.py").touch()  # the modules import one another relatively; the sdist leaves this file out
        Path(scratch, "pytest.ini").write_text("[pytest]\n")  # so that pytest does not find our own, stricter settings
        root.mkdir(exist_ok=True)
        for part in ("pytest.ini", PACKAGE):  # the package last: its presence means that all is there
            move(Path(scratch, part), root / part)


def move(source: Path, target: Path) -> None:
    """Put `source` in its place, unless another run has just done the same."""
    try:
        os.replace(source, target)
    except OSError:
        if not target.exists():
            raise
