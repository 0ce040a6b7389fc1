"""Tensors that say what they are, put into the groups of an optimizer."""

import pytest
import torch

from peft_lntune.core.groups import Member, group_members
from peft_lntune.errors import ConfigError

GAIN, MATRIX, BIAS = (torch.ones(size) for size in (2, 3, 4))


def test_one_group_per_name_and_decay_in_the_order_of_the_rates():
    members = [
        Member("matrix", MATRIX, "head", decays=True),
        Member("gain", GAIN, "ln"),
        Member("bias", BIAS, "head"),
        Member("gain again", GAIN, "ln"),
    ]
    assert group_members(members, {"ln": 1.0, "none": 3.0, "head": 2.0}, {"ln": 0.5, "none": 0.5, "head": 0.5}) == [
        {"params": [GAIN], "name": "ln", "lr": 1.0, "weight_decay": 0.0},
        {"params": [MATRIX], "name": "head", "lr": 2.0, "weight_decay": 0.5},
        {"params": [BIAS], "name": "head (no decay)", "lr": 2.0, "weight_decay": 0.0},
    ]


def test_none_leaves_the_choice_to_the_optimizer():
    members = [Member("matrix", MATRIX, "ln", decays=True), Member("gain", GAIN, "ln")]
    assert group_members(members, {"ln": None}, {"ln": None}) == [
        {"params": [MATRIX], "name": "ln"},
        {"params": [GAIN], "name": "ln (no decay)", "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(("rates", "decay"), [({"a": 1.0, "b": 2.0}, 0.0), ({"a": 1.0, "b": 1.0}, 0.1)])
def test_one_tensor_in_two_ways_is_refused(rates, decay):
    members = [Member("embed", MATRIX, "a", decays=True), Member("unembed", MATRIX, "b", decays=True)]
    with pytest.raises(ConfigError, match=r"embed \(group 'a'\) and unembed \(group 'b'\) are one parameter"):
        group_members(members, rates, {"a": 0.0, "b": decay})
    (only,) = group_members(members, {"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0})
    assert only["name"] == "a"
    assert len(only["params"]) == 1
