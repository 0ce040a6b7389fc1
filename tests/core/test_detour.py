"""A detour is there while a route is on, and leaves nothing behind."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from peft_lntune.core.detour import Detour, forward_of
from peft_lntune.core.override import runs_own_forward
from peft_lntune.norms.affine import NormCall, call_with
from peft_lntune.routing.route import Route
from tests.cases import build_norm, norm_inputs


def plus_one(own, x):
    return own(x) + 1


def test_it_runs_in_a_route_alone():
    norm, x, route = nn.LayerNorm(4), torch.randn(2, 4), Route()
    expected = norm(x)
    detour = Detour(norm, route, plus_one)
    detour.patch()
    assert torch.equal(norm(x), expected)
    with route.serving(["a", "b"]):
        assert torch.equal(norm(x), expected + 1)
    assert torch.equal(norm(x), expected)
    assert forward_of(norm) == nn.LayerNorm.forward.__get__(norm)
    assert inspect.signature(norm.forward) == inspect.signature(nn.LayerNorm(4).forward)
    detour.restore()
    assert "forward" not in norm.__dict__


@pytest.mark.parametrize("case", ["LayerNorm", "Llama", "T5"])
def test_who_asks_for_the_forward_gets_what_lies_beneath(case):
    """A tuner's layer around the norm calls it in the same way, as fast, as without."""
    norm, (x,) = build_norm(case, torch.bfloat16), norm_inputs(case, torch.bfloat16)
    weight, expected = norm.weight.float() + 0.1, norm(x)
    tuned = call_with(norm, x, weight, None)
    Detour(norm, Route(), plus_one).patch()
    assert runs_own_forward(norm)
    assert torch.equal(call_with(norm, x, weight, None), tuned)
    assert torch.equal(NormCall(norm).bind(weight, None)(x), tuned)
    assert torch.equal(norm(x), expected)


def test_one_below_another_that_came_later():
    norm, x, route = nn.LayerNorm(4), torch.randn(2, 4), Route()
    expected = norm(x)
    detour = Detour(norm, route, plus_one)
    detour.patch()
    below = norm.forward
    norm.forward = lambda x: 2 * below(x)
    assert not runs_own_forward(norm)
    detour.restore()
    with route.serving(["a", "b"]):
        assert torch.equal(norm(x), 2 * expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_has_none(copied):
    model, x, route = nn.Sequential(nn.LayerNorm(4)), torch.randn(2, 4), Route()
    Detour(model[0], route, plus_one).patch()
    with route.serving(["a", "b"]):
        twin = copied(model)
        nn.init.zeros_(twin[0].weight)
        assert torch.equal(twin(x), torch.zeros(2, 4))
    assert runs_own_forward(twin[0])
    assert twin[0].forward.__self__ is twin[0]
