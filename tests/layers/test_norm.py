"""One norm in a layer: its bits at the start, its values after, its dtype always; for every norm class of the table."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_lntune import LNTuningConfig
from tests import cases
from tests.adapted import DTYPES, HALVES, adapt, deltas, fill

NORMS = list(cases.NORMS)


class Holder(nn.Module):
    """A model that is one norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x, *gate):
        return self.norm(x, *gate)


def held(case, dtype=torch.float32, batch=64):
    """A model of one norm, its own output and its inputs; with and without a delta, entries have usual sizes."""
    model = Holder(cases.build_norm(case, dtype))
    x = cases.norm_inputs(case, dtype, batch)
    with torch.no_grad():
        return model, model(*x), x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORMS)
class TestEveryClass:
    def test_identity_at_the_start(self, case, dtype):
        model, base, x = held(case, dtype)
        peft_model = get_peft_model(model, LNTuningConfig()).eval()
        assert torch.equal(peft_model(*x).detach(), base)
        with torch.no_grad():
            kept, again = peft_model(*x), peft_model(*x)
        assert torch.equal(kept, base)
        assert torch.equal(again, base)

    def test_identity_of_a_masked_delta(self, case, dtype):
        model, base, x = held(case, dtype)
        peft_model = get_peft_model(model, LNTuningConfig()).eval()
        masks = {name: torch.rand(delta.shape) < 0.3 for name, delta in deltas(peft_model).items()}
        peft_model.set_masks(masks)
        assert torch.equal(peft_model(*x).detach(), base)

    def test_the_output_dtype_never_changes(self, case, dtype):
        model, base, x = held(case, dtype)
        peft_model = get_peft_model(model, LNTuningConfig()).eval()
        peft_model.add_adapter("second", LNTuningConfig())
        for seed, name in enumerate(("default", "second")):
            fill(peft_model, name, seed=seed)
        tuned = peft_model(*x)
        assert tuned.dtype == base.dtype
        assert not torch.equal(tuned, base)
        if dtype == torch.float32:
            with torch.autocast("cpu", torch.bfloat16):
                assert peft_model(*x).dtype == peft_model.get_base_model().norm.base_layer(*x).dtype
        names = ["default", "second", "__base__"] * (len(x[0]) // 3) + ["__base__"] * (len(x[0]) % 3)
        assert peft_model(*x, adapter_names=names).dtype == base.dtype

    def test_tuned_values_are_those_of_the_norm_with_other_parameters(self, case, dtype):
        """The same norm in float64, with base plus delta as its parameters, rounded once at the end."""
        model, base, x = held(case, dtype)
        peft_model = get_peft_model(model, LNTuningConfig()).eval()
        fill(peft_model, "default")
        wide = cases.build_norm(case, dtype).double()
        with torch.no_grad():
            for name, delta in deltas(peft_model).items():
                wide.get_parameter(name.removeprefix("norm.")).add_(delta.dense())
            expected = wide(*(t.double() for t in x)).to(base.dtype)
            # Norms round their input, xhat and the product apart: three roundings of half a unit each, and once
            # more for the norm's own statistics.
            unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
            torch.testing.assert_close(peft_model(*x), expected, rtol=2 * unit, atol=8 * unit)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", NORMS)
def test_a_delta_far_below_the_spacing_of_the_base_changes_the_output(case, dtype):
    """Above 1/2 float16 has a spacing of 2^-11, bfloat16 of 2^-8. A delta of 2^-13 is lost in a merged norm, else felt.

    Weights are not powers of two here: by these a norm that rounds xhat first (Llama's) multiplies without rounding.
    """
    model = Holder(cases.build_norm(case, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 2.0)
        (x, *gate) = cases.norm_inputs(case, dtype, batch=512)
        base = model(x, *gate)
        peft_model = get_peft_model(model, LNTuningConfig()).eval()
        for delta in deltas(peft_model).values():
            delta.weight.fill_(2.0**-13)
        changed = (peft_model(x, *gate) != base).float().mean().item()
        assert changed > 0.001  # a change of 2^-13 crosses a rounding boundary in one output of a hundred or so
        peft_model.merge_adapter()
        assert torch.equal(peft_model(x, *gate), base)


class TestMixedBatch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", NORMS)
    def test_row_i_is_what_its_adapter_alone_says(self, case, dtype):
        model, _, x = held(case, dtype, batch=6)
        peft_model = get_peft_model(model, LNTuningConfig(), adapter_name="a").eval()
        peft_model.add_adapter("b", LNTuningConfig())
        peft_model.add_adapter("weight-only", LNTuningConfig(tune="weight"))
        for seed, name in enumerate(("a", "b", "weight-only")):
            fill(peft_model, name, seed=seed)
        names = ["b", "__base__", "a", "weight-only", "b", "a"]
        with torch.no_grad():
            mixed = peft_model(*x, adapter_names=names)
            for i, name in enumerate(names):
                if name == "__base__":
                    with peft_model.disable_adapter():
                        alone = peft_model(*x)[i]
                else:
                    peft_model.set_adapter(name)
                    alone = peft_model(*x)[i]
                # float32: fused kernels sum in another order. bfloat16: both are right but for their last rounding.
                rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2 * torch.finfo(dtype).eps, 2e-2)
                torch.testing.assert_close(mixed[i], alone, rtol=rtol, atol=atol)

    def test_group_norm_over_images(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.GroupNorm(4, 8)).eval()
        x = torch.randn(3, 3, 6, 6)
        peft_model = get_peft_model(model, LNTuningConfig(), adapter_name="a").eval()
        peft_model.add_adapter("b", LNTuningConfig())
        for seed, name in enumerate(("a", "b")):
            fill(peft_model, name, seed=seed)
        with torch.no_grad():
            mixed = peft_model(x, adapter_names=["b", "a", "b"])
            for name, rows in (("a", [1]), ("b", [0, 2])):
                peft_model.set_adapter(name)
                torch.testing.assert_close(mixed[rows], peft_model(x)[rows], rtol=1e-5, atol=1e-5)


class TestStrangers:
    """What others attach to a norm keeps working, tuned, mixed or not."""

    @pytest.mark.parametrize("case", ["LayerNorm", "Llama"])
    def test_hooks_of_the_norm_run(self, case):
        model, _, x = held(case, batch=2)
        seen = []
        model.norm.register_forward_hook(lambda module, args, y: seen.append(tuple(y.shape)))
        model.norm.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
        peft_model = get_peft_model(model, LNTuningConfig()).eval()
        fill(peft_model, "default")
        for options in ({}, {"adapter_names": ["default", "__base__"]}):
            y = peft_model(*x, **options)
            delta = deltas(peft_model).get("norm.bias")
            bias = model.norm.base_parameter("bias") + delta.weight if delta is not None else torch.zeros(24)
            torch.testing.assert_close(y[0, 0], bias, rtol=0, atol=1e-6)  # an input of zeros leaves the bias
        assert seen == [tuple(x[0].shape)] * 2

    def test_a_forward_that_raises_leaves_the_norm_as_it_was(self):
        model, base, x = held("Llama", batch=2)
        peft_model = get_peft_model(model, LNTuningConfig()).eval()
        norm = model.norm.base_layer
        before = dict(norm.__dict__)
        handle = norm.register_forward_hook(_fail)
        for options in ({}, {"adapter_names": ["default", "__base__"]}):
            with pytest.raises(RuntimeError, match="inside the norm"):
                peft_model(*x, **options)
        handle.remove()
        assert norm.__dict__.keys() == before.keys()
        assert "weight" not in norm.__dict__
        assert torch.equal(peft_model(*x).detach(), base)


def _fail(*_):
    raise RuntimeError("inside the norm")


class TestChannelsLast:
    """Torch 2.13 ends the process in the backward pass of a GroupNorm on a CPU whose input wants no gradient."""

    def images(self) -> Tensor:
        return torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("frozen", [True, False])
    def test_the_input_of_the_kernel_takes_a_gradient(self, frozen, monkeypatch):
        peft_model = adapt(nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)).requires_grad_(not frozen), std=0.1)
        layer, seen, kernel = peft_model.base_model.model[1], [], torch.nn.functional.group_norm

        def group_norm(x: Tensor, *args: Any, **options: Any) -> Tensor:
            assert x.requires_grad
            seen.append(x)
            return kernel(x, *args, **options)

        monkeypatch.setattr(torch.nn.functional, "group_norm", group_norm)
        x = self.images().requires_grad_(not frozen)
        y = layer(x)
        assert len(seen) == 1
        y.square().sum().backward()
        gradients = [delta.weight.grad.clone() for delta in deltas(peft_model).values()]

        for delta in deltas(peft_model).values():
            delta.weight.grad = None
        plain = layer(x.detach().contiguous().requires_grad_())
        torch.testing.assert_close(y, plain)
        plain.square().sum().backward()
        for delta, gradient in zip(deltas(peft_model).values(), gradients, strict=True):
            torch.testing.assert_close(gradient, delta.weight.grad)

    def test_without_gradients_nothing_is_asked(self):
        peft_model = adapt(nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)), std=0.1)
        with torch.no_grad():
            assert not peft_model.base_model.model[1](self.images()).requires_grad
