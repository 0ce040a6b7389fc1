"""A compiled model takes the rows of a route as inputs of its graph: other adapters are no reason to compile again."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.adapted import inputs
from tests.bank.banked import CLOSE, banked, routed

ROUTES = [["a", "b", "c"], ["b", "__base__", "a"], ["c", "c", "c"], ["__base__"] * 3, ["a", "a", "b"]]


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "family",
    ["bert-classifier", "llama", "t5", "roberta-classifier"],
)
def test_other_adapters_are_no_reason_to_compile_again(family):
    options = {"task_type": "SEQ_CLS"} if "classifier" in family else {}
    tuned, bank = banked(family, "a", "b", "c", **options)
    model, batch = tuned.get_base_model(), inputs(family)
    expected = [routed(bank, model, batch, names) for names in ROUTES]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names, said in zip(ROUTES, expected, strict=True):
        torch.testing.assert_close(routed(bank, compiled, batch, bank.index(names)), said, **CLOSE)
        torch.testing.assert_close(routed(bank, compiled, batch, names), said, **CLOSE)
    assert counter.frame_count == 1
    bank.add_many({str(number): (tuned, "b") for number in range(2000)})  # the stacks have grown
    names = ["7", "a", "__base__"]
    expected = routed(bank, model, batch, names)
    torch.testing.assert_close(routed(bank, compiled, batch, names), expected, **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.end_to_end
def test_each_number_of_rows_is_compiled_once():
    """Also where Dynamo has made a symbol of it: it does so when it sees a second one."""
    tuned, bank = banked("bert", "a", "b")
    model = tuned.get_base_model()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in (["a", "b", "a"], ["b", "a"], ["b", "b", "__base__"], ["a", "a"]):
        batch = inputs("bert", batch=len(names))
        torch.testing.assert_close(routed(bank, compiled, batch, names), routed(bank, model, batch, names), **CLOSE)
    assert counter.frame_count == 2
