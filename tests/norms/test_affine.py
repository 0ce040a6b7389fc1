"""A norm with other parameters: the base's bits where nothing has changed, and nothing left on the module."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peft_lntune.errors import UnsupportedError
from peft_lntune.norms import probe, rounding
from peft_lntune.norms.affine import call_with, normalize, output_dtype
from peft_lntune.norms.probe import align
from tests.cases import NORMS, build_norm, norm_inputs
from tests.tolerance import assert_close

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HALF = {name: DTYPES[name] for name in ("bfloat16", "float16")}


def wider(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The norm's own parameters, in float32 or wider."""
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    bias = getattr(norm, "bias", None)
    return norm.weight.detach().to(wide), None if bias is None else bias.detach().to(wide)


def oracle(norm: nn.Module, case: str, weight: Tensor, bias: Tensor | None, x: Tensor, *gate: Tensor) -> Tensor:
    """The norm in float64, its parameters written into it; nothing rounded but by the norm itself."""
    exact = NORMS[case].norm().double()
    with torch.no_grad():
        exact.weight.copy_(weight)
        if getattr(exact, "bias", None) is not None:
            exact.bias.copy_(bias)
    y = exact(x.double(), *(g.double() for g in gate))
    if bias is not None and getattr(exact, "bias", None) is None:
        y = y + align(bias.double(), x, NORMS[case].axis)
    return y


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", NORMS)
def test_own_parameters_give_own_bits(case, dtype, seed):
    norm, args = build_norm(case, dtype, seed), norm_inputs(case, dtype, batch=64, seed=seed)
    base = norm(*args)
    y = call_with(norm, args[0], *wider(norm), *args[1:])
    assert y.dtype == base.dtype
    assert torch.equal(y, base)
    # With a hook a fast path is not taken.
    norm.register_forward_hook(lambda *_: None)
    assert torch.equal(call_with(norm, args[0], *wider(norm), *args[1:]), base)


@pytest.mark.parametrize("case", NORMS)
def test_mixed_dtypes_give_the_bases_dtype(case):
    """Norms kept in float32 under a body in half precision."""
    norm, args = build_norm(case), norm_inputs(case, torch.bfloat16)
    base = norm(*args)
    y = call_with(norm, args[0], *wider(norm), *args[1:])
    assert y.dtype == base.dtype == output_dtype(norm, args[0])
    assert torch.equal(y, base)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", NORMS)
def test_autocast(case, dtype):
    norm, args = build_norm(case, dtype), norm_inputs(case, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        base = norm(*args)
        assert torch.equal(call_with(norm, args[0], *wider(norm), *args[1:]), base)
        assert output_dtype(norm, args[0]) == base.dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", NORMS)
def test_other_parameters(case, dtype):
    norm, args = build_norm(case, dtype), norm_inputs(case, dtype)
    weight, bias = wider(norm)
    weight, bias = weight + torch.randn_like(weight), torch.randn_like(weight)  # also where the norm has no bias
    y, expected = call_with(norm, args[0], weight, bias, *args[1:]), oracle(norm, case, weight, bias, *args)
    assert y.dtype == norm(*args).dtype
    # transformers' norms round xhat and the product: a few spacings of the dtype, relative to the largest entry.
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error <= 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("case", NORMS)
def test_a_delta_below_the_bases_spacing_is_felt(case, dtype):
    norm, args = build_norm(case, dtype), norm_inputs(case, dtype, batch=64)
    weight, bias = wider(norm)
    small = weight * torch.finfo(dtype).eps / 8
    assert torch.equal((weight + small).to(dtype), norm.weight)
    assert not torch.equal(call_with(norm, args[0], weight + small, bias, *args[1:]), norm(*args))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", NORMS)
def test_normalize_then_affine(case, dtype):
    norm, args = build_norm(case, dtype), norm_inputs(case, dtype, batch=16)
    weight, bias = wider(norm)
    xhat = normalize(norm, *args)
    assert xhat.dtype == weight.dtype
    y = xhat * align(weight + NORMS[case].offset, args[0], NORMS[case].axis)
    y = y if bias is None else y + align(bias, args[0], NORMS[case].axis)
    y, base = y.to(output_dtype(norm, args[0])), norm(*args)
    if not NORMS[case].fused and dtype != torch.float64:  # several of transformers' norms compute in float32 at most
        assert torch.equal(y, base)
    else:
        # In half precision both round once, at the end. In float32 each rounds the mean, the scale, the product and the
        # sum, at other places: four roundings on either side. In float64 several norms compute in float32 at most.
        half = torch.finfo(dtype).bits < 32
        assert_close(y, base, roundings=2 if half else 8, dtype=dtype if half else torch.float32)


@pytest.mark.parametrize("case", NORMS)
def test_gradients(case):
    norm, args = build_norm(case), norm_inputs(case)
    weight, bias = (None if p is None else p.clone().requires_grad_() for p in wider(norm))
    call_with(norm, args[0], weight, bias, *args[1:]).square().sum().backward()
    norm(*args).square().sum().backward()
    torch.testing.assert_close(weight.grad, norm.weight.grad)
    if bias is not None:
        torch.testing.assert_close(bias.grad, norm.bias.grad)


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 40),
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_layer_norm_of_any_shape(width, lead, bias, dtype):
    norm = nn.LayerNorm(width, bias=bias).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(*lead, width).to(dtype)
    assert torch.equal(call_with(norm, x, *wider(norm)), norm(x))


@pytest.mark.parametrize("case", ["LayerNorm", "Llama", "T5", "Cohere-heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_graph(case, dtype):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = build_norm(case, dtype)

        def forward(self, x, delta):
            weight, bias = wider(self.norm)
            return call_with(self.norm, x, weight + delta, bias), normalize(self.norm, x)

    torch._dynamo.reset()
    layer, (x,), delta = Layer(), norm_inputs(case, dtype), torch.tensor(0.1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(x, delta), layer(x, delta), strict=True):
        assert torch.equal(got, expected)
    assert not {"weight", "bias", "forward"} & set(layer.norm.__dict__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["LayerNorm", "Llama", "T5", "Qwen3Next-gated"])
def test_hooks_run_once_and_see_what_the_call_gives(case, dtype):
    norm, args = build_norm(case, dtype), norm_inputs(case, dtype)
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = call_with(norm, args[0], *wider(norm), *args[1:])
    assert len(seen) == 2
    assert seen[0] is args[0]
    assert seen[1] is y
    norm.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.equal(call_with(norm, args[0], *wider(norm), *args[1:]), y + 1)


def test_a_forward_of_its_own_is_called():
    """Fused kernels are put on the instance; a fast path for the class must not skip them."""
    norm, x = nn.LayerNorm(4), torch.randn(2, 4)
    norm.forward = lambda x: F.layer_norm(x, (4,), norm.weight, norm.bias) + 1
    assert torch.equal(call_with(norm, x, *wider(norm)), norm(x))
    assert torch.equal(call_with(norm, x, *wider(norm)), nn.LayerNorm(4)(x) + 1)


class Fails(nn.Module):
    """A norm that fails on inputs of one sample."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        if len(x) == 1:
            raise RuntimeError("one sample")
        return F.rms_norm(x, (4,)) * self.weight


@pytest.mark.parametrize("before", [{}, {"weight": torch.full((4,), 2.0)}], ids=["clean", "with an entry of FSDP's"])
@pytest.mark.parametrize("call", [lambda norm, x: call_with(norm, x, torch.zeros(4), None), normalize])
def test_the_module_is_as_it_was(call, before):
    norm = Fails()
    norm.__dict__.update(before)
    expected = dict(norm.__dict__)
    registered = norm._parameters["weight"]
    assert call(norm, torch.randn(2, 4)).shape == (2, 4)
    assert dict(norm.__dict__) == expected
    with pytest.raises(RuntimeError, match="one sample"):
        call(norm, torch.randn(1, 4))
    assert dict(norm.__dict__) == expected
    assert norm._parameters["weight"] is registered


def test_an_entry_of_fsdps_is_the_norms_own_parameter():
    norm, x = Fails(), torch.randn(2, 4)
    norm.__dict__["weight"] = torch.full((4,), 2.0)
    assert torch.equal(normalize(norm, x) * 2, norm(x))
    norm._parameters["weight"] = nn.Parameter(torch.ones(0))  # this rank's slice
    assert torch.equal(call_with(norm, x, torch.full((4,), 2.0), None), norm(x))


def test_none_keeps_the_own_parameter():
    for dtype in DTYPES.values():
        norm, (x,) = build_norm("LayerNorm", dtype), norm_inputs("LayerNorm", dtype)
        weight, bias = wider(norm)
        assert call_with(norm, x, None, None).equal(norm(x))
        assert call_with(norm, x, weight, None).equal(norm(x))
        assert call_with(norm, x, None, bias).equal(norm(x))


def test_an_outer_bias_is_added_before_rounding():
    norm, (x,) = build_norm("Gemma", torch.bfloat16), norm_inputs("Gemma", torch.bfloat16, batch=64)
    weight, _ = wider(norm)
    assert torch.equal(call_with(norm, x, weight, torch.zeros(24)), norm(x))
    assert not torch.equal(call_with(norm, x, weight, torch.full((24,), 1e-4)), norm(x))


def test_rules_are_learnt_once_for_all_norms_that_are_alike(monkeypatch):
    measured, measure = [], probe.measure
    monkeypatch.setattr(rounding, "_ALIKE", {})
    monkeypatch.setattr(probe, "measure", lambda module: measured.append(1) or measure(module))
    norm, (x,) = build_norm("Llama", torch.bfloat16), norm_inputs("Llama", torch.bfloat16)
    random = torch.get_rng_state()
    for alike in (norm, norm, deepcopy(norm)):
        call_with(alike, x, *wider(alike))
    assert len(measured) == 1
    assert torch.equal(torch.get_rng_state(), random)


def test_a_rule_is_not_shared_by_what_names_an_object(monkeypatch):
    """An identity may be given to another object once this one is gone."""
    monkeypatch.setattr(rounding, "_ALIKE", {})
    norm, (x,) = build_norm("Llama", torch.bfloat16), norm_inputs("Llama", torch.bfloat16)
    norm.extra = object()
    call_with(norm, x, *wider(norm))
    assert not rounding._ALIKE


def test_rules_do_not_keep_a_norm_alive():
    norm, (x,) = build_norm("Llama"), norm_inputs("Llama")
    call_with(norm, x, *wider(norm))
    known = len(rounding._RULES)
    del norm
    assert len(rounding._RULES) == known - 1


def test_on_meta():
    norm, (x,) = build_norm("T5", torch.bfloat16).to("meta"), norm_inputs("T5", torch.bfloat16)
    y = call_with(norm, x.to("meta"), norm.weight.float(), None)
    assert (y.shape, y.dtype) == (x.shape, torch.bfloat16)


def test_normalize_refuses_what_is_no_norm():
    with pytest.raises(
        UnsupportedError, match=r"independent of its input's scale; BatchNorm1d is not one\. See find_norms"
    ):
        normalize(nn.BatchNorm1d(4), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("shape", "x", "axis", "rows", "expected"),
    [
        ((4,), (2, 3, 4), -1, False, (4,)),
        ((5, 4), (2, 3, 5, 4), -1, False, (5, 4)),
        ((4,), (2, 4, 3), 1, False, (4, 1)),
        ((4,), (2, 4), 1, False, (4,)),
        ((2, 4), (2, 3, 4), -1, True, (2, 1, 4)),
        ((2, 4), (2, 4), -1, True, (2, 4)),
        ((2, 5, 4), (2, 3, 5, 4), -1, True, (2, 1, 5, 4)),
        ((2, 4), (2, 4, 3, 3), 1, True, (2, 4, 1, 1)),
    ],
)
def test_align(shape, x, axis, rows, expected):
    parameter, x = torch.randn(shape), torch.randn(x)
    view = align(parameter, x, axis, rows=rows)
    assert view.shape == expected
    assert (view * x).shape == x.shape
    assert torch.equal(view.flatten(), parameter.flatten())
