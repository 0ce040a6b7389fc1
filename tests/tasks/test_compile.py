"""A compiled model trains other tasks in every batch without being compiled again."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from peft_lntune import ManyTasks
from tests.tasks.tasked import CLOSE, labelled, tasked


@pytest.mark.end_to_end
# torch looks for gradients on the inputs of a graph, and rows are none of its leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("family", ["bert-classifier", "llama"])
def test_other_tasks_are_no_reason_to_compile_again(family):
    peft_model = tasked(family)
    model, batch = peft_model.get_base_model(), labelled(family, 4, 0)
    with ManyTasks(peft_model) as tasks:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for names in (["a", "b", "a", "c"], ["c", "c", "a", "b"], ["b", "a", "a", "c"]):
            found = []
            for each in (model, compiled):
                with tasks.route(names):
                    losses = tasks.losses(each(**batch), batch)
                sum(losses.values()).backward()
                found.append([values.grad.clone() for _, values in tasks._norms.stacks])
                tasks._norms.forget()
            for eager, ours in zip(*found, strict=True):
                torch.testing.assert_close(ours, eager, **CLOSE)
        assert counter.frame_count == 1
