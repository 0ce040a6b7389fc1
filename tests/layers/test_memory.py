"""What a training step of tuned modules holds on to: hardly more than the modules themselves would."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness.counting import peak_bytes
from peft_lntune import ModuleTuningConfig, SupermaskConfig

CONFIGS = {"delta": ModuleTuningConfig, "mask": SupermaskConfig}
WIDTH, DEPTH = 64, 12
TARGETS = [str(number) for number in range(DEPTH)]


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))).to(dtype)


def tuned(kind, dtype=torch.float32):
    model = get_peft_model(build(dtype), CONFIGS[kind](target_modules=TARGETS))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def inputs(dtype=torch.float32):
    return torch.randn(8, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(2))


def step(model, x):
    torch.manual_seed(3)  # of drawn masks
    model(x).square().mean().backward()


def gradients(model, x):
    model.zero_grad()
    step(model, x)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_peaks_near_that_of_plain_parameters(kind, dtype):
    model, x = tuned(kind, dtype), inputs(dtype)
    entries = DEPTH * WIDTH * WIDTH
    peak = peak_bytes(lambda: step(model, x), torch.device("cpu"))
    gradients, temporaries, activations = 4 * entries, 6 * 4 * WIDTH * WIDTH, 40 * 4 * x.numel()
    assert peak < gradients + temporaries + activations


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_of_sums_that_are_kept(kind):
    model, x = tuned(kind), inputs()
    found = gradients(model, x)
    with torch.autograd.graph.disable_saved_tensors_hooks("so that the sums are kept"):
        kept = gradients(model, x)
    assert found
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_under_checkpointing(kind, reentrant):
    model, x = tuned(kind), inputs().requires_grad_()
    expected = gradients(model, x)
    model.zero_grad()
    torch.manual_seed(3)
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_under_autocast():
    model, x = tuned("delta"), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, x)
        with torch.autograd.graph.disable_saved_tensors_hooks("so that the sums are kept"):
            kept = gradients(model, x)
    assert all(torch.equal(found[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_between_forward_and_backward_is_refused(kind):
    model, x = tuned(kind), inputs()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, x)
    loss = model(x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_merging_between_forward_and_backward_changes_no_gradient():
    model, x = tuned("delta"), inputs()
    expected = gradients(model, x)
    model.zero_grad()
    loss = model(x).square().mean()
    model.merge_adapter()
    loss.backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters() if n in expected)
