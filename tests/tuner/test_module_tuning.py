"""Deltas on chosen modules: which parameters they are, and that training them is plain fine-tuning of these."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from peft_lntune import LNTuningConfig, ModuleTuningConfig, SupermaskConfig, UnifiedConfig, plan
from peft_lntune.core.delta import ParameterSlice
from peft_lntune.errors import ConfigError, NoMatchError, UnsupportedError
from peft_lntune.planning.components import find_component_parameters
from peft_lntune.planning.facts import ModelFacts
from tests import adapted

# For each family the ends of the names of the modules of each component, in one layer or outside the layers.
TABLE: dict[str, dict[str, str]] = {
    "bert": {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "ffn_up": "intermediate.dense",
        "ffn_down": "layer.0.output.dense layer.1.output.dense",
        "norm": "LayerNorm",
        "embedding": "word_embeddings position_embeddings token_type_embeddings",
    },
    "distilbert": {
        "query": "q_lin",
        "key": "k_lin",
        "value": "v_lin",
        "attention_output": "out_lin",
        "ffn_up": "lin1",
        "ffn_down": "lin2",
        "norm": "sa_layer_norm output_layer_norm embeddings.LayerNorm",
    },
    "llama": {
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "attention_output": "o_proj",
        "ffn_up": "up_proj",
        "ffn_gate": "gate_proj",
        "ffn_down": "down_proj",
        "norm": "input_layernorm post_attention_layernorm model.norm",
        "embedding": "embed_tokens",
    },
    "t5": {
        "query": "Attention.q",
        "key": "Attention.k",
        "value": "Attention.v",
        "attention_output": "Attention.o",
        "ffn_up": "DenseReluDense.wi",
        "ffn_down": "DenseReluDense.wo",
        "norm": "layer_norm",
    },
    "vit": {
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "attention_output": "o_proj",
        "ffn_up": "fc1",
        "ffn_down": "fc2",
        "norm": "layernorm_before layernorm_after vit.layernorm",
    },
}
CASES = [(family, component) for family, rows in TABLE.items() for component in rows]


@pytest.mark.parametrize(("family", "component"), CASES)
def test_which_modules(family: str, component: str) -> None:
    model = adapted.build(family)
    if component == "embedding":
        model = model.base_model  # tied ones are refused, see below
    ends = tuple(TABLE[family][component].split())
    heads = ("cls.", "vocab_", "lm_head", "classifier")
    expected = {
        name
        for name, module in model.named_modules()
        if name.endswith(ends) and not name.startswith(heads) and isinstance(getattr(module, "weight", None), Tensor)
    }
    found = find_component_parameters(ModelFacts(model), [component])
    assert found.keys() == expected
    assert not any(block for parameters in found.values() for block in parameters.values())
    for name, parameters in found.items():
        own = {n for n in ("weight", "bias") if getattr(model.get_submodule(name), n, None) is not None}
        assert parameters.keys() == own


def test_several_components_in_one_matrix() -> None:
    gpt2 = find_component_parameters(ModelFacts(adapted.build("gpt2")), ["query", "value"])
    assert gpt2["transformer.h.0.attn.c_attn"] == {
        "weight": ParameterSlice(1, ((0, 16), (32, 48))),
        "bias": ParameterSlice(0, ((0, 16), (32, 48))),
    }
    assert gpt2["transformer.h.0.crossattention.q_attn"] == {"weight": None, "bias": None}
    assert gpt2["transformer.h.0.crossattention.c_attn"]["weight"] == ParameterSlice(1, ((16, 32),))
    phi3 = find_component_parameters(ModelFacts(adapted.build("phi3")), ["key", "ffn_gate"])
    # Two heads of queries, one of keys, eight wide.
    assert phi3["model.layers.1.self_attn.qkv_proj"] == {"weight": ParameterSlice(0, ((16, 24),))}
    assert phi3["model.layers.1.mlp.gate_up_proj"] == {"weight": ParameterSlice(0, ((0, 24),))}
    whole = find_component_parameters(ModelFacts(adapted.build("gpt2")), ["query", "key", "value"])
    assert whole["transformer.h.0.attn.c_attn"] == {"weight": None, "bias": None}


def train(model: nn.Module, x: dict[str, Tensor], make: Any, steps: int = 4) -> list[float]:
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(tuned)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = adapted.said(model, x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("family", "components"),
    [
        ("bert", ["query", "norm"]),
        ("bert", ["ffn_down"]),
        ("llama", ["value", "ffn_gate"]),
        ("t5", ["attention_output"]),
    ],
)
def test_training_is_plain_fine_tuning_of_these_parameters(family: str, components: list, optimizer: str) -> None:
    x = adapted.inputs(family, torch.float64)
    plain = adapted.build(family, torch.float64)
    for name, parameters in find_component_parameters(ModelFacts(plain), components).items():
        for parameter in parameters:
            getattr(plain.get_submodule(name), parameter).requires_grad_(True)
    model = get_peft_model(adapted.build(family, torch.float64), ModuleTuningConfig(components=components)).eval()
    expected = train(plain, x, OPTIMIZERS[optimizer])
    assert train(model, x, OPTIMIZERS[optimizer]) == pytest.approx(expected, rel=1e-9)
    merged = model.merge_and_unload()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-8, atol=1e-10)


def test_a_part_of_a_matrix_is_trained_alone() -> None:
    x = adapted.inputs("gpt2", torch.float64)
    plain = adapted.build("gpt2", torch.float64)
    chosen = find_component_parameters(ModelFacts(plain), ["key"])
    for name, parameters in chosen.items():
        for parameter, block in parameters.items():
            tensor = getattr(plain.get_submodule(name), parameter).requires_grad_(True)
            if block is not None:
                mask = torch.zeros_like(tensor)
                for start, stop in block.ranges:
                    mask.narrow(block.axis, start, stop - start).fill_(1)
                tensor.register_hook(lambda gradient, mask=mask: gradient * mask)
    model = get_peft_model(adapted.build("gpt2", torch.float64), ModuleTuningConfig(components=["key"])).eval()
    expected = train(plain, x, OPTIMIZERS["adamw"])
    assert train(model, x, OPTIMIZERS["adamw"]) == pytest.approx(expected, rel=1e-9)
    merged = model.merge_and_unload()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-8, atol=1e-10)


CONFIGS = {
    "query": ("bert", {"components": ["query"]}),
    "part": ("gpt2", {"components": ["query", "value"], "tune": "weight"}),
    "bitfit": ("bert", {"preset": "bitfit"}),
    "l0-close": ("bert", {"preset": "l0-close", "layers_to_exclude": [1]}),
    "named": ("llama", {"target_modules": ["up_proj"], "layers_to_exclude": 0}),
    "unified": ("llama", {"components": ["ffn_down"]}),
}


def config_of(case: str, **options: Any) -> ModuleTuningConfig | UnifiedConfig:
    part = ModuleTuningConfig(**CONFIGS[case][1])
    if case == "unified":
        return UnifiedConfig(parts=[part, *UnifiedConfig(preset="mha-adapter").parts], **options)
    return ModuleTuningConfig(**CONFIGS[case][1], **options)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("case", CONFIGS)
def test_every_path_of_loading(case: str, half: bool, tmp_path: Path) -> None:
    family = CONFIGS[case][0]
    x = adapted.inputs(family)
    config = config_of(case, save_dtype="bfloat16" if half else None)
    model = get_peft_model(adapted.build(family), config).eval()
    adapted.fill(model, "default", std=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if half and parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())  # so that saving rounds nothing away
    expected = adapted.output(model, x)
    model.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16 if half else torch.float32}
    assert sum(t.numel() for t in tensors.values()) == plan(adapted.build(family), config).entries
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(adapted.build(family), str(tmp_path), is_trainable=True, **options).eval()
        assert torch.equal(adapted.output(loaded, x), expected)
        assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.float32}
    native = adapted.build(family)
    native.load_adapter(str(tmp_path))
    assert torch.equal(adapted.output(native.eval(), x), expected)
    assert {p.dtype for p in native.parameters()} == {torch.float32}


def test_masks_over_modules(tmp_path: Path) -> None:
    model = get_peft_model(adapted.build("gpt2"), ModuleTuningConfig(components=["query"], tune="weight"))
    name = "transformer.h.0.attn.c_attn.weight"
    base = model.get_base_model().get_submodule("transformer.h.0.attn.c_attn").get_base_layer().weight
    largest = base.abs() >= base.abs().flatten().topk(60).values[-1]
    model.base_model.set_masks({name: largest}, source={"made": "magnitude"})
    # The keys and values in the same matrix are none of this adapter's business.
    assert [p.numel() for p in model.parameters() if p.requires_grad] == [int(largest[:, :16].sum())]
    adapted.fill(model, "default")
    expected = adapted.output(model.eval(), adapted.inputs("gpt2"))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(adapted.build("gpt2"), str(tmp_path)).eval()
    assert torch.equal(adapted.output(loaded, adapted.inputs("gpt2")), expected)
    model.base_model.clear_masks()
    assert torch.equal(adapted.output(model, adapted.inputs("gpt2")), expected)


def test_two_parts_of_one_matrix_add_up() -> None:
    x = adapted.inputs("gpt2")
    model = get_peft_model(adapted.build("gpt2"), ModuleTuningConfig(components=["query"]), adapter_name="a")
    model.add_adapter("b", ModuleTuningConfig(components=["value"]))
    for seed, name in enumerate("ab"):
        adapted.fill(model, name, seed=seed)
    model.eval()
    model.base_model.set_adapter(["a", "b"])
    both = adapted.output(model, x)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(adapted.output(model, x), both)
    mixed = adapted.output(model, x, adapter_names=["a", "b", "__base__"])
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], adapted.output(model, x)[row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of components, preset and target_modules"),
        ({"components": ["query"], "preset": "bitfit"}, "exactly one of"),
        ({"components": ["queries"]}, "choose one or more of"),
        ({"components": []}, "choose one or more of"),
        ({"preset": "adapter"}, "'bitfit', 'l0-close'"),
        ({"preset": "bitfit", "tune": "weight"}, "tunes 'bias', but tune='weight'"),
        ({"components": ["query"], "layers_to_exclude": "0"}, "layers_to_exclude takes an index"),
        ({"components": ["query"], "save_dtype": "int8"}, "save_dtype='int8' is not a floating dtype"),
    ],
)
def test_what_a_config_refuses(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModuleTuningConfig(**options)


def test_what_a_model_refuses() -> None:
    with pytest.raises(NoMatchError, match=r"components \['ffn_gate'\] not found in the chosen layers"):
        get_peft_model(adapted.build("bert"), ModuleTuningConfig(components=["ffn_gate"]))
    with pytest.raises(UnsupportedError, match=r"wte.weight is tied to lm_head.weight"):
        get_peft_model(adapted.build("gpt2"), ModuleTuningConfig(components=["embedding"]))


def test_layers_left_out() -> None:
    found = plan(adapted.build("bert"), ModuleTuningConfig(components=["query"], layers_to_exclude=[0])).parts
    assert list(found) == ["bert.encoder.layer.1.attention.self.query"]
    found = plan(adapted.build("bert"), ModuleTuningConfig(preset="l0-close")).parts
    assert not any("key" in name or "embeddings.word" in name for name in found)


COMPUTED = {
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "weight_norm by a hook": nn.utils.weight_norm,
    "spectral_norm by a hook": nn.utils.spectral_norm,
}


deprecated = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


@deprecated
@pytest.mark.parametrize("kind", [ModuleTuningConfig, SupermaskConfig])
@pytest.mark.parametrize("way", COMPUTED)
def test_a_weight_that_is_computed_in_each_call_is_refused(way: str, kind: Any) -> None:
    """A delta on it would be lost, as would a merged one; the bias is a parameter and can be tuned."""
    x = torch.randn(2, 4)
    model = nn.Sequential(OrderedDict(first=COMPUTED[way](nn.Linear(4, 4)), second=nn.Linear(4, 4))).eval()
    expected = model(x)
    with pytest.raises(UnsupportedError, match=r"the weight of first \(.*Linear\) is computed from other tensors"):
        get_peft_model(model, kind(target_modules=["first"]))
    assert torch.equal(model(x), expected)
    if kind is ModuleTuningConfig:
        tuned = get_peft_model(model, kind(target_modules=["first"], tune="bias", init_weights=False))
        assert not torch.equal(tuned(x), expected)


@deprecated
@pytest.mark.parametrize("way", COMPUTED)
def test_a_weight_that_is_computed_from_now_on_is_refused(way: str) -> None:
    linear = nn.Linear(4, 4)
    model = get_peft_model(nn.Sequential(linear), ModuleTuningConfig(target_modules=["0"])).eval()
    COMPUTED[way](linear)
    with pytest.raises(UnsupportedError, match=r"the weight of a .*Linear is computed from other tensors"):
        model(torch.randn(2, 4))
    with pytest.raises(UnsupportedError, match=r"the weight of 0 \(.*Linear\) is computed from other tensors"):
        model.merge_adapter()


def test_a_norm_that_is_pruned_from_now_on_adds_its_delta_to_what_is_left() -> None:
    norm, x = nn.LayerNorm(4, elementwise_affine=True), torch.randn(2, 4)
    model = get_peft_model(nn.Sequential(norm), LNTuningConfig(init_weights=False)).eval()
    layer = model.base_model.model[0]
    prune.random_unstructured(norm, "weight", 0.5)
    weight = norm.weight_orig * norm.weight_mask + layer.lntune_weight["default"].weight
    expected = nn.functional.layer_norm(x, (4,), weight, norm.bias + layer.lntune_bias["default"].weight)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(UnsupportedError, match=r"the weight of 0 \(LayerNorm\) is computed from other tensors"):
        model.merge_adapter()


def test_a_norm_that_is_parametrized_from_now_on_is_refused() -> None:
    norm, x = nn.LayerNorm(4), torch.randn(2, 4)
    model = get_peft_model(nn.Sequential(norm), LNTuningConfig(init_weights=False)).eval()
    with torch.no_grad():
        model(x)
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(UnsupportedError, match="the weight of a ParametrizedLayerNo"):
            model(x)
