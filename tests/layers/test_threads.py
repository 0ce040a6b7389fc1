"""Several threads may run one model: nothing of a forward pass is kept in the modules that the threads share."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.adapted import adapt, build, inputs, output


@pytest.fixture
def _frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads take turns inside a forward pass, not between two
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_frequent_switches")
@pytest.mark.parametrize("family", ["llama", "bert", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_get_the_same_answer(family: str, dtype: torch.dtype) -> None:
    peft_model, batch = adapt(build(family, dtype)), inputs(family, dtype)
    alone = output(peft_model, batch)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: output(peft_model, batch), range(60)))
    assert all(torch.equal(answer, alone) for answer in answers)


@pytest.mark.usefixtures("_frequent_switches")
def test_threads_share_a_full_delta() -> None:
    peft_model, batch = adapt(build("bert"), target_modules=["query", "LayerNorm"]), inputs("bert")
    alone = output(peft_model, batch)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: output(peft_model, batch), range(60)))
    assert all(torch.equal(answer, alone) for answer in answers)
