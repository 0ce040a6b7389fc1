"""A compiled model trains other tasks in every batch without being compiled again."""

import pytest
import torch

from peft_lntune import ManyTasks
from tests.tasks.tasked import CLOSE, labelled, tasked


@pytest.mark.filterwarnings("ignore:`isinstance:DeprecationWarning", "ignore::UserWarning:torch.*")
@pytest.mark.parametrize("family", ["bert-classifier", "llama"])
def test_other_tasks_do_not_compile_again(family):
    model = tasked(family)
    batch = labelled(family, 4, 0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with ManyTasks(model) as tasks:
        compiled = torch.compile(model, backend=backend, fullgraph=False)
        compiled_once = 0
        for names in (["a", "b", "a", "c"], ["c", "c", "a", "b"], ["b", "a", "a", "c"]):
            found = []
            for each in (compiled, model):
                with tasks.route(names):
                    losses = tasks.losses(each(**batch), batch)
                sum(losses.values()).backward()
                found.append([values.grad.clone() for _, values in tasks._norms.stacks])
                tasks._norms.forget()
            for ours, eager in zip(*found, strict=True):
                torch.testing.assert_close(ours, eager, **CLOSE)
            compiled_once = compiled_once or len(graphs)
            assert len(graphs) == compiled_once > 0
