"""Every test starts seeded, on one thread, and without the Hub; what needs a newer transformers is skipped."""

import os
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub at import
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from peft_lntune.errors import UnsupportedError
from tests.cases import seed_cpu

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    seed_cpu(0)


def _and_what_came_before(error):
    """An error, and those during which it was raised: where a warning is awaited, its absence hides the refusal."""
    while error is not None:
        yield error
        error = error.__context__


@contextmanager
def _skipped_where_too_old():
    try:
        yield
    except (UnsupportedError, AssertionError, pytest.fail.Exception) as error:  # the last two where another was awaited
        for told in _and_what_came_before(error):
            _, found, reason = str(told).partition(f"transformers {transformers.__version__} does not ")
            if found:
                pytest.skip(found + reason.splitlines()[0].rstrip("'"))  # pytest quotes the message
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    with _skipped_where_too_old():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    with _skipped_where_too_old():
        return (yield)
