"""The bottleneck as a function: against the formula written out, a row a sample, and its weighted sums."""

import math

import pytest
import torch
from torch import nn

from peft_lntune.core.bottleneck import (
    ACTIVATIONS,
    PARTS,
    Scale,
    bottleneck,
    project,
    reset,
    stack_rows,
    weighted_sum,
    widen,
)

# The activations as their definitions have them, in Python floats.
WRITTEN = {
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_new": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "tanh": math.tanh,
    "identity": lambda v: v,
}
WRITTEN |= {"gelu_tanh": WRITTEN["gelu_new"], "swish": WRITTEN["silu"]}
SHAPES = [(4,), (3, 4), (2, 3, 4), (2, 3, 5, 4)]


def tensors(size=3, read=4, width=5, dtype=torch.float64):
    shapes = {"down": (size, read), "down_bias": (size,), "up": (width, size), "up_bias": (width,)}
    return {part: torch.randn(shape, dtype=dtype) for part, shape in shapes.items()}


def written(x, parts, activation="relu", scale=1.0):
    """s (U f(D x + b) + c), a number at a time."""
    answers = []
    for vector in x.reshape(-1, x.shape[-1]).tolist():
        inner = [
            WRITTEN[activation](sum(d * v for d, v in zip(row, vector, strict=True)) + b)
            for row, b in zip(parts["down"].tolist(), parts["down_bias"].tolist(), strict=True)
        ]
        answers.append(
            [
                scale * (sum(u * v for u, v in zip(row, inner, strict=True)) + c)
                for row, c in zip(parts["up"].tolist(), parts["up_bias"].tolist(), strict=True)
            ]
        )
    return torch.tensor(answers, dtype=x.dtype).reshape(*x.shape[:-1], -1)


def test_the_names_are_those_of_the_argument_list():
    assert WRITTEN.keys() == ACTIVATIONS.keys()
    assert bottleneck.__code__.co_varnames[1:5] == PARTS


@pytest.mark.parametrize("activation", ACTIVATIONS)
class TestFormula:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_one_for_all_rows(self, shape, activation):
        x, parts = torch.randn(shape, dtype=torch.float64), tensors()
        answer = bottleneck(x, **parts, activation=activation, scale=0.7)
        torch.testing.assert_close(answer, written(x, parts, activation, 0.7))

    def test_zero_stays_zero(self, activation):
        assert ACTIVATIONS[activation](torch.zeros(3)).eq(0).all()


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_one_for_each_sample(shape):
    x, members = torch.randn(shape, dtype=torch.float64), [tensors() for _ in range(shape[0])]
    rows = {part: torch.stack([parts[part] for parts in members]) for part in PARTS}
    expected = torch.stack([written(x[i], parts) for i, parts in enumerate(members)])
    torch.testing.assert_close(bottleneck(x, **rows), expected)


def test_gradients_of_rows_are_those_of_single_ones():
    x, weight, bias = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4), torch.randn(2, 5)
    one = project(x, weight, bias)
    other = torch.stack([project(x[i], weight[i], bias[i]) for i in range(2)])
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in (one, other)))


def test_a_learned_scale_starts_at_one_and_is_a_scalar():
    scale = Scale(torch.float64)
    assert scale.weight.shape == ()
    assert [name for name, _ in scale.named_parameters()] == ["weight"]
    x = torch.randn(3, dtype=torch.float64)
    assert torch.equal(scale(x), x)


class TestStart:
    def test_as_torchs_linear_and_zero(self):
        down, up = nn.Linear(400, 30), nn.Linear(30, 400)
        reset(down, up)
        bound = 1 / math.sqrt(400)
        assert down.weight.abs().max() <= bound
        assert down.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not torch.cat([down.bias, up.bias, up.weight.reshape(-1)]).any()
        assert all(parameter.requires_grad for parameter in [*down.parameters(), *up.parameters()])

    def test_not_the_identity_where_asked(self):
        down, up = nn.Linear(400, 30), nn.Linear(30, 400)
        reset(down, up, identity=False)
        assert up.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_a_widened_one_says_the_same():
    x, parts = torch.randn(2, 3, 4, dtype=torch.float64), tensors(size=2)
    wide = widen(parts, 6)
    assert wide["down"].shape == (6, 4)
    assert wide["up"].shape == (5, 6)
    torch.testing.assert_close(bottleneck(x, **wide, activation="gelu"), bottleneck(x, **parts, activation="gelu"))


def test_stacked_rows_of_many_sizes_and_of_none():
    members = [tensors(size=2, dtype=torch.float32), None, tensors(size=5)]
    stacked = stack_rows(members)
    assert {part: tuple(tensor.shape) for part, tensor in stacked.items()} == {
        "down": (3, 5, 4),
        "down_bias": (3, 5),
        "up": (3, 5, 5),
        "up_bias": (3, 5),
    }
    assert {tensor.dtype for tensor in stacked.values()} == {torch.float64}
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    answer = bottleneck(x, **stacked)
    assert not answer[1].any()
    for i in (0, 2):
        torch.testing.assert_close(answer[i], written(x[i], {part: t.double() for part, t in members[i].items()}))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 0.0)])
def test_the_weighted_sum_is_one_bottleneck(weights):
    members = [tensors(size=size) for size in (1, 3, 2)]
    summed = weighted_sum(members, weights)
    assert len(summed["down"]) == 6
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = sum(w * written(x, parts, "tanh") for w, parts in zip(weights, members, strict=True))
    torch.testing.assert_close(bottleneck(x, **summed, activation="tanh"), expected)
    with pytest.raises(ValueError, match="shorter"):
        weighted_sum(members, weights[:2])
