"""Norms are found by what they compute: all of them, nothing else, and nobody notices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LNTuningConfig as StockLNTuningConfig
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lntune.core.module_tree import base_modules
from peft_lntune.norms import find as norms_module
from peft_lntune.norms import probe
from peft_lntune.norms.find import Norm, find_missed, find_norms
from tests.cases import FAMILIES, NORMS, UnheardOfNorm, build


def norms_by_class(model: nn.Module) -> list[str]:
    """Oracle for the families: a module whose class is called a norm and which has a weight."""
    return [
        name
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
        and not list(module.children())
        and "weight" in dict(module.named_parameters())
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    model = build(family)
    found = find_norms(model)
    assert list(found) == norms_by_class(model)
    for name, norm in found.items():
        module = model.get_submodule(name)
        assert norm.name == name
        assert norm.module_class == type(module).__name__
        assert norm.weight_shape == tuple(module.weight.shape)
        bias = getattr(module, "bias", None)
        assert norm.bias_shape == (None if bias is None else tuple(bias.shape))
        assert norm.offset == (1.0 if family.startswith("gemma") else 0.0)
        assert norm.axis == -1


@pytest.mark.parametrize("case", NORMS)
def test_classes(case):
    norm = NORMS[case].norm()
    bias = getattr(norm, "bias", None)
    assert find_norms(nn.Sequential(nn.Linear(3, 3), norm)) == {
        "1": Norm(
            name="1",
            module_class=type(norm).__name__,
            roles=(),
            weight_shape=tuple(norm.weight.shape),
            bias_shape=None if bias is None else tuple(bias.shape),
            offset=NORMS[case].offset,
            axis=NORMS[case].axis,
        )
    }


@settings(deadline=None, max_examples=30)
@given(width=st.integers(2, 40), bias=st.booleans(), eps=st.sampled_from([1e-12, 1e-5, 1e-3]))
def test_widths(width, bias, eps):
    groups = 1 if width % 2 else 2
    found = find_norms(nn.ModuleList([nn.LayerNorm(width, eps, bias=bias), nn.RMSNorm(width, eps)]))
    assert [(norm.weight_shape, norm.axis) for norm in found.values()] == [((width,), -1)] * 2
    (group_norm,) = find_norms(nn.GroupNorm(groups, width, eps)).values()
    assert (group_norm.weight_shape, group_norm.axis) == ((width,), 1)


class Formula(nn.Module):
    """A module with a weight, and perhaps a bias, that computes any formula."""

    def __init__(self, formula, bias=True, width=8):
        super().__init__()
        self.formula = formula
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.weight, self.bias)


def rms(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


NOT_NORMS = {
    "BatchNorm1d": nn.BatchNorm1d(8),
    "BatchNorm2d": nn.BatchNorm2d(8),
    "BatchNorm without statistics": nn.BatchNorm1d(8, track_running_stats=False),
    "Linear": nn.Linear(8, 8),
    "Embedding": nn.Embedding(8, 8),
    "Conv1d": nn.Conv1d(8, 8, 1),
    "PReLU": nn.PReLU(8),
    "Identity": nn.Identity(),
    "LayerNorm without parameters": nn.LayerNorm(8, elementwise_affine=False),
    "plain scale": Formula(lambda x, w, b: x * w, bias=False),
    "scale and bias": Formula(lambda x, w, b: x * w + b),
    "bias only": Formula(lambda x, w, b: rms(x) + b),
    "weight never used": Formula(lambda x, w, b: rms(x), bias=False),
    "norm over the batch": Formula(lambda x, w, b: x / x.square().mean().sqrt() * w, bias=False),
    "centred over the batch": Formula(lambda x, w, b: (rms(x) - rms(x).mean(0, keepdim=True)) * w, bias=False),
    "square of the weight": Formula(lambda x, w, b: rms(x) * w.square(), bias=False),
    "mixes after the weight": Formula(lambda x, w, b: (rms(x) * w).cumsum(-1), bias=False),
    "bias before the weight": Formula(lambda x, w, b: (rms(x) + b) * w),
    "sign": Formula(lambda x, w, b: x.sign() * w, bias=False),
    "tanh": Formula(lambda x, w, b: (4 * x).tanh() * w, bias=False),
    "softmax": Formula(lambda x, w, b: x.softmax(-1) * w, bias=False),
    "sum": Formula(lambda x, w, b: (rms(x) * w).sum(-1), bias=False),
    "constant": Formula(lambda x, w, b: torch.ones_like(x) * w, bias=False),
    "constant of few entries": Formula(lambda x, w, b: torch.ones_like(x) * w, bias=False, width=2),
    "raises": Formula(lambda x, w, b: 1 / 0),
}


@pytest.mark.parametrize("name", NOT_NORMS)
def test_never(name):
    assert find_norms(NOT_NORMS[name]) == {}


def test_a_formula_that_is_a_norm():
    """The counterpart of `test_never`: the class alone is no reason to be left out."""
    assert find_norms(Formula(lambda x, w, b: rms(x) * w + b))[""].bias_shape == (8,)
    assert find_norms(Formula(lambda x, w, b: rms(x) * w, bias=False))[""].bias_shape is None
    assert find_norms(Formula(lambda x, w, b: rms(x) * (w - 2), bias=False))[""].offset == -2


def test_no_filter_is_needed_for_what_is_no_norm(monkeypatch):
    """BatchNorm, Linear and their like are left out early to save time; a run tells them just as well."""
    monkeypatch.setattr(norms_module, "_NEVER", ())
    monkeypatch.setattr(norms_module, "_BATCH_NORM", ())
    assert [name for name in NOT_NORMS if find_norms(NOT_NORMS[name])] == []


def test_frozen_batch_norm():
    """What detection backbones hold: fixed statistics, so a plain scale."""
    frozen = Formula(lambda x, w, b: (x - frozen.mean) * frozen.var.rsqrt() * w + b)
    frozen.register_buffer("mean", torch.zeros(8))
    frozen.register_buffer("var", torch.ones(8))
    assert find_norms(frozen) == {}


def test_parameterless():
    model = build("olmo")
    assert find_norms(model) == {}
    listed = find_norms(model, parameterless=True)
    assert [norm.weight_shape for norm in listed.values()] == [None] * 5
    assert {norm.module_class for norm in listed.values()} == {"OlmoLayerNorm"}
    plain = [nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8, elementwise_affine=False)]
    others = [nn.GroupNorm(2, 8, affine=False), nn.Identity(), nn.Dropout(), nn.Softmax(-1), nn.Tanh(), nn.Flatten()]
    assert list(find_norms(nn.ModuleList(plain + others), parameterless=True)) == ["0", "1", "2"]


def count_probes(monkeypatch) -> list[nn.Module]:
    probed, examine = [], probe.examine
    monkeypatch.setattr(probe, "examine", lambda module: probed.append(module) or examine(module))
    return probed


def test_seven_billion_parameters_on_meta(monkeypatch):
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        )
    assert sum(p.numel() for p in model.parameters()) > 6.5e9
    probed = count_probes(monkeypatch)
    assert len(find_norms(model)) == 65
    assert len(probed) == 1
    assert all(p.is_meta for p in model.parameters())


def test_alike_norms_are_probed_once_and_others_apart(monkeypatch):
    probed = count_probes(monkeypatch)
    a, b, c = nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.LayerNorm(8, eps=1e-3)
    assert len(find_norms(nn.ModuleList([a, b, c, nn.LayerNorm(8), nn.LayerNorm(9)]))) == 5
    assert len(probed) == 4


@pytest.mark.parametrize("family", ["deberta-v2", "qwen3", "t5", "mamba2", "clip"])
def test_meta_is_like_cpu(family):
    real = find_norms(build(family))
    with torch.device("meta"):
        assert find_norms(FAMILIES[family].model()) == real


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_does_not_matter(dtype):
    assert find_norms(build("gemma3").to(dtype)) == find_norms(build("gemma3"))


def test_quantized():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = build("llama")
    expected = find_norms(model)
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ != "Parameter"
    assert find_norms(model) == expected


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's LN tuning warns of every norm but LayerNorm
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_an_adapted_model_has_the_same_norms(family):
    expected = find_norms(build(family))
    for config in (LoraConfig(target_modules="all-linear"), StockLNTuningConfig(target_modules=list(expected))):
        adapted = get_peft_model(build(family), config)
        assert find_norms(adapted.base_model.model) == expected
    saved = get_peft_model(build(family), LoraConfig(target_modules="all-linear", modules_to_save=[*expected][-1:]))
    assert find_norms(saved.base_model.model) == expected


def test_modules_added_by_a_tuner_are_not_the_models():
    class AddedByATuner(nn.Module):
        adapter_layer_names = ("norm",)

        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

    model = nn.ModuleDict({"added": AddedByATuner(), "norm": nn.LayerNorm(4)})
    assert list(find_norms(model)) == ["norm"]


def test_a_child_called_base_layer_is_no_wrapper():
    model = nn.ModuleDict({"base_layer": nn.LayerNorm(4), "level1": nn.LayerNorm(4)})
    assert list(find_norms(model)) == ["base_layer", "level1"]


def test_a_shared_norm_counts_once():
    norm = nn.LayerNorm(4)
    assert list(find_norms(nn.ModuleList([norm, norm]))) == ["0"]


def test_base_modules_without_adapters():
    model = build("t5")
    assert base_modules(model) == dict(model.named_modules())


class Recorder(nn.LayerNorm):
    """A norm that keeps books in its forward."""

    def __init__(self):
        super().__init__(4)
        self.calls, self.seen = 0, []
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen.append(torch.rand(()))
        self.steps += 1
        return super().forward(x)


def test_nothing_is_left_behind():
    model = nn.Sequential(build("mixtral"), Recorder(), nn.BatchNorm1d(4)).train()
    hooked = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: hooked.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = [dict(module.__dict__) for module in model.modules()]
    random = torch.get_rng_state()
    assert "1" in find_norms(model, parameterless=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [dict(module.__dict__) for module in model.modules()] == states
    assert all(module.training for module in model.modules())
    assert model[1].seen == []
    assert hooked == []


def test_inside_other_contexts():
    """A default device, a default dtype or autocast of the caller's do not reach the probe."""
    expected = find_norms(build("gemma"))
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert find_norms(build("gemma")) == expected


def with_more(norm: nn.Module, **more: nn.Module | nn.Parameter) -> nn.Module:
    for name, value in more.items():
        setattr(norm, name, value)
    return norm


@pytest.mark.parametrize(
    "norm",
    [
        UnheardOfNorm(2**20 + 1),
        with_more(UnheardOfNorm(4), projection=nn.Linear(4, 4)),
        with_more(UnheardOfNorm(4), alpha=nn.Parameter(torch.ones(1))),
        with_more(UnheardOfNorm(4), bias=nn.Parameter(torch.ones(1))),
    ],
    ids=["too wide", "a child with parameters", "another parameter", "a bias of another shape"],
)
def test_what_cannot_be_a_norm_is_not_run(norm, monkeypatch):
    probed = count_probes(monkeypatch)
    assert "" not in find_norms(norm)
    assert norm not in probed


def test_a_forward_put_on_one_module_is_not_run():
    norm = nn.LayerNorm(4)
    norm.forward = lambda x: pytest.fail("the model's own forward ran")
    assert list(find_norms(norm)) == [""]


def test_what_inherits_from_a_norm_and_computes_more_is_named():
    class Twice(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight

    model = nn.Sequential(nn.LayerNorm(8), Twice(8), nn.PReLU(8))
    assert list(find_norms(model)) == ["0"]
    assert {name: one.module_class for name, one in find_missed(model).items()} == {"1": "Twice"}
