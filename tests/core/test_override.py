"""What shadowing leaves behind: nothing."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from peft_lntune.core.override import call_hooked, copy_with, overridden
from peft_lntune.errors import UnsupportedError


def test_call_hooked():
    norm, seen = nn.LayerNorm(2), []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = call_hooked(norm, lambda x, *, add: x + add, {}, torch.zeros(2), add=3)
    assert torch.equal(y, torch.full((2,), 3.0))
    assert seen[0] is y
    with pytest.raises(ZeroDivisionError, match="division"):
        call_hooked(norm, lambda x: 1 / 0, {}, torch.zeros(2))
    assert "forward" not in norm.__dict__


def test_shadowed_twice():
    norm, x = nn.LayerNorm(2), torch.tensor([[1.0, 3.0]])
    outer, inner = torch.full((2,), 5.0), torch.full((2,), 7.0)
    y = overridden(norm, {"bias": outer}, lambda: overridden(norm, {"bias": inner}, norm, x) - norm(x))
    each = [nn.functional.layer_norm(x, (2,), norm.weight, bias) for bias in (inner, outer)]
    assert torch.equal(y, each[0] - each[1])
    assert "bias" not in norm.__dict__


def test_what_a_class_computes_hides_no_entry():
    linear = parametrizations.weight_norm(nn.Linear(2, 2))
    for run in (copy_with, lambda module, entries: overridden(module, entries, module, torch.ones(1, 2))):
        with pytest.raises(UnsupportedError, match=r"the weight of a ParametrizedLinear is computed .* in each call"):
            run(linear, {"weight": torch.zeros(2, 2)})
    assert "weight" not in linear.__dict__


def test_what_a_hook_computes_replaces_no_entry():
    linear = prune.identity(nn.Linear(2, 2), "weight")
    before = linear.weight
    with pytest.raises(UnsupportedError, match=r"the weight of a Linear is computed .*prune\.remove"):
        overridden(linear, {"weight": torch.zeros(2, 2)}, linear, torch.ones(1, 2))
    assert linear.weight is before
