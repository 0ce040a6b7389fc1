"""What is built and said about the package: archives, long description, badges, citation."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import peft_lntune

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAPERS = {"2211.08682", "2403.20284", "2302.00378", "2004.14129"}
README = """# name

![badge](docs/badges/python.svg) ![other](docs/other.svg)

See [the `docs`](docs/a.md#part), [a part](#part) and [PEFT](https://example.org/peft).

![A plot](results/plot.png)

*The plot ([rows](results/rows.md)).*

```python
names[0](call)  # [not](a.link)
```
"""


def long_description(repository: str | None) -> str:
    return runpy.run_path(str(ROOT / "setup.py"))["long_description"](README, repository, "1.2")


def test_links_of_the_long_description_are_absolute():
    text = long_description("https://example.org/own")
    assert "[the `docs`](https://example.org/own/blob/v1.2/docs/a.md#part)" in text
    assert "[a part](https://example.org/own/blob/v1.2/README.md#part)" in text
    assert "![A plot](https://example.org/own/raw/v1.2/results/plot.png)" in text
    assert "[PEFT](https://example.org/peft)" in text
    assert "names[0](call)  # [not](a.link)" in text


def test_without_an_address_no_link_leads_nowhere():
    text = long_description(None)
    assert "See the `docs`, a part and [PEFT](https://example.org/peft)." in text
    assert not re.search(r"plot|badge|other", text)
    assert "names[0](call)  # [not](a.link)" in text


def test_badges_are_true():
    badges = {file.stem: re.findall(r"<title>(.*)</title>", file.read_text()) for file in ROOT.glob("docs/badges/*")}
    python = PROJECT["requires-python"].removeprefix(">=")
    assert badges == {"python": [f"python: {python}+"], "license": [f"license: {PROJECT['license']}"]}
    assert all(f"docs/badges/{name}.svg" in (ROOT / "README.md").read_text() for name in badges)


def test_the_citation_names_this_version_and_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (peft_lntune.__version__, PROJECT["license"])
    named = [item["value"] for paper in citation["references"] for item in paper["identifiers"]]
    assert {value.removeprefix("arXiv:") for value in named if value.startswith("arXiv:")} == PAPERS


@pytest.mark.end_to_end
def test_archives_hold_what_they_should(tmp_path):
    copied = tmp_path / "copy"
    copied.mkdir()
    for place in ROOT.iterdir():
        if place.is_file() and not place.name.startswith("."):
            shutil.copy(place, copied)
        elif place.name in ("benchmarks", "docs", "examples", "peft_lntune", "tests"):
            shutil.copytree(place, copied / place.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for folder in ("_build", "api", "inside", "project", "results", "jupyter_execute"):  # made by `make docs`
        shutil.rmtree(copied / "docs" / folder, ignore_errors=True)
    wanted = {str(file.relative_to(copied)) for file in copied.rglob("*") if file.is_file()}
    for make in ("build_sdist", "build_wheel", "build_editable"):
        (tmp_path / make).mkdir()
        code = f"from setuptools import build_meta; build_meta.{make}({str(tmp_path / make)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=copied, env={**os.environ, "PYTHONPATH": ""}, check=True)
    with tarfile.open(next((tmp_path / "build_sdist").iterdir())) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted <= held
    with zipfile.ZipFile(next((tmp_path / "build_wheel").iterdir())) as wheel:
        names = wheel.namelist()
    assert "peft_lntune/py.typed" in names
    beside = {"peft_lntune_cli.py", "peft_lntune_vllm.py"}  # must start without the imports of the package
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"peft_lntune", *beside}
    with zipfile.ZipFile(next((tmp_path / "build_editable").iterdir())) as wheel:
        # A path, and not a finder: type checkers read the one and not the other.
        paths = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".pth")]
    assert [Path(path.strip()) for path in paths] == [copied]
