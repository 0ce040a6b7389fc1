"""What is learnt about a norm is true of the forward that runs, and nothing is learnt from what is not real."""

import gc
import weakref
from functools import partial
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from peft_lntune.norms import affine, rounding
from peft_lntune.norms.affine import NormCall, call_with, with_rows
from tests.cases import build_norm, norm_inputs
from tests.tolerance import assert_close


@pytest.fixture(autouse=True)
def _knows_nothing(monkeypatch):
    monkeypatch.setattr(rounding, "_RULES", weakref.WeakKeyDictionary())
    monkeypatch.setattr(rounding, "_ALIKE", weakref.WeakKeyDictionary())


def kernel(self, x: Tensor) -> Tensor:
    """One that takes one dtype, such as bfloat16 only."""
    if self.weight.dtype != x.dtype or x.dtype != torch.bfloat16:
        raise RuntimeError("this kernel takes bfloat16")
    return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def flexible(self, x: Tensor) -> Tensor:
    """One that takes a wider weight, and rounds once."""
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
    return (wide * self.weight.float()).to(x.dtype)


class Other(nn.Module):
    forward = kernel


PUT = {
    "a method": lambda norm, run: norm.__setattr__("forward", MethodType(run, norm)),
    "in the instance's dict": lambda norm, run: norm.__dict__.update(forward=run.__get__(norm, type(norm))),
    "a partial": lambda norm, run: norm.__setattr__("forward", partial(run, norm)),
    "a partial by keyword": lambda norm, run: norm.__setattr__("forward", partial(run, self=norm)),
    "a closure": lambda norm, run: norm.__setattr__("forward", lambda x: run(norm, x)),
}


def case() -> tuple[nn.Module, Tensor, Tensor]:
    norm, (x,) = build_norm("Llama", torch.bfloat16), norm_inputs("Llama", torch.bfloat16, batch=32)
    return norm, x, norm.weight.detach().float()


@pytest.mark.parametrize("run", [kernel, flexible], ids=["one dtype", "any dtype"])
@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("called", [False, True], ids=["before the first call", "after it"])
def test_a_kernel_in_the_instance_is_used_as_it_is(put, run, called):
    norm, x, weight = case()
    bound = NormCall(norm).bind(weight, None)
    if called:
        assert torch.equal(call_with(norm, x, weight, None), norm(x))
        assert torch.equal(bound(x), norm(x))
    if "keyword" in put:
        PUT[put](norm, lambda x, self: run(self, x))
    else:
        PUT[put](norm, run)
    base = norm(x)
    assert torch.equal(call_with(norm, x, weight, None), base)
    assert torch.equal(bound(x), base)
    y = call_with(norm, x, 3 * weight, None)  # a power of two more or less: exact in bfloat16 up to one rounding
    torch.testing.assert_close(y, 3 * base, rtol=2**-6, atol=0)
    assert y.dtype == base.dtype


@pytest.mark.parametrize("called", [False, True], ids=["before the first call", "after it"])
def test_a_kernel_in_the_class_is_used_as_it_is(called, monkeypatch):
    norm, x, weight = case()
    bound = NormCall(norm).bind(weight, None)
    if called:
        call_with(norm, x, weight, None), bound(x)
    monkeypatch.setattr(type(norm), "forward", kernel)
    assert torch.equal(call_with(norm, x, weight, None), kernel(norm, x))
    assert torch.equal(bound(x), kernel(norm, x))
    monkeypatch.undo()
    assert torch.equal(call_with(norm, x, weight, None), norm(x))
    assert torch.equal(bound(x), norm(x))


def test_a_kernel_in_the_class_of_torchs_own_norm(monkeypatch):
    norm, x = nn.LayerNorm(8), torch.randn(3, 8)
    bound = NormCall(norm).bind(norm.weight, norm.bias)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: F.layer_norm(x, (8,), self.weight, self.bias) + 1)
    assert torch.equal(call_with(norm, x, norm.weight, norm.bias), norm(x))
    assert torch.equal(bound(x), norm(x))


def test_a_kernel_that_takes_a_wider_weight_feels_a_small_delta():
    norm, x, weight = case()
    norm.forward = MethodType(flexible, norm)
    small = weight * torch.finfo(torch.bfloat16).eps / 8
    assert torch.equal((weight + small).bfloat16(), norm.weight)
    assert not torch.equal(call_with(norm, x, weight + small, None), norm(x))


def test_a_gradient_passes_a_kernel_of_one_dtype():
    norm, x, weight = case()
    norm.forward = MethodType(kernel, norm)
    weight.requires_grad_()
    call_with(norm, x, weight, None).float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad != 0).all()


def test_a_rule_keeps_neither_a_norm_nor_its_kernel_alive():
    norm, x, weight = case()
    PUT["a closure"](norm, flexible)
    call_with(norm, x, weight, None)
    gone = weakref.ref(norm)
    del norm
    gc.collect()
    assert gone() is None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, _, weight = case()
        self.delta = nn.Parameter(torch.full_like(weight, 0.25), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return call_with(self.norm, x, self.norm.weight + self.delta, None)


def faked(layer, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(x))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    return layer


TRACERS = {
    "export": lambda layer, x: torch.export.export(layer, (x,)).module(),
    "strict export": lambda layer, x: torch.export.export(layer, (x,), strict=True).module(),
    "jit.trace": lambda layer, x: torch.jit.trace(layer, (x,), check_trace=False),
    "make_fx": lambda layer, x: make_fx(layer)(x),
    "make_fx, fake": lambda layer, x: make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "compile": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True),
    "fake tensors": faked,
    "vmap": lambda layer, x: torch.vmap(layer),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # a parameter stood in, and went
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_norm_that_never_ran_is_traced(tracer):
    torch._dynamo.reset()
    layer, (_, x, _) = Layer(), case()
    with torch.no_grad():
        program = TRACERS[tracer](layer, x)
        if tracer in ("export", "make_fx", "jit.trace", "fake tensors", "make_fx, fake"):
            assert not rounding._RULES  # nothing is remembered that was learnt meanwhile
            assert not rounding._ALIKE
        traced = program(x)
        eager = layer(x)
        assert torch.equal(eager, Layer()(x))
        assert torch.equal(traced, eager)
        assert torch.equal(program(2 * x), layer(2 * x))


class OfOneWeight(nn.Module):
    """Reads the first sample's weight alone, as a kernel does that knows one weight."""

    variance_epsilon = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return x * scale * self.weight.flatten()[:24]


@pytest.mark.parametrize(
    ("norm", "takes"),
    [(lambda: build_norm("Llama"), True), (lambda: nn.RMSNorm(24, eps=1e-6), False), (OfOneWeight, False)],
    ids=["step by step", "fused", "of one weight"],
)
def test_a_forward_that_takes_weights_per_sample_runs_once(norm, takes, monkeypatch):
    norm, x = norm(), norm_inputs("Llama", batch=3)[0]
    weight = torch.randn(3, 1, x.shape[-1])
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    trained = with_rows(norm, norm.forward, x, weight.requires_grad_(), None).detach()
    calls, beneath = [], rounding.neutral
    monkeypatch.setattr(affine, "neutral", lambda *args: calls.append(1) or beneath(*args))
    with torch.no_grad():
        y = with_rows(norm, norm.forward, x, weight, None)
    assert (not calls) is takes
    assert torch.equal(y, trained)
    assert_close(y, exact.float())
