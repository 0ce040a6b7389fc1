"""LayerNorm by row: values, gradients, and what it keeps for the backward pass."""

import pytest
import torch
import torch.nn.functional as F

from peft_lntune.norms.layer_norm import layer_norm_rows

CASES = {  # input, normalized shape, gains and biases
    "tokens": ((3, 5, 4), (4,), (3, 1, 4)),
    "no tokens": ((3, 4), (4,), (3, 4)),
    "two axes": ((2, 3, 5, 4), (5, 4), (2, 1, 5, 4)),
    "one row for all": ((3, 5, 4), (4,), (4,)),
}


def make(case, bias, dtype=torch.float64):
    x_shape, shape, row_shape = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x, weight, offset = (
        torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in (x_shape, row_shape, row_shape)
    )
    return x, shape, weight, offset if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, bias):
    x, shape, weight, offset = make(case, bias)
    expected = F.layer_norm(x, shape, None, None, 1e-5) * weight + (0 if offset is None else offset)
    torch.testing.assert_close(layer_norm_rows(x, shape, weight, offset, 1e-5), expected)
    if offset is None:
        assert torch.autograd.gradcheck(lambda x, weight: layer_norm_rows(x, shape, weight, None, 1e-5), (x, weight))
    else:
        given = (x, weight, offset)
        assert torch.autograd.gradcheck(lambda x, *rows: layer_norm_rows(x, shape, *rows, 1e-5), given)


def test_gradients_where_some_are_not_wanted():
    x, shape, weight, offset = make("tokens", True)
    layer_norm_rows(x.detach(), shape, weight, offset, 1e-5).sum().backward()
    alone = weight.grad.clone()
    weight.grad = None
    layer_norm_rows(x, shape, weight, offset.detach(), 1e-5).sum().backward()
    assert torch.equal(weight.grad, alone)


def test_nothing_of_the_size_of_the_input_is_kept_but_the_input():
    x, shape, weight, offset = make("tokens", True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer_norm_rows(x, shape, weight, offset, 1e-5)
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()] == [x.data_ptr()]


def test_compiled_in_one_graph():
    x, shape, weight, offset = make("tokens", True)
    compiled = torch.compile(layer_norm_rows, fullgraph=True, backend="aot_eager")
    y = compiled(x, shape, weight, offset, 1e-5)
    torch.testing.assert_close(y, layer_norm_rows(x, shape, weight, offset, 1e-5))
