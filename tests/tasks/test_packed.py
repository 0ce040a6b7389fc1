"""Packed rows among many tasks: each task has the loss and the gradient of its sequences as rows of their own."""

import copy

import pytest
import torch
import transformers as hf

from peft_lntune import ManyTasks
from peft_lntune.errors import DataError, RoutingError
from tests.adapted import adapt, build

SEQUENCES = [[5, 6, 7], [8, 9, 10, 11], [5, 6], [9, 9, 3, 4]]
NAMES = ["a", "b", "b", "a"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # the same sums in another order
PACKED = hf.DataCollatorWithFlattening()([{"input_ids": ids} for ids in SEQUENCES]) | {"use_cache": False}


def padded():
    """The same sequences, a row each."""
    size = max(map(len, SEQUENCES))
    ids = torch.tensor([ids + [0] * (size - len(ids)) for ids in SEQUENCES])
    mask = torch.tensor([[1] * len(ids) + [0] * (size - len(ids)) for ids in SEQUENCES])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}


def learned(model, batch, loss=None, names=NAMES):
    """Losses and gradients of one step, on a copy."""
    with ManyTasks(copy.deepcopy(model)) as tasks:
        with tasks.route(names):
            losses = tasks.losses(tasks.model(**batch), batch, loss)
        sum(losses.values()).backward()
        gradients = torch.cat([stack.values.grad.flatten(1) for stack in tasks._norms.stacks], 1)
    return {name: value.detach() for name, value in losses.items()}, gradients


def recompute(model, options):
    base = model.get_base_model()
    name = "activation_checkpointing_enable"  # since transformers 5.23
    (getattr(base, name) if hasattr(base, name) else base.gradient_checkpointing_enable)(options)


def tuned():
    return adapt(build("llama"), "a", "b", task_type="CAUSAL_LM").train()


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_as_rows_of_their_own(checkpointing):
    model = tuned()
    if checkpointing is not None:
        recompute(model, checkpointing)
        model.enable_input_require_grads()
    losses, gradients = learned(model, PACKED)
    wanted, wanted_gradients = learned(model, padded())
    assert losses.keys() == {"a", "b"}
    torch.testing.assert_close(losses, wanted, **CLOSE)
    torch.testing.assert_close(gradients, wanted_gradients, **CLOSE)
    assert gradients.abs().amax(1).min() > 1e-3


def test_a_loss_of_the_users():
    """It is given padded rows, with a mask."""

    def loss(outputs, batch):
        each = outputs["logits"].logsumexp(-1) * batch["attention_mask"]
        return each.sum() / batch["attention_mask"].sum()

    losses, gradients = learned(tuned(), PACKED, loss)
    wanted, wanted_gradients = learned(tuned(), padded(), loss)
    torch.testing.assert_close(losses, wanted, **CLOSE)
    torch.testing.assert_close(gradients, wanted_gradients, **CLOSE)


def test_no_token_is_predicted_from_another_sequence():
    """The model's own loss does so where the first label of a sequence is not ignored."""
    model = tuned()
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(100)  # so that losses differ
    batch = PACKED | {"labels": PACKED["input_ids"]}
    wanted, wanted_gradients = learned(model, padded())
    losses, gradients = learned(model, batch)
    torch.testing.assert_close(losses, wanted, **CLOSE)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-4, atol=1e-4)
    assert abs(model(**batch).loss.item() - model(**PACKED).loss.item()) > 0.01


def test_labels_have_one_entry_per_token():
    with ManyTasks(tuned()) as tasks, tasks.route(NAMES), pytest.raises(DataError, match="one per token, but got"):
        tasks.losses(tasks.model(**PACKED), PACKED | {"labels": torch.zeros(1, 2)}, lambda outputs, batch: None)


def test_several_batches_in_one_route_cannot_be_computed_again():
    model = tuned()
    recompute(model, {"use_reentrant": False})
    other = hf.DataCollatorWithFlattening()([{"input_ids": ids[::-1]} for ids in SEQUENCES]) | {"use_cache": False}
    with ManyTasks(model) as tasks:
        with tasks.route(NAMES):
            total = sum(tasks.model(**batch).loss for batch in (PACKED, other))
        with pytest.raises(RoutingError, match="several batches of packed rows"):
            total.backward()
