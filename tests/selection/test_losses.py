"""Losses in parts: of one row they are its own, of several what these rows have as a batch."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from peft_lntune.errors import UnsupportedError
from peft_lntune.selection.losses import IGNORED, LOSS_HEADS, grouped_losses, whole_loss
from peft_lntune.selection.own_loss import find_head


def case(name):
    """Outputs and a batch of five rows for a head; some labels do not count."""
    torch.manual_seed(0)
    logits = torch.randn(5, 3)
    if name == "classification":
        return {"logits": logits}, {"labels": torch.tensor([0, 2, -100, 1, 1])}
    if name in ("multi_label", "regression"):
        return {"logits": logits}, {"labels": torch.rand(5, 3).round()}
    if name == "question_answering":
        outputs = {"start_logits": torch.randn(5, 7), "end_logits": torch.randn(5, 7)}
        places = torch.tensor([[0, 3, 9, 1, 6], [1, 7, 9, 2, 6]])
        return outputs, {"start_positions": places[0], "end_positions": places[1]}
    labels = torch.randint(3, (5, 6))
    labels[torch.rand(5, 6) < 0.4] = -100
    return {"logits": torch.randn(5, 6, 3)}, {"labels": labels}


def rows(value, some):
    return {name: tensor[some] for name, tensor in value.items()}


@pytest.mark.parametrize("name", LOSS_HEADS)
def test_a_group_of_one_row_has_the_loss_of_the_row(name):
    outputs, batch = case(name)
    found = grouped_losses(LOSS_HEADS[name], outputs, batch, torch.arange(5), 5)
    torch.testing.assert_close(found, LOSS_HEADS[name].loss(outputs, batch))


@pytest.mark.parametrize("name", LOSS_HEADS)
def test_a_group_has_the_loss_of_its_rows_as_a_batch(name):
    outputs, batch = case(name)
    groups = [[0, 2, 4], [1, 3]]
    found = grouped_losses(LOSS_HEADS[name], outputs, batch, torch.tensor([0, 1, 0, 1, 0]), 3)
    alone = [whole_loss(LOSS_HEADS[name], rows(outputs, some), rows(batch, some)) for some in groups]
    torch.testing.assert_close(found[:2], torch.stack(alone))
    assert found[2] == 0


def test_over_tokens_and_positions_it_is_no_mean_of_rows():
    for name in ("token", "causal_lm", "question_answering", "classification"):
        outputs, batch = case(name)
        whole = whole_loss(LOSS_HEADS[name], outputs, batch)
        assert not torch.isclose(whole, LOSS_HEADS[name].loss(outputs, batch).mean())


def test_values_are_not_taken_for_classes():
    model = BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    )
    batch = {"input_ids": torch.randint(9, (4, 5)), "labels": torch.tensor([2.0, 3.0, 1.0, 5.0])}
    with torch.no_grad():
        assert find_head(model, model(**batch), batch).head.name == "regression"


def reported(name, dtype=torch.float32, spread=1.0, rows=3, more=0.0, **others):
    """Outputs with the loss of a head in a dtype, and a batch of 6 tokens per row."""
    torch.manual_seed(0)
    logits = (spread * torch.randn(rows, 6, 40)).to(dtype).requires_grad_()
    batch = {"labels": torch.randint(40, (rows, 6))}
    loss = whole_loss(LOSS_HEADS[name], {"logits": logits}, batch) + more
    return {"logits": logits, "loss": loss.to(dtype), **others}, batch


TOKEN_HEADS = ["token", "token_sum", "causal_lm", "causal_lm_sum"]


@pytest.mark.parametrize("name", TOKEN_HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_decides_where_losses_differ_by_less_than_rounding(name, dtype):
    outputs, batch = reported(name, dtype, spread=1e-5 if dtype.itemsize > 2 else 1e-2)
    found = find_head(torch.nn.Identity(), outputs, batch)
    assert found.head.name == name
    assert found.settled


def test_a_loss_near_a_known_one_is_another_loss():
    outputs, batch = reported("causal_lm", more=5e-4)
    with pytest.raises(UnsupportedError, match="equals none"):
        find_head(torch.nn.Identity(), outputs, batch)
    outputs, batch = reported("causal_lm", torch.bfloat16)
    outputs["loss"] = outputs["loss"] + 1e-2 * (outputs["logits"] - outputs["logits"].detach()).sum()
    with pytest.raises(UnsupportedError, match="equals none"):  # of this value, but of another gradient
        find_head(torch.nn.Identity(), outputs, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_of_routers_is_refused(dtype):
    routers = torch.tensor(2.0)
    outputs, batch = reported("causal_lm", dtype, spread=1e-2, more=1e-3 * routers, aux_loss=routers)
    with pytest.raises(UnsupportedError, match=r"routers \(aux_loss\).*output_router_logits=False"):
        find_head(torch.nn.Identity(), outputs, batch)
    outputs, batch = reported("causal_lm", aux_loss=routers)  # with a weight of 0 in the loss
    assert find_head(torch.nn.Identity(), outputs, batch).head.name == "causal_lm"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_several_losses_are_not_guessed_from(context):
    with context():
        outputs, batch = reported("causal_lm", spread=0.0)
        with pytest.raises(UnsupportedError, match=r"equals several .* \(token, causal_lm\)"):
            find_head(torch.nn.Identity(), outputs, batch)
        outputs, batch = reported("causal_lm")
        assert find_head(torch.nn.Identity(), outputs, batch).settled


def test_the_mean_and_the_sum_over_one_token_are_told_apart_later():
    outputs, batch = reported("token", rows=1)
    batch["labels"][:, 1:] = -100
    outputs["loss"] = whole_loss(LOSS_HEADS["token_sum"], outputs, batch)
    assert not find_head(torch.nn.Identity(), outputs, batch).settled


@pytest.mark.parametrize("name", ["token", "causal_lm"])
def test_many_classes_cost_no_digits(name):
    """As many as words: torch is a hundred roundings off where classes are not along the last axis."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(12, 4, 49_152)
    labels = torch.randint(49_152, (12, 4))
    labels[:, :3] = IGNORED  # one token each, so that no mean hides what is lost
    head, batch = LOSS_HEADS[name], {"labels": labels}
    exact, found = (head.loss({"logits": each}, batch) for each in (logits.double(), logits))
    largest = logits.abs().max()  # what is subtracted from a logarithm of its size
    assert ((found - exact).abs() <= 8 * torch.finfo(torch.float32).eps * (exact + largest)).all()
