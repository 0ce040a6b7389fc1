"""The code that people read first runs: the README's blocks, and the examples in the docstrings."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import peft_lntune

ROOT = Path(__file__).parent.parent
# What every example may use without importing it, as in the code around it.
GLOBALS = {"torch": torch, "nn": torch.nn}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = ["peft_lntune"] + [m.name for m in pkgutil.walk_packages(peft_lntune.__path__, "peft_lntune.")]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_readme_runs_as_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the README saves adapters into the current folder
    blocks = code_blocks((ROOT / "README.md").read_text())
    assert len(blocks) >= 3
    session: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), session)
    assert list(tmp_path.iterdir()), "the README says that it saves an adapter"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    torch.manual_seed(0)
    found = doctest.testmod(importlib.import_module(name), extraglobs=GLOBALS, optionflags=FLAGS)
    assert not found.failed


def test_public_names_have_docstrings() -> None:
    for name in peft_lntune.__all__:
        thing = getattr(peft_lntune, name)
        assert isinstance(thing, str) or (thing.__doc__ or "").strip(), name


def test_links_lead_somewhere() -> None:
    copies = ("_build", "api", "inside", "project", "results")  # what `make docs` makes of other files
    pages = [page for page in ROOT.glob("docs/**/*.md") if page.relative_to(ROOT / "docs").parts[0] not in copies]
    for page in [*ROOT.glob("*.md"), *pages, *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
