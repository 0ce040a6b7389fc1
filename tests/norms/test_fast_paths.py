"""Fast paths: one registration serves every use. LayerNorm by row: values, gradients, and what is kept for them."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_lntune import LNTuningConfig
from peft_lntune.norms.fast_paths import FAST_PATHS, layer_norm_rows, register_fast_path
from peft_lntune.norms.per_sample import per_sample
from tests.cases import NORMS, build_norm, norm_inputs
from tests.norms.test_affine import DTYPES, wider

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


def test_a_fast_path_is_registered_once():
    with pytest.raises(KeyError, match="LayerNorm already has a fast path"):
        register_fast_path(nn.LayerNorm, *FAST_PATHS[nn.LayerNorm][:3])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("cls", FAST_PATHS, ids=lambda cls: cls.__name__)
def test_fast_paths_have_the_bits_of_the_module(cls, dtype):
    cases = [name for name in NORMS if type(NORMS[name].norm()) is cls]
    assert cases
    for case in cases:
        for seed in range(5):
            norm, (x,) = build_norm(case, dtype, seed), norm_inputs(case, dtype, batch=64, seed=seed)
            y = FAST_PATHS[cls].forward(norm, x, *wider(norm))
            assert y.dtype == norm(x).dtype
            assert torch.equal(y, norm(x))


class ToyNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.weight


@pytest.mark.parametrize("frozen", [False, True])
def test_one_registration_serves_one_adapter_mixed_rows_and_gradients_per_sample(frozen, monkeypatch):
    taken = []

    def of(use, function):
        return lambda *args: (taken.append(use), function(*args))[1]

    def affine(norm, x, weight, bias):
        return F.normalize(x, dim=-1) * weight

    torch.manual_seed(0)
    model, x = nn.Sequential(ToyNorm(4), nn.Linear(4, 2)), torch.randn(3, 4)
    tuned = get_peft_model(model, LNTuningConfig(init_weights=False, inference_mode=frozen)).eval()
    tuned.add_adapter("other", LNTuningConfig(init_weights=False, inference_mode=frozen))
    names = ["default", "__base__", "other"]

    def uses():
        with torch.no_grad():
            found = [tuned(x), tuned(x, adapter_names=names)]
        with per_sample(tuned.base_model.model, ["0.weight"]) as hooks:
            hooks.start(len(x), ())
            tuned(x).sum().backward()
            return [*found, hooks.gradients()["0.weight"]]

    plain = uses()
    register_fast_path(
        ToyNorm, of("forward", affine), of("rows", affine), of("normalize", lambda norm, x: F.normalize(x, dim=-1))
    )
    monkeypatch.setitem(FAST_PATHS, ToyNorm, FAST_PATHS.pop(ToyNorm))
    for before, after in zip(plain, uses(), strict=True):
        torch.testing.assert_close(after, before)
    assert set(taken) == {"forward", "rows", "normalize"}
    taken.clear()
    monkeypatch.setattr(ToyNorm, "forward", lambda self, x: F.normalize(x, dim=-1) * self.weight)
    uses()
    assert taken == []  # another forward runs now than the one that the functions were written for
