"""What shadowing leaves behind: nothing."""

import pytest
import torch
from torch import nn

from peft_lntune.core.override import call_hooked, overridden


def test_call_hooked():
    norm, seen = nn.LayerNorm(2), []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = call_hooked(norm, lambda x, *, add: x + add, torch.zeros(2), add=3)
    assert torch.equal(y, torch.full((2,), 3.0))
    assert seen[0] is y
    with pytest.raises(ZeroDivisionError, match="division"):
        call_hooked(norm, lambda x: 1 / 0, torch.zeros(2))
    assert "forward" not in norm.__dict__


def test_shadowed_twice():
    norm, x = nn.LayerNorm(2), torch.tensor([[1.0, 3.0]])
    outer, inner = torch.full((2,), 5.0), torch.full((2,), 7.0)
    y = overridden(norm, {"bias": outer}, lambda: overridden(norm, {"bias": inner}, norm, x) - norm(x))
    each = [nn.functional.layer_norm(x, (2,), norm.weight, bias) for bias in (inner, outer)]
    assert torch.equal(y, each[0] - each[1])
    assert "bias" not in norm.__dict__
