"""A head with other parameters for each row says what it says with each of them alone."""

import pytest
import torch
from torch import nn

from peft_lntune.errors import MixedHeadError
from peft_lntune.routing.heads import HeadForward, HeadRun, group_rows, run_head
from peft_lntune.routing.route import Route

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
        MixedHeadError, match=r"scores \(Looks\) cannot be run with different parameters per row: .*vmap"
    ):
        run_head(HeadForward(head), tensors, "scores", torch.randn(3, 2))


OWNERS = {
    "in turn": [0, 1, 2] * 4,
    "uneven": [2, 0, 2, 2, 2, 1, 2],
    "two of one": [1, 0, 1],
    "one": [3, 3],
    "each": [2, 0, 1],
}


@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
def test_groups_hold_each_row_once_and_rows_of_their_owner(owners):
    groups = group_rows(owners)
    assert groups.rows.flatten()[groups.places].tolist() == list(range(len(owners)))
    for owner, rows in zip(groups.owners, groups.rows.tolist(), strict=True):
        assert {owners[row] for row in rows} == {owner}
    assert len(groups.owners) <= 2 * len(set(owners))
    assert torch.equal(groups.spread(torch.tensor(groups.owners)), torch.tensor(owners))


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
def test_rows_that_share_their_parameters(owners, kind, factor, monkeypatch):
    make, (_, *shape) = HEADS[kind]
    head, x = make().eval(), torch.randn(len(owners) * factor, *shape)
    own = {name: torch.randn(4, *p.shape) / 2 for name, p in head.named_parameters()}
    groups = group_rows(owners)
    monkeypatch.setattr(Route, "factor", lambda route, shape, label: factor)
    run = HeadRun(head, "head", Route())
    run.rows, run.groups = {name: values[groups.owners] for name, values in own.items()}, groups
    found = run(head.forward, x)
    expected = each(head, {name: values[owners].repeat_interleave(factor, 0) for name, values in own.items()}, x)
    torch.testing.assert_close(found, expected)


def test_an_owner_that_diverges_leaves_the_others_alone():
    owners = [0, 1, 1, 1, 2]
    weight = torch.eye(2).repeat(3, 1, 1)
    weight[1] = torch.nan
    weight.requires_grad_()
    groups = group_rows(owners)
    x = torch.ones(5, 2, requires_grad=True)
    y = groups.linear(x, weight[groups.owners], torch.zeros(len(groups.owners), 2))
    assert y.isfinite().all(1).tolist() == [True, False, False, False, True]
    y.sum().backward()
    assert x.grad.isfinite().all(1).tolist() == [True, False, False, False, True]
    assert weight.grad[[0, 2]].isfinite().all()
