"""A head with other parameters for each row says what it says with each of them alone."""

import pytest
import torch
from torch import nn

from peft_lntune.errors import MixedHeadError
from peft_lntune.routing.heads import HeadForward, run_head

HEADS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "linear on tokens": (lambda: nn.Linear(4, 3), (5, 7, 4)),
    "linear on more": (lambda: nn.Linear(4, 3), (5, 2, 7, 4)),
    "convolution": (lambda: nn.Conv1d(2, 3, 3), (5, 2, 7)),
    "several": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)), (5, 4)),
    "scale": (lambda: nn.PReLU(4), (5, 4)),
}


def each(head, tensors, x):
    """A row at a time."""
    rows = [{name: rows[i] for name, rows in tensors.items()} for i in range(len(x))]
    return torch.cat([torch.func.functional_call(head, row, (x[i : i + 1],)) for i, row in enumerate(rows)])


@pytest.mark.parametrize("kind", HEADS)
def test_row_by_row(kind):
    make, shape = HEADS[kind]
    head, x = make().eval(), torch.randn(shape)
    tensors = {name: torch.randn(5, *value.shape) for name, value in head.state_dict().items()}
    before = {name: value.clone() for name, value in head.state_dict().items()}
    torch.testing.assert_close(run_head(HeadForward(head), tensors, "head", x), each(head, tensors, x))
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_one_row_for_all():
    head, x = nn.Linear(4, 3), torch.randn(5, 4)
    tensors = {name: torch.randn(1, *value.shape) for name, value in head.state_dict().items()}
    expected = nn.functional.linear(x, tensors["weight"][0], tensors["bias"][0])
    assert torch.equal(run_head(HeadForward(head), tensors, "head", x), expected)


def test_two_inputs_are_refused():
    head = nn.Bilinear(2, 2, 1)
    tensors = {name: torch.randn(3, *value.shape) for name, value in head.state_dict().items()}
    with pytest.raises(
        MixedHeadError, match=r"scores \(Bilinear\) takes 2 inputs, and a head is run row by row on one"
    ):
        run_head(HeadForward(head), tensors, "scores", torch.randn(3, 2), torch.randn(3, 2))


def test_what_looks_at_values_is_refused():
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    head = Looks(2, 2)
    tensors = {name: torch.randn(3, *value.shape) for name, value in head.state_dict().items()}
    with pytest.raises(
        MixedHeadError, match=r"scores \(Looks\) cannot be run with other parameters for each row: .*vmap"
    ):
        run_head(HeadForward(head), tensors, "scores", torch.randn(3, 2))
