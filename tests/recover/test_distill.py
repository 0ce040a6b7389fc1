"""Training on the logits of a teacher."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_lntune import LNTuningConfig
from peft_lntune.errors import ConfigError, DataError, UnsupportedError
from peft_lntune.recover import distill, divergence, logits_of
from tests.recover.pairs import answers_of, rounded, rows, teacher_of


def adapted(student, config=None):
    return get_peft_model(student, config or LNTuningConfig(task_type="CAUSAL_LM"))


def tuned(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("config", [None, LoraConfig(target_modules="all-linear")], ids=["norms", "lora"])
def test_it_comes_nearer_to_the_teacher(config):
    teacher = teacher_of()
    model, batches = adapted(rounded(teacher), config), rows()
    losses = distill(model, answers_of(teacher), batches, steps=24, learning_rate=1e-2)
    assert len(losses) == 24
    assert losses[0] == pytest.approx(float(divergence(*_logits(rounded(teacher), teacher, batches[0]))), rel=1e-5)
    # The first and the last eight steps have the same batches.
    assert sum(losses[16:]) < 0.9 * sum(losses[:8])


@torch.no_grad()
def _logits(student, teacher, batch):
    return logits_of(student, batch), logits_of(teacher, batch)


def test_only_what_is_trained_changes_and_the_mode_stays():
    teacher = teacher_of()
    model = adapted(rounded(teacher)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    distill(model, answers_of(teacher), rows(), steps=2)
    assert model.training
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(tuned(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_order_of_batches_and_their_repetition():
    teacher, seen = teacher_of(), []
    batches = rows(3)

    def answer(batch):
        seen.append(next(i for i, one in enumerate(batches) if one is batch))
        return logits_of(teacher, batch)

    distill(adapted(rounded(teacher)), answer, batches, steps=5)
    assert seen == [0, 1, 2, 0, 1]


def test_padding_does_not_count():
    teacher, found = teacher_of(), []
    for filler in (5, 9):
        batch = {"input_ids": torch.arange(3, 13)[None].repeat(2, 1), "attention_mask": torch.ones(2, 10)}
        batch["input_ids"][1, 6:], batch["attention_mask"][1, 6:] = filler, 0
        model = adapted(rounded(teacher))
        distill(model, answers_of(teacher), [batch], steps=2)
        found.append(tuned(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_what_is_not_finite_leaves_no_trace(of):
    teacher, calls = teacher_of(), []
    model = adapted(rounded(teacher)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.01)
    before = tuned(model)

    def answer(batch):
        calls.append(1)
        logits = logits_of(teacher, batch)
        if len(calls) == 3 and of == "student":
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(torch.inf)
        return logits * (torch.nan if len(calls) == 3 and of == "teacher" else 1)

    with pytest.raises(DataError, match=r"divergence in step 3 is not finite\. Lower the learning rate"):
        distill(model, answer, rows(), steps=5)
    assert all(torch.equal(value, before[name]) for name, value in tuned(model).items())
    assert model.training


def test_what_cannot_be_trained():
    teacher = teacher_of()
    model = adapted(rounded(teacher))
    with pytest.raises(DataError, match="no batches"):
        distill(model, answers_of(teacher), [], steps=1)
    with pytest.raises(ConfigError, match="steps=0"):
        distill(model, answers_of(teacher), rows(), steps=0)
    with pytest.raises(ConfigError, match="requires a gradient"):
        distill(copy.deepcopy(teacher), answers_of(teacher), rows(), steps=1)
    with pytest.raises(ConfigError, match=r"logits are of shape \(2, 10, 39\), and the model's of \(2, 10, 40\)"):
        distill(model, lambda batch: logits_of(teacher, batch)[..., :39], rows(), steps=1)
    with pytest.raises(UnsupportedError, match="LlamaModel returns no logits"):
        logits_of(teacher.model, rows()[0])
