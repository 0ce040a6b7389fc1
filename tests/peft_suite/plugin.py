"""A pytest plugin that runs PEFT's generic tests for one config class, named by `--tuner`, and no others."""

import contextlib
import importlib
import json
from collections.abc import Iterator

import pytest

from .rows import LEFT_OUT, OPENED, RULES, Tuner
from .stand_ins import install_stand_ins

TUNER = pytest.StashKey[Tuner]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tuner", required=True, metavar="MODULE:CLASS", help="the config class under test")
    parser.addoption("--tuner-kwargs", default="{}", metavar="JSON", help="what it is always called with")


def pytest_configure(config: pytest.Config) -> None:
    module, _, name = config.getoption("--tuner").partition(":")
    cls = getattr(importlib.import_module(module), name)
    config.stash[TUNER] = Tuner(cls, json.loads(config.getoption("--tuner-kwargs")))
    install_stand_ins()
    from peft_tests import testing_utils

    # PEFT's own goes online at a model's first use; the test modules import the name from here.
    testing_utils.hub_online_once = contextlib.nullcontext


@pytest.fixture(scope="session")
def tuner(pytestconfig: pytest.Config) -> Tuner:
    """The config class under test, for the checks of our own."""
    return pytestconfig.stash[TUNER]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the tables of methods before pytest reads them."""
    marks = metafunc.definition.own_markers
    for index, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names, rows = mark.args
        key = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
        rule = RULES.get(key)
        ours = rule(list(rows), metafunc.config.stash[TUNER]) if rule else None
        if ours:
            marks[index] = pytest.mark.parametrize(names, ours).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that were given our class, and those of our own."""
    cls = config.stash[TUNER].cls
    kept = [item for item in items if isinstance(item, pytest.Function) and _is_ours(item, cls)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _is_ours(item: pytest.Function, cls: type) -> bool:
    if "tuner" in item.fixturenames:
        return True
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if item.originalname in LEFT_OUT:
        return False
    return any(value is cls or isinstance(value, cls) for value in given.values())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    """Open the tests that ask for a method by name."""
    from peft_tests import testing_common

    cls = item.config.stash[TUNER].cls
    with pytest.MonkeyPatch.context() as patch:
        for name in OPENED.get(item.originalname, ()):
            for module in (item.module, testing_common):
                patch.setattr(module, name, cls, raising=False)
        # Skips all methods but four on GPT-2, for Conv1D; a norm, and a delta on any weight, has no such limit.
        patch.setattr(testing_common, "_skip_if_conv1d_not_supported", lambda *args: None)
        # Meant to skip BEFT, this asks isinstance of a class and so skips every method on Llama and Gemma.
        if hasattr(item.module, "check_beft_config"):
            patch.setattr(item.module, "check_beft_config", lambda *args: None)
        return (yield)
