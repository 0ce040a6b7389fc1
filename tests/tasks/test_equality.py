"""Many tasks at once are the same tasks one after the other: losses and values to 1e-5 in float32."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from peft_lntune import LNTuningConfig
from tests import adapted
from tests.selection.test_masks import random_masks
from tests.tasks.tasked import assert_as_alone, tasked

SGD = {"lr": 0.1, "momentum": 0.9}
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
FAMILIES = ["bert-classifier", "roberta-classifier", "electra", "llama-classifier", "tokens", "values", "several"]
FAMILIES += ["bert", "llama", "t5"]


@pytest.mark.parametrize("family", FAMILIES)
def test_adamw_with_weight_decay(family):
    assert_as_alone(tasked(family), family, torch.optim.AdamW, **ADAMW)


# The gradient of the last bias before "answers" is zero but for rounding, which Adam would blow up to whole steps.
@pytest.mark.parametrize("family", ["bert-classifier", "answers", "tokens", "llama", "t5"])
def test_sgd_with_momentum(family):
    assert_as_alone(tasked(family), family, torch.optim.SGD, **SGD)


def test_a_learning_rate_a_task():
    rates = {"a": 1e-3, "b": 1e-2, "c": 3e-2}
    assert_as_alone(tasked("bert-classifier"), "bert-classifier", torch.optim.AdamW, lr=rates)


def test_a_schedule_counts_the_steps_of_its_task():
    def schedule(optimizer):
        return LambdaLR(optimizer, lambda step: 1 / (1 + step))

    assert_as_alone(tasked("bert-classifier"), "bert-classifier", torch.optim.AdamW, schedule=schedule, **ADAMW)


def test_clipping_is_by_the_norm_of_each_task():
    assert_as_alone(tasked("roberta-classifier"), "roberta-classifier", torch.optim.SGD, max_grad_norm=0.05, **SGD)


def test_masked_adapters_and_subsets():
    model = tasked("bert-classifier", "a")
    model.add_adapter("b", LNTuningConfig(tune="bias", roles=["attention"]))  # without a head
    model.add_adapter("c", LNTuningConfig(layers_to_transform=[1], modules_to_save=["pooler", "classifier"]))
    model.base_model.set_masks(random_masks(model, "a"), "a")
    assert_as_alone(model, "bert-classifier", torch.optim.AdamW, **ADAMW)


def test_only_biases():
    assert_as_alone(tasked("bert-classifier", tune="bias"), "bert-classifier", torch.optim.AdamW, **ADAMW)


def test_a_zero_centred_norm():
    assert_as_alone(tasked("gemma3"), "llama", torch.optim.SGD, **SGD)


def test_a_head_with_a_norm_in_it():
    model = tasked("bert", modules_to_save=["transform"])
    adapted.fill(model, "b", 0.02, 9)
    assert_as_alone(model, "bert", torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
