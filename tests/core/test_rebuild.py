"""What a backward pass makes again: the same gradients, without the memory, and never of other values."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_lntune.core.delta import effective
from peft_lntune.core.rebuild import can_rebuild, is_plain, rebuilt_in_backward, unwritten

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BASE = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def delta():
    values = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return values.requires_grad_()


def linear(x, values, made=None, base=BASE):
    """`x (base + values)^T` with the sum made again; `made` counts how often."""
    read, read_base = unwritten(values), unwritten(base)

    def make():
        if made is not None:
            made.append(1)
        return effective(read_base(), read())

    weight = effective(base, values)
    with rebuilt_in_backward([(weight, make)]):
        return F.linear(x, weight)


def gradients(run, *inputs):
    return torch.autograd.grad(run(*inputs).sin().sum(), inputs)


def inputs():
    return X.clone().requires_grad_(), delta()


@pytest.mark.parametrize("shape", [(5, 4), (5, 1, 4)])
def test_the_gradients_are_those_of_the_sum_itself(shape):
    made = []
    x, values = X.view(shape).clone().requires_grad_(), delta()
    found = gradients(lambda x, values: linear(x, values, made), x, values)
    expected = gradients(lambda x, values: F.linear(x, BASE + values), x, values)
    assert made
    assert all(map(torch.equal, found, expected))


def test_of_second_order_too():
    assert torch.autograd.gradgradcheck(linear, inputs())
    assert torch.autograd.gradcheck(linear, inputs())


def test_strides_are_those_that_were_saved():
    def run(x, values):
        return linear(x, values, base=BASE.mT.contiguous().mT)

    expected = gradients(lambda x, values: F.linear(x, BASE + values), *inputs())
    assert all(map(torch.allclose, gradients(run, *inputs()), expected))


def test_nothing_holds_the_sum():
    x, weight = X.clone().requires_grad_(), BASE + delta()
    memory = weakref.ref(weight.untyped_storage())
    with rebuilt_in_backward([(weight, lambda: BASE + delta().detach())]):
        y = F.linear(x, weight)
    del weight
    assert memory() is None
    y.sum().backward()


def test_it_can_be_asked_twice():
    x, values = inputs()
    y = linear(x, values).sum()
    first = torch.autograd.grad(y, (x, values), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, (x, values))))


@pytest.mark.parametrize("written", [0, 1])
def test_written_values_are_refused(written):
    x, values = inputs()
    y = linear(x, values).sum()
    with torch.no_grad():
        (x, values)[written].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_new_memory_does_not_matter():
    x, values = inputs()
    expected = gradients(linear, x, values)
    y = linear(x, values).sin().sum()
    values.data = torch.zeros_like(values)
    assert torch.equal(torch.autograd.grad(y, x)[0], expected[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    def run(x, values):
        return checkpoint(lambda x: linear(linear(x, values) @ BASE, values), x, use_reentrant=reentrant)

    x, values = inputs()
    run(x, values).sin().sum().backward()
    expected = gradients(lambda x, values: F.linear(F.linear(x, BASE + values) @ BASE, BASE + values), *inputs())
    assert torch.allclose(x.grad, expected[0])
    assert torch.allclose(values.grad, expected[1])


def test_hooks_around_see_everything_else():
    seen = []

    def pack(tensor):
        seen.append(tensor.shape)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        y = linear(*inputs())
    assert seen == [X.shape]
    y.sum().backward()


def test_contexts_in_one_another():
    x, values = inputs()
    one, two = BASE + values, 2 * (BASE + values)
    with (
        rebuilt_in_backward([(one, lambda: BASE + values.detach())]),
        rebuilt_in_backward([(two, lambda: 2 * (BASE + values.detach()))]),
    ):
        y = F.linear(x, one) + F.linear(x, two)
    expected = gradients(lambda x, values: F.linear(x, 3 * (BASE + values)), *inputs())
    found = torch.autograd.grad(y.div(1).sin().sum(), (x, values))
    assert all(map(torch.allclose, found, expected))


def test_where_nothing_may_be_rebuilt():
    assert can_rebuild()
    with torch.no_grad():
        assert not can_rebuild()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        assert not can_rebuild()
    assert torch.func.grad(lambda x: x * float(not can_rebuild()))(torch.ones(())) == 1


def test_what_is_plain():
    norm = nn.LayerNorm(2)
    assert is_plain(norm, "weight")
    norm.__dict__["weight"] = torch.ones(2)
    assert not is_plain(norm, "weight")
    assert not is_plain(nn.LayerNorm(2, device="meta"), "weight")
    assert not is_plain(nn.LayerNorm(2, bias=False), "bias")
