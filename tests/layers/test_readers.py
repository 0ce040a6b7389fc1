"""Whoever reads `layer.weight` and computes with it in place of calling the layer gets what the layer computes with."""

import importlib.util
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_lntune import (
    AdapterBank,
    BottleneckConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    SupermaskConfig,
    UnifiedConfig,
)
from peft_lntune.errors import RoutingError
from peft_lntune.layers.routed import RoutedParameter
from tests.adapted import adapt, build, deltas, inputs, layers, output, said
from tests.tolerance import assert_close


def rms_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """What kernels compute with the parameters they read; the product has the dtype of the input, as in Unsloth's."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + layer.variance_epsilon)
    assert layer.weight.dtype == x.dtype, "this kernel takes one dtype"
    return layer.weight * wide.to(x.dtype)


def read_by_kernels(model: nn.Module) -> None:
    """Put a forward onto every tuner layer that does not call it: as Liger does it, into the instance's dict."""
    for layer in layers(model):
        layer.__dict__["forward"] = MethodType(rms_norm, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestParameters:
    def test_they_are_what_merging_writes(self, dtype):
        peft_model = adapt(build("bert", dtype), "a", "b")
        for active in (["a"], ["b"], ["a", "b"]):
            peft_model.base_model.set_adapter(active)
            read = [(layer.weight, layer.bias) for layer in layers(peft_model)]
            peft_model.merge_adapter()
            for layer, (weight, bias) in zip(layers(peft_model), read, strict=True):
                assert weight.dtype == bias.dtype == dtype
                assert torch.equal(weight, layer.get_base_layer().weight)
                assert torch.equal(bias, layer.get_base_layer().bias)
                assert torch.equal(layer.weight, weight)  # merged, there is nothing to add
            peft_model.unmerge_adapter()

    @pytest.mark.parametrize("merged", [False, True])
    def test_disabled_they_are_the_bases(self, dtype, merged):
        model = build("bert", dtype)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        peft_model = adapt(model)
        if merged:
            peft_model.merge_adapter()
        with peft_model.disable_adapter():
            for layer in layers(peft_model):
                assert torch.equal(layer.weight, before[f"{layer.label}.weight"])
                assert torch.equal(layer.bias, before[f"{layer.label}.bias"])

    def test_a_gradient_reaches_the_deltas(self, dtype):
        peft_model = adapt(build("bert", dtype))
        sum(layer.weight.sum() + layer.bias.sum() for layer in layers(peft_model)).backward()
        assert all(torch.equal(d.weight.grad, torch.ones_like(d.weight)) for d in deltas(peft_model).values())

    def test_what_is_not_tuned_is_the_base_itself(self, dtype):
        peft_model = adapt(build("llama", dtype), tune="weight")
        for layer in layers(peft_model):
            assert not hasattr(layer, "bias")
            assert layer.base_parameter("weight") is layer.get_base_layer().weight
        peft_model = adapt(build("bert", dtype), tune="bias")
        assert all(layer.weight is layer.get_base_layer().weight for layer in layers(peft_model))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hooks_of_a_norm_read_what_it_computes_with(family):
    model, batch = build(family, torch.float64), inputs(family)
    for norm in [module for module in model.modules() if type(module).__name__ in ("LayerNorm", "LlamaRMSNorm")]:
        norm.register_forward_pre_hook(lambda module, given: (given[0] + module.weight,))
        norm.register_forward_hook(lambda module, given, y: y * module.weight)
    peft_model = adapt(model)
    before = said(peft_model, batch)
    before.square().sum().backward()
    gradients = {place: delta.weight.grad for place, delta in deltas(peft_model).items()}
    peft_model.merge_adapter()
    for layer in layers(peft_model):
        layer.base_layer.requires_grad_()
    after = said(peft_model, batch)
    after.square().sum().backward()
    assert_close(before, after)
    for layer in layers(peft_model):
        for name, parameter in layer.base_layer.named_parameters():
            assert_close(gradients[f"{layer.label}.{name}"], parameter.grad, name=layer.label)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_put_onto_layers_answers_as_the_merged_model(dtype):
    peft_model, batch = adapt(build("llama", dtype)), inputs("llama")
    peft_model.merge_adapter()
    merged = output(peft_model, batch)
    peft_model.unmerge_adapter()
    with peft_model.disable_adapter():
        base = output(peft_model, batch)
    read_by_kernels(peft_model)
    assert torch.equal(output(peft_model, batch), merged)
    assert torch.equal(said(peft_model, batch).detach(), merged)
    with peft_model.disable_adapter():
        assert torch.equal(output(peft_model, batch), base)
    peft_model.merge_adapter()
    assert torch.equal(output(peft_model, batch), merged)


def test_a_forward_put_onto_layers_trains_them_by_any_optimizer():
    peft_model, batch = adapt(build("llama", torch.bfloat16), std=0), inputs("llama")
    read_by_kernels(peft_model)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.05, fused=True)
    before = output(peft_model, batch)
    said(peft_model, batch).float().square().sum().backward()
    optimizer.step()
    assert all((delta.weight != 0).all() for delta in deltas(peft_model).values())
    assert not torch.equal(output(peft_model, batch), before)


class Named(nn.Module):
    """A norm that has other names for its weight and its bias."""

    def __init__(self, weight: str, bias: str) -> None:
        super().__init__()
        self.names = weight, bias
        setattr(self, weight, nn.Parameter(torch.rand(4)))
        setattr(self, bias, nn.Parameter(torch.rand(4)))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (4,), *(getattr(self, name) for name in self.names))


class NamedNorm(Named):
    """Found by its class's name."""


@pytest.mark.parametrize("names", [("gamma", "beta"), ("scale", "shift"), ("a_2", "b_2")], ids="-".join)
def test_by_a_norms_own_names_it_reads_the_same(names):
    peft_model = adapt(nn.Sequential(NamedNorm(*names)), "a", "b")
    (layer,) = layers(peft_model)
    base = layer.get_base_layer()
    for parameter, name in zip(("weight", "bias"), names, strict=True):
        value = getattr(layer, name)
        assert torch.equal(value, getattr(layer, parameter))
        assert torch.equal(value, layer.effective(parameter, ["a"]))
        assert not torch.equal(value, getattr(base, name))
        value.sum().backward()
        assert torch.equal(layer.deltas(parameter)["a"].weight.grad, torch.ones(4))
        with peft_model.disable_adapter():
            assert torch.equal(getattr(layer, name), getattr(base, name))
    layer.__dict__["forward"] = MethodType(NamedNorm.forward, layer)
    with pytest.raises(RoutingError, match="the weight of 0 differs from row to row"):
        peft_model(torch.rand(2, 3, 4), adapter_names=["a", "b"])


class TestRows:
    """Every row its own adapter: a reader would give one of them to all."""

    def test_a_reader_is_refused(self):
        peft_model, batch = adapt(build("llama"), "a", "b"), inputs("llama")
        read_by_kernels(peft_model)
        with pytest.raises(RoutingError, match=r"the weight of model\.layers\.0\.input_layernorm differs from row to"):
            output(peft_model, batch, adapter_names=["a", "b", "a"])
        output(peft_model, batch)

    def test_so_it_is_under_a_bank(self):
        trained, batch = adapt(build("llama")), inputs("llama")
        peft_model = adapt(build("llama"))
        bank = AdapterBank(peft_model)
        bank.add("tenant", (trained, "default"))
        bank.attach()
        read_by_kernels(peft_model)
        with bank.route(["tenant"] * 3), pytest.raises(RoutingError, match="differs from row to row"):
            output(peft_model, batch)

    def test_facts_can_be_asked_and_nothing_else(self):
        stand_in = RoutedParameter.like(torch.ones(2, 3, dtype=torch.bfloat16), "the weight of norm")
        assert isinstance(stand_in, Tensor)
        assert (stand_in.dtype, stand_in.shape, stand_in.device.type) == (torch.bfloat16, (2, 3), "cpu")
        assert (stand_in.dim(), stand_in.numel(), stand_in.is_floating_point()) == (2, 6, True)
        uses = [
            lambda: stand_in + 1,
            lambda: stand_in.data,
            lambda: stand_in.T,
            lambda: stand_in[0],
            lambda: stand_in.to(torch.float32),
            lambda: F.linear(torch.ones(1, 3), stand_in),
            lambda: torch.cat([torch.ones(2, 3), stand_in]),
            lambda: stand_in.detach(),
            lambda: stand_in.tolist(),
        ]
        for use in uses:
            with pytest.raises(RoutingError, match="the weight of norm differs from row to row"):
                use()


ENCODER_CONFIGS = {
    "norms": lambda: LNTuningConfig(init_weights=False),
    "modules": lambda: ModuleTuningConfig(target_modules=["linear1", "linear2", "out_proj"], init_weights=False),
    "masks": lambda: SupermaskConfig(target_modules=["linear1", "linear2", "out_proj"], init_weights=False),
    "bottlenecks": lambda: BottleneckConfig(roles=["ffn"], init_weights=False),
}


class TestTorchsEncoder:
    """In evaluation `nn.TransformerEncoder` reads all weights for one fused operation. 1e-5: a few float32 sums."""

    def encoder(self, norm_first=False):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    def slowly(self, model, x):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad():
                return model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("kind", ENCODER_CONFIGS)
    def test_it_answers_as_module_by_module(self, kind, norm_first):
        model, x = self.encoder(norm_first), torch.randn(3, 5, 16)
        base = self.slowly(model, x)
        peft_model = get_peft_model(model, ENCODER_CONFIGS[kind]()).eval()
        expected = self.slowly(peft_model, x)
        assert (expected - base).abs().max() > 1e-2
        with torch.no_grad():
            torch.testing.assert_close(peft_model(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(peft_model(x).detach(), expected, rtol=0, atol=1e-5)
        with torch.no_grad(), peft_model.disable_adapter():
            torch.testing.assert_close(peft_model(x), base, rtol=0, atol=1e-5)
        if kind != "bottlenecks":
            peft_model.merge_adapter()
            with torch.no_grad():
                torch.testing.assert_close(peft_model(x), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kind", ["norms", "bottlenecks"])
    def test_mixed_batches_are_right(self, kind):
        peft_model, x = get_peft_model(self.encoder(), ENCODER_CONFIGS[kind]()).eval(), torch.randn(3, 5, 16)
        peft_model.add_adapter("other", ENCODER_CONFIGS[kind]())
        peft_model.eval()
        alone = {}
        for name in ("default", "other"):
            peft_model.set_adapter(name)
            alone[name] = self.slowly(peft_model, x)
        names = ["default", "other", "default"]
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        with torch.no_grad():
            torch.testing.assert_close(peft_model(x, adapter_names=names), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kind", ["modules", "masks"])
    def test_a_mixed_batch_over_an_attentions_projection_is_refused(self, kind):
        """`nn.MultiheadAttention` never calls its `out_proj`, it reads the weight."""
        peft_model, x = get_peft_model(self.encoder(), ENCODER_CONFIGS[kind]()).eval(), torch.randn(2, 5, 16)
        with torch.no_grad(), pytest.raises(RoutingError, match=r"the weight of layers\.0\.self_attn\.out_proj"):
            peft_model(x, adapter_names=["default", "__base__"])

    def test_an_attention_alone(self):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True)).eval(), torch.randn(2, 5, 16)
        base = model[0](x, x, x)[0]
        peft_model = get_peft_model(model, ModuleTuningConfig(target_modules=["out_proj"], init_weights=False)).eval()
        attention = peft_model.base_model.model[0]
        with torch.no_grad():
            fast = attention(x, x, x)[0]
        slow = attention(x, x, x)[0]
        torch.testing.assert_close(fast, slow.detach(), rtol=0, atol=1e-5)
        assert not torch.allclose(slow, base, atol=1e-3)
        slow.sum().backward()
        assert all(delta.weight.grad is not None for delta in deltas(peft_model).values())


NESTED_CONFIGS = {
    **ENCODER_CONFIGS,
    "norms of a later layer": lambda: LNTuningConfig(init_weights=False, layers_to_transform=[1]),
    "bottlenecks of a later layer": lambda: BottleneckConfig(
        roles=["ffn"], init_weights=False, layers_to_transform=[1]
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
class TestNestedTensors:
    """Given a padding mask in evaluation, torch's encoder nests the batch, as its defaults have it."""

    @pytest.fixture
    def batch(self):
        torch.manual_seed(1)
        padding = torch.arange(5) >= torch.tensor([[3], [4], [5]])
        return torch.randn(3, 5, 16), padding

    def encoder(self):
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 3).eval()

    def slowly(self, model, x, padding):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return model(x, src_key_padding_mask=padding)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    @pytest.mark.parametrize("kind", NESTED_CONFIGS)
    def test_values_and_gradients(self, kind, batch):
        x, padding = batch
        model = get_peft_model(self.encoder(), NESTED_CONFIGS[kind]()).eval()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        expected = self.slowly(model, x, padding)[~padding]
        float_padding = torch.zeros(3, 5).masked_fill(padding, float("-inf"))
        inner = model.base_model.model
        answers = [
            model(x, src_key_padding_mask=padding),
            model(x, None, padding),
            model(x, src_key_padding_mask=float_padding),
            inner(src=x, src_key_padding_mask=padding),
        ]
        gradients = torch.autograd.grad(expected.square().sum(), trained)
        for answer in answers:
            torch.testing.assert_close(answer[~padding], expected, rtol=0, atol=1e-5)
            for ours, theirs in zip(
                torch.autograd.grad(answer[~padding].square().sum(), trained), gradients, strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            nested = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(nested[~padding], expected.detach(), rtol=0, atol=1e-5)
        assert not nested[padding].any()  # nested, as without an adapter
        with model.disable_adapter(), torch.no_grad():
            base = model(x, src_key_padding_mask=padding)
            assert torch.equal(base, self.encoder()(x, src_key_padding_mask=padding))

    @pytest.mark.parametrize("kind", ["norms", "norms of a later layer", "bottlenecks"])
    @pytest.mark.parametrize("grad", [False, True])
    def test_mixed_batches(self, kind, grad, batch):
        x, padding = batch
        model = get_peft_model(self.encoder(), NESTED_CONFIGS[kind]())
        model.add_adapter("other", NESTED_CONFIGS[kind]())
        model.eval()
        names, expected = ["other", "default", "__base__"], {}
        for name in ("default", "other"):
            model.set_adapter(name)
            expected[name] = self.slowly(model, x, padding).detach()
        expected["__base__"] = self.slowly(self.encoder(), x, padding).detach()
        with torch.set_grad_enabled(grad):
            mixed = model(x, src_key_padding_mask=padding, adapter_names=names).detach()
        for row, name in enumerate(names):
            valid = ~padding[row]
            torch.testing.assert_close(mixed[row][valid], expected[name][row][valid], rtol=0, atol=1e-5)

    def test_nothing_is_left_after_unloading(self):
        for mixed in (False, True):
            model = get_peft_model(self.encoder(), LNTuningConfig(), mixed=mixed)
            model.add_adapter("other", LNTuningConfig())
            assert len(model.base_model.model._forward_pre_hooks) == 1
            plain = model.unload()
            assert not plain._forward_pre_hooks
            assert not plain._forward_pre_hooks_with_kwargs


# Liger: its kernels are Triton's, so their place is taken by what they compute.


class _Formula:
    @staticmethod
    def apply(x, weight, eps, offset, casting_mode, in_place, row_mode):
        wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return (wide.to(x.dtype) * (weight + offset)).to(x.dtype)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", [False, True], ids=["after wrapping", "before wrapping"])
def test_trainer_with_liger_kernels(dtype, before, monkeypatch, tmp_path):
    from liger_kernel.transformers import rms_norm as liger
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    monkeypatch.setattr(liger, "LigerRMSNormFunction", _Formula)
    kernels = {"rms_norm": True, "rope": False, "swiglu": False, "fused_linear_cross_entropy": False}
    model, batch = build("llama", dtype), inputs("llama")
    if before:
        _apply_liger_kernel_to_instance(model=model, **kernels)
    config = UnifiedConfig(parts=[LNTuningConfig(), LoraConfig(target_modules=["q_proj"])])
    peft_model = get_peft_model(model, config)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(3)]
    for row in rows:
        row["labels"] = row["input_ids"]
    arguments = hf.TrainingArguments(
        tmp_path,
        max_steps=2,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        use_liger_kernel=not before,
        liger_kernel_config=None if before else kernels,
    )
    hf.Trainer(peft_model, arguments, train_dataset=rows).train()
    assert all((delta.weight != 0).any() for delta in deltas(peft_model).values())
    peft_model.eval()
    read = output(peft_model, batch)
    peft_model.merge_adapter()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]  # before wrapping the sum is not rounded to bfloat16
    torch.testing.assert_close(read, output(peft_model, batch), rtol=0, atol=tolerance)
