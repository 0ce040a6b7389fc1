"""What users import, and nothing else, stands in the package; each name says what it is."""

import importlib
import inspect
from pathlib import Path

import pytest

import peft_lntune

MODULES = sorted(
    ".".join(["peft_lntune", *file.relative_to(Path(peft_lntune.__file__).parent).with_suffix("").parts])
    for file in Path(peft_lntune.__file__).parent.rglob("*.py")
)


def modules() -> list[str]:
    return [name.removesuffix(".__init__") for name in MODULES]


def test_every_public_name_is_there_once() -> None:
    assert len(set(peft_lntune.__all__)) == len(peft_lntune.__all__)
    assert all(hasattr(peft_lntune, name) for name in peft_lntune.__all__)


def test_what_is_visible_is_public_or_a_room() -> None:
    visible = {name for name in vars(peft_lntune) if not name.startswith("_")}
    rooms = {name.split(".")[1] for name in modules() if "." in name}
    assert visible - rooms <= set(peft_lntune.__all__)


def test_every_public_name_says_what_it_is() -> None:
    silent = [n for n in peft_lntune.__all__ if n != "__version__" and not inspect.getdoc(getattr(peft_lntune, n))]
    assert silent == []


def test_every_error_can_be_caught_by_a_public_name() -> None:
    errors = importlib.import_module("peft_lntune.errors")
    assert all(issubclass(getattr(errors, name), peft_lntune.PeftLNTuneError) for name in errors.__all__)


@pytest.mark.parametrize("name", modules())
def test_all_lists_what_a_module_defines(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    listed = getattr(module, "__all__", [])
    assert all(hasattr(module, public) for public in listed)
    assert sorted(listed) == sorted(set(listed))
