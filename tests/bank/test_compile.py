"""A compiled model takes the rows of a route as inputs of its graph: other adapters are no reason to compile again."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from peft_lntune import AdapterBank, LNTuningConfig
from peft_lntune.errors import RoutingError
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


class Relative(nn.Module):
    """A norm over a table of as many rows as there are samples."""

    def __init__(self, computed):
        super().__init__()
        self.norm, self.positions, self.table = nn.LayerNorm(4), nn.LayerNorm(4), nn.Embedding(3, 4)
        self.computed = computed

    def forward(self, x):
        table = 2 * self.table.weight if self.computed else self.table.weight
        return self.norm(x) + self.positions(table)[: x.shape[1]]


@pytest.mark.end_to_end
@pytest.mark.parametrize("computed", [False, True])
def test_a_table_that_all_samples_share_is_refused(computed):
    """A compiled model is not measured: a parameter is seen as one, other tables by an earlier measurement."""
    torch.manual_seed(0)
    tuned, x = get_peft_model(Relative(computed).eval(), LNTuningConfig(init_weights=False)), torch.randn(3, 2, 4)
    bank, model = AdapterBank(tuned), tuned.get_base_model()
    bank.add("a", (tuned, "default"))
    bank.attach()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), bank.route(["a", "__base__", "a"]):
        if computed:
            with pytest.raises(RoutingError, match="a table that all samples share"):
                model(x)
        with pytest.raises(RoutingError, match="all samples share"):
            compiled(x)
