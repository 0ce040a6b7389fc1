"""What reads the output of a norm, on modules where each kind of reader stands alone."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peft_lntune.norms.consumers import Consumers, find_consumers


class Block(nn.Module):
    """A norm and two linear maps, and a forward to be tried."""

    def __init__(self, forward: Callable[["Block", Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.small, self.other = nn.Linear(2, 2), nn.LayerNorm(4)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def consumers(forward: Callable[[Block, Tensor], Tensor], device: str = "cpu") -> Consumers:
    model = Block(forward).to(device).eval()
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    norms = {name: module for name, module in modules.items() if isinstance(module, nn.LayerNorm)}
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules.values()]
    x = torch.randn(2, 3, 4, device=device)
    found = find_consumers(norms, linears, modules, lambda: model(x))
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules.values()]
    return found["norm"]


def caught(block: Block, y: Tensor) -> Tensor:
    """What a linear map is given, after it has failed."""
    with contextlib.suppress(TypeError):
        block.a(y, y)
    return y


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(y := m.norm(x)) + m.b(y),
        lambda m, x: m.a(y := m.norm(x)) + m.b(y.view(-1, 4)).view(2, 3, 4),
        lambda m, x: m.a(y := m.norm(x))[:, :1] + m.b(y[:, -1:]),
        lambda m, x: m.a(input=(y := m.norm(x))) + m.b(nn.functional.dropout(y, training=False)),
        lambda m, x: m.a(y := m.norm(x)) + m.b(y.transpose(0, 1)).transpose(0, 1),
        lambda m, x: m.a(y := m.norm(x)) + m.b(y.clone()),
    ],
    ids=["itself", "view", "slice", "by-name", "transposed", "copy"],
)
def test_linear_maps(forward: Callable, device: str) -> None:
    assert consumers(forward, device) == Consumers(["a", "b"], [])


@pytest.mark.parametrize(
    ("forward", "linears", "other"),
    [
        (lambda m, x: m.a(y := m.norm(x)) + y, ["a"], "add in the model itself"),
        (lambda m, x: m.a(m.norm(x) * 2), [], "mul in the model itself"),
        (lambda m, x: m.small(m.norm(x)[..., :2]), [], "mm in small"),
        (lambda m, x: m.a(m.norm(x).transpose(-1, -2).reshape(2, 3, 4)), [], "clone in the model itself"),
        (lambda m, x: m.a(m.norm(x[:, :1].expand(2, 4, 4)).mT.contiguous()), [], "clone in the model itself"),
        (
            lambda m, x: m.a(m.norm(x)).add_(nn.functional.linear(m.norm(x), m.b.weight)),
            ["a"],
            "mm in the model itself",
        ),
        (lambda m, x: m.a(m.norm(x)) + m.a(x), [], "a, which has other inputs too"),
        (lambda m, x: m.a(m.norm(x)) + m.a(m.other(x)), [], "a, which has other inputs too"),
        (lambda m, x: m.a(m.other(m.norm(x))), [], "native_layer_norm in other"),
        (lambda m, x: m.a(m.norm(x).add_(1)), ["a"], "add_ in the model itself"),
        (lambda m, x: m.a(m.norm(x)[:, [0, 1, 1]]), [], "index in the model itself"),
        (lambda m, x: m.a(m.norm(x[:1, :1].expand(4, 3, 4))[:, 0, 0]), [], "mm in a"),
        (lambda m, x: m.a(m.norm(x).view(-1).unfold(0, 4, 1)), [], "addmm in a"),
        (lambda m, x: m.a(m.norm(x).view(-1)[1:5]), [], "addmm in a"),
        (lambda m, x: m.a(m.norm(x[None]).clone(memory_format=torch.channels_last)), [], "clone in the model itself"),
        (lambda m, x: caught(m, m.norm(x)) * 2, ["a"], "mul in the model itself"),
        (lambda m, x: m.norm(x), [], "whoever calls the model"),
        (lambda m, x: (m.norm(x), m.a(m.norm(x))), ["a"], "whoever calls the model"),
    ],
    ids=[
        "residual",
        "scaled",
        "part",
        "columns",
        "square",
        "weight",
        "called-twice",
        "two-norms",
        "norm",
        "in-place",
        "picked",
        "one-of-each-row",
        "overlapping",
        "shifted",
        "channels-last",
        "caught",
        "answer",
        "answer-too",
    ],
)
def test_other_readers(forward: Callable, linears: list[str], other: str) -> None:
    found = consumers(forward)
    assert found.linears == linears
    assert any(said.startswith(other) for said in found.others), found


def test_a_norm_that_does_not_run() -> None:
    model = Block(lambda m, x: m.a(x))
    modules = dict(model.named_modules())
    assert find_consumers({"norm": model.norm}, {"a": model.a}, modules, lambda: model(torch.randn(2, 4))) == {}


def test_hooks_go_when_the_model_fails() -> None:
    def fail(m: Block, x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    model = Block(fail)
    with pytest.raises(RuntimeError, match="broken"):
        find_consumers({"norm": model.norm}, {}, dict(model.named_modules()), lambda: model(torch.randn(2, 4)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
