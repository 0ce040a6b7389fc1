"""Adapters of norms written as LoRA: exact where they can be, refused or said where they cannot."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lntune import BottleneckConfig, LNTuningConfig, ModuleTuningConfig, UnifiedConfig
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.interop import folds, to_lora
from peft_lntune.interop.answers import few_tokens, inputs_of
from peft_lntune.interop.lora_report import Spectrum
from peft_lntune.layers.held import deltas_of
from peft_lntune.norms.consumers import Consumers
from peft_lntune.norms.find import Norm
from tests import adapted, cases

ENTRIES = 8
EXACT = 1e-5
"""Of the effect on the logits, in float32: a few thousand sums of some ten roundings of 6e-8."""


def causal(name: str, **options: Any) -> Callable[[], nn.Module]:
    return cases._causal(name, tie_word_embeddings=False, **options).model


@dataclass(frozen=True)
class Served:
    """A family and what is tuned of it: everything that can be folded."""

    model: Callable[[], nn.Module]
    tuned: dict[str, Any] = field(default_factory=dict)
    inputs: str = "llama"


_PRE = {"roles": ["attention", "ffn"]}
_CLOSING = ["post_attention_layernorm", "post_feedforward_layernorm"]
EXACTLY = {
    "llama": Served(causal("Llama")),
    "gemma": Served(causal("Gemma", head_dim=8)),
    "mistral": Served(causal("Mistral")),
    "qwen2": Served(causal("Qwen2")),
    "qwen3": Served(causal("Qwen3", head_dim=8), {"roles": ["attention", "ffn", "final"]}),
    "gemma2": Served(causal("Gemma2", head_dim=8), {"exclude_modules": _CLOSING}),
    "gemma3": Served(
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**cases._DECODER, head_dim=8)),
        {**_PRE, "exclude_modules": _CLOSING},
    ),
    "phi3": Served(causal("Phi3")),
    "granite": Served(causal("Granite")),
    "smollm3": Served(causal("SmolLM3")),
    "qwen3-moe": Served(
        causal("Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
        {"roles": ["attention"]},
    ),
    "cohere": Served(causal("Cohere"), _PRE),
    "mamba2": Served(cases.FAMILIES["mamba2"].model, {"exclude_modules": ["mixer.norm", "norm_f"]}, "mamba2"),
    "t5": Served(cases.FAMILIES["t5"].model, {"roles": ["attention", "ffn", "cross_attention"]}, "t5"),
}
SAVED = [name for name in EXACTLY if name != "t5"]  # what AutoModelForCausalLM loads


def build(served: Served, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, with norms as a trained model has them."""
    torch.manual_seed(0)
    model = served.model().eval()
    with torch.no_grad():
        for name in adapted.norm_names(model):
            for parameter in model.get_submodule(name).parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).requires_grad_(False)


def tune(model: nn.Module, entries: int | None = ENTRIES, config: Any = None, **options: Any) -> Any:
    """An adapter with large random deltas, of so many random entries per parameter."""
    peft_model = get_peft_model(model, config or LNTuningConfig(**options))
    generator = torch.Generator().manual_seed(0)
    if entries is not None:
        masks = {}
        for name, delta in deltas_of(peft_model, "default").items():
            chosen = torch.zeros(delta.shape, dtype=torch.bool)
            chosen.view(-1)[torch.randperm(chosen.numel(), generator=generator)[:entries]] = True
            masks[name.removeprefix("base_model.model.").replace("lntune_", "")] = chosen
        peft_model.set_masks(masks)
    adapted.fill(peft_model, "default")
    return peft_model.eval()


def alone(base: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, str(folder)).eval()


def share(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """The largest error relative to the largest effect."""
    return float((found - expected).abs().max() / (expected - base).abs().max())


def check(served: Served, folder: Path, **options: Any) -> None:
    inputs = cases.inputs(served.inputs)
    base = adapted.output(build(served), inputs)
    ours = tune(build(served), **served.tuned, **options)
    before = adapted.snapshot(ours), [parameter.requires_grad for parameter in ours.parameters()], torch.get_rng_state()
    report = to_lora(ours, folder)
    adapted.assert_unchanged(ours, before[0])
    assert [parameter.requires_grad for parameter in ours.parameters()] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (report.exact, report.rank, report.dropped) == (True, 8, {})
    expected = adapted.output(ours, inputs)
    assert share(adapted.output(alone(build(served), folder), inputs), expected, base) <= EXACT


@pytest.mark.parametrize(
    "family", [n if n in ("llama", "gemma") else pytest.param(n, marks=pytest.mark.full) for n in EXACTLY]
)
def test_a_few_entries_per_norm_are_exact(family: str, tmp_path: Path) -> None:
    check(EXACTLY[family], tmp_path)


CHILD = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for name in sys.argv[2:]:
    folder = Path(sys.argv[1], name)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(model, folder / "lora").eval()
    with torch.no_grad():
        logits = model(**load_file(folder / "inputs.safetensors")).logits
    save_file({"logits": logits.contiguous()}, folder / "out.safetensors")
assert "peft_lntune" not in sys.modules
"""


@pytest.mark.end_to_end
def test_another_process_without_this_package_loads_it(tmp_path: Path) -> None:
    expected = {}
    for family in SAVED:
        served, folder = EXACTLY[family], tmp_path / family
        inputs = cases.inputs(served.inputs)
        model = build(served)
        model.save_pretrained(folder / "model")
        base = adapted.output(model, inputs)
        ours = tune(model, **served.tuned)
        to_lora(ours, folder / "lora")
        save_file({name: value.contiguous() for name, value in inputs.items()}, folder / "inputs.safetensors")
        expected[family] = adapted.output(ours, inputs), base
    source = tmp_path / "child.py"
    source.write_text(CHILD)
    subprocess.run([sys.executable, str(source), str(tmp_path), *SAVED], check=True, env=os.environ)
    errors = {
        family: share(load_file(tmp_path / family / "out.safetensors")["logits"], *logits)
        for family, logits in expected.items()
    }
    assert len(errors) >= 12
    assert all(error <= EXACT for error in errors.values()), errors


# What cannot be folded.


def deny(ours: Any, folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(UnsupportedError, match=match):
        to_lora(ours, folder, **options)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (causal("Qwen3", head_dim=8), r"self_attn.q_norm: it normalizes queries or keys: its output is read by"),
        (causal("Olmo2"), r"post_attention_layernorm: its output is read by add in model.layers.0"),
        (
            cases._causal("Llama", tie_word_embeddings=True).model,
            "lm_head, .* shares its weight with model.embed_tokens",
        ),
        (causal("Mixtral", num_local_experts=2), "read by mm in .*gate and index in .*experts"),
        (cases.FAMILIES["gpt-neox"].model, "has a bias, and its change needs a bias on .*query_key_value too"),
        (cases.FAMILIES["mamba2"].model, "mixer.norm: .*mixer.out_proj, which reads it, takes no LoRA in PEFT"),
        (cases.FAMILIES["bert"].model, "embeddings.LayerNorm: its output is also read by add"),
    ],
    ids=["qk", "post-norm", "tied", "experts", "bias", "mamba", "embedding"],
)
def test_what_cannot_be_folded_is_refused(model: Callable[[], nn.Module], reason: str, tmp_path: Path) -> None:
    deny(tune(build(Served(model))), tmp_path, reason)


def test_a_dense_layer_of_a_model_with_experts(tmp_path: Path) -> None:
    """PEFT takes its `gate_proj` for that of the experts, and would leave its LoRA out (huggingface/peft#3711)."""
    options = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    ours = tune(build(Served(causal("Glm4Moe", head_dim=8, **options))), roles=["ffn"])
    dense = "model.layers.0.mlp.gate_proj"
    lora = LoraConfig(target_modules=[dense, dense.replace("gate", "up")])
    convert_peft_config_for_transformers(lora, ours.get_base_model(), None)
    if dense in lora.target_modules:
        pytest.skip("this version of PEFT leaves targets of dense layers as they are")
    deny(ours, tmp_path, f"layers.0.post_attention_layernorm: {dense}, which reads it, .* on the fused experts")


def test_a_gain_of_zero(tmp_path: Path) -> None:
    model = build(EXACTLY["llama"])
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 0
    deny(
        tune(model, entries=None),
        tmp_path,
        r"layers.0.input_layernorm: its gain is 0 at 1 tuned entries, such as entry 3",
    )


@pytest.mark.full
def test_a_norm_with_a_bias_is_exact_where_its_bias_is_zero(tmp_path: Path) -> None:
    """LayerNorms of models that were trained without one, such as those of MPT."""
    served = Served(cases.FAMILIES["gpt-neox-sequential"].model)
    models = [build(served) for _ in range(2)]
    for model in models:
        for name, parameter in model.named_parameters():
            if "layernorm.bias" in name or "layer_norm.bias" in name:
                parameter.zero_()
    base = adapted.output(models[0], cases.inputs("llama"))
    ours = tune(models[0], tune="weight")
    to_lora(ours, tmp_path)
    found = adapted.output(alone(models[1], tmp_path), cases.inputs("llama"))
    assert share(found, adapted.output(ours, cases.inputs("llama")), base) <= EXACT


@pytest.mark.full
def test_linear_maps_with_transposed_weights(tmp_path: Path) -> None:
    model = cases.build("gpt2")  # its norms start with zero biases
    base = adapted.output(model, cases.inputs("gpt2"))
    ours = tune(model, tune="weight", roles=["attention", "ffn"])
    to_lora(ours, tmp_path, batches=[cases.inputs("gpt2")])
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    assert config.fan_in_fan_out
    found = adapted.output(alone(cases.build("gpt2"), tmp_path), cases.inputs("gpt2"))
    assert share(found, adapted.output(ours, cases.inputs("gpt2")), base) <= EXACT


def test_dropped_norms_are_named_and_their_effect_is_said(tmp_path: Path) -> None:
    served = Served(causal("Qwen3", head_dim=8))
    ours = tune(build(served))
    report = to_lora(ours, tmp_path, unfoldable="drop")
    assert len(report.dropped) == 2 * cases.LAYERS
    assert 0 < report.dropped_effect < report.effect
    assert f"Left out: {2 * cases.LAYERS} modules" in str(report)
    kept = LNTuningConfig(roles=["attention", "ffn", "final"])
    rest = get_peft_model(build(served), kept)
    adapter = {
        name: delta
        for name, delta in deltas_of(ours, "default").items()
        if "q_norm" not in name and "k_norm" not in name
    }
    for name, delta in deltas_of(rest, "default").items():
        delta.fill(adapter[name].dense())
    inputs = cases.inputs("llama")
    expected, base = adapted.output(rest.eval(), inputs), adapted.output(build(served), inputs)
    assert share(adapted.output(alone(build(served), tmp_path), inputs), expected, base) <= EXACT


def test_nothing_is_left_when_everything_is_dropped(tmp_path: Path) -> None:
    ours = tune(build(Served(causal("Olmo2"))), roles=["attention", "ffn"])
    deny(ours, tmp_path, "nothing of adapter 'default' can be exported as LoRA", unfoldable="drop")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BottleneckConfig(), "a part \\(BottleneckConfig\\) that LoRA cannot hold"),
        (UnifiedConfig(preset="prefix+ln", task_type="CAUSAL_LM"), "a part \\(PrefixConfig\\)"),
        (ModuleTuningConfig(components=["ffn_down"]), "a part \\(ModuleTuningConfig\\)"),
        (
            UnifiedConfig(parts=[LNTuningConfig(), LoraConfig(target_modules=["q_proj"], use_dora=True)]),
            "use_dora=True",
        ),
        (
            UnifiedConfig(parts=[LNTuningConfig(), LoraConfig(target_modules=["embed_tokens"])]),
            "embed_tokens \\(Embedding\\)",
        ),
    ],
    ids=["bottleneck", "prefix", "modules", "dora", "embedding"],
)
def test_parts_that_are_no_lora_are_refused_by_name(config: Any, said: str, tmp_path: Path) -> None:
    deny(tune(build(EXACTLY["llama"]), None, config), tmp_path, said)


def test_a_delta_on_another_module(tmp_path: Path) -> None:
    ours = tune(build(EXACTLY["llama"]), None, target_modules=["o_proj", "input_layernorm"])
    deny(ours, tmp_path, r"self_attn.o_proj: Linear is no norm, so its change is no scale of its output")


def test_wrong_arguments(tmp_path: Path) -> None:
    ours = tune(build(EXACTLY["llama"]))
    for options, said in (
        ({"rank": 0}, "rank=0 should be a whole number, at least 1"),
        ({"unfoldable": "skip"}, "unfoldable='skip': choose"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [1]}, "batches should be dicts"),
        ({"batches": [{"x": torch.ones(1)}]}, r"LlamaForCausalLM does not run on x \(ValueError"),
        ({"adapter_name": "other"}, "no adapter of this package is named 'other'"),
    ):
        with pytest.raises(ConfigError, match=said):
            to_lora(ours, tmp_path, **options)
    ours.merge_adapter()
    deny(ours, tmp_path, "call unmerge_adapter")
    with pytest.raises(ConfigError, match="no language model whose vocabulary its config states"):
        to_lora(tune(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), None), tmp_path)


@pytest.mark.parametrize(
    ("changed", "read", "said"),
    [
        ({"by_sample": True}, Consumers(["a"]), "it does more than normalize"),
        ({"axis": 1}, Consumers(["a"]), "does not scale the last dimension alone"),
        ({"weight_shape": (2, 4)}, Consumers(["a"]), r"of shape \(2, 4\), does not scale"),
        ({"weight_shape": None}, Consumers(["a"]), "of shape None, does not scale"),
        ({}, None, "it did not run on these inputs"),
        ({}, Consumers(), "no linear map reads its output"),
    ],
    ids=["more", "channels", "heads", "no-gain", "not-run", "unread"],
)
def test_reasons_in_the_structure(changed: dict[str, Any], read: Consumers | None, said: str) -> None:
    norm = replace(Norm("n", "LayerNorm", (), (4,), None, 0.0), **changed)
    assert re.search(said, folds._reason(norm, "LayerNorm", read) or "")
    assert folds._reason(Norm("n", "LayerNorm", (), (4,), None, 0.0), "LayerNorm", Consumers(["a"])) is None


def test_random_tokens_are_no_padding() -> None:
    model = nn.Module()
    model.config = hf.LlamaConfig(vocab_size=3, pad_token_id=1)
    assert set(few_tokens(model)["input_ids"].unique().tolist()) == {0, 2}


def test_what_a_batch_is_cut_to() -> None:
    ids, left = torch.ones(5, 100, dtype=torch.long), torch.ones(5, 100, dtype=torch.long)
    left[1, :70] = 0
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    model = nn.Linear(1, 1)
    assert {key: tuple(v.shape) for key, v in inputs_of(batch, model).items()} == dict.fromkeys(
        ("input_ids", "attention_mask"), (5, 100)
    )
    assert {tuple(v.shape) for v in inputs_of(batch, model, few=True).values()} == {(2, 64)}
    # Padding on the left: cut, the second row would hold nothing else.
    few = inputs_of(batch | {"attention_mask": left}, model, few=True)
    assert {tuple(v.shape) for v in few.values()} == {(2, 100)}


def test_random_tokens_for_a_model_without_a_longest_text() -> None:
    model = nn.Module()
    model.config = hf.XLNetConfig(vocab_size=9)  # states max_position_embeddings as -1
    assert few_tokens(model)["input_ids"].shape == (1, 32)


@pytest.mark.full
def test_a_plain_module_with_batches(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 3))

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model()
            self.tail = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(3, 3))  # `2` would mean this too

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.body(x))

    x = torch.randn(5, 4)
    ours = tune(Takes(), None)
    to_lora(ours, tmp_path, batches=[{"x": x}])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["body.2"]
    with torch.no_grad():
        torch.testing.assert_close(alone(Takes(), tmp_path)(x), ours(x))


# Ranks.


def test_a_dense_adapter_is_truncated(tmp_path: Path) -> None:
    served, inputs = EXACTLY["llama"], cases.inputs("llama")
    base = adapted.output(build(served), inputs)
    ours = tune(build(served), None)
    expected = adapted.output(ours, inputs)
    errors = []
    for rank in (2, 8, 16):
        report = to_lora(ours, tmp_path / str(rank), rank=rank, batches=[inputs])
        assert report.exact == (rank == 16)
        errors.append(share(adapted.output(alone(build(served), tmp_path / str(rank)), inputs), expected, base))
        assert report.error / report.effect == pytest.approx(errors[-1], rel=1)
    assert errors[2] <= EXACT < errors[1] < errors[0] < 1
    assert report.norms.column("error") == [0.0] * len(report.norms.rows)
    assert report.ranks.column("rank") == [8, 16]
    assert report.ranks.column("MB")[1] == 2 * report.ranks.column("MB")[0]
    logits = report.ranks.column("logits")
    assert logits[1] <= EXACT < logits[0]
    assert logits[0] == pytest.approx(errors[1], rel=1)


def test_batches_decide_what_a_truncation_keeps(tmp_path: Path) -> None:
    served, batch = EXACTLY["llama"], {"input_ids": torch.randint(3, 8, (4, 16))}
    ours = tune(build(served), None)
    expected = adapted.output(ours, batch)
    errors = {}
    for how, batches in {"plain": None, "calibrated": [batch]}.items():
        to_lora(ours, tmp_path / how, rank=4, batches=batches)
        found = adapted.output(alone(build(served), tmp_path / how), batch)
        errors[how] = float((found - expected).square().mean().sqrt())
    assert errors["calibrated"] < 0.8 * errors["plain"]


def test_what_a_truncation_loses() -> None:
    spectrum = Spectrum("n", 3, 8, (9.0, 4.0, 1.0))
    assert [spectrum.lost(rank) for rank in range(4)] == [14.0, 5.0, 1.0, 0.0]
    assert Spectrum("n", 2, 8, (9.0, 4.0, 1e-20)).lost(2) == 0.0  # what is left is rounding


def test_every_token_of_every_batch_counts_once_and_padding_does_not(tmp_path: Path) -> None:
    ours, ids = tune(build(EXACTLY["llama"]), None), torch.randint(3, 30, (3, 16))
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[:, 16:] = 0
    padded = torch.cat([ids, torch.randint(3, 30, (3, 4))], 1)
    ways = {
        "whole": [{"input_ids": ids}],
        "parts": [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}],
        "padded": [{"input_ids": padded, "attention_mask": mask}],
        "first": [{"input_ids": ids[:1]}],
    }
    errors = {
        name: to_lora(ours, tmp_path / name, rank=4, batches=batches).ranks.column("changes")[0]
        for name, batches in ways.items()
    }
    assert errors["parts"] == pytest.approx(errors["whole"], rel=1e-4)  # attention rounds by the shape of a batch
    assert errors["padded"] == pytest.approx(errors["whole"], rel=1e-4)
    assert errors["first"] != pytest.approx(errors["whole"], rel=1e-2)
    with pytest.raises(ConfigError, match="leaves out all of its tokens"):
        to_lora(ours, tmp_path / "none", rank=4, batches=[{"input_ids": ids, "attention_mask": 0 * ids}])


def test_batches_decide_for_lora_of_its_own_too(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    ours = get_peft_model(build(EXACTLY["llama"]), UnifiedConfig(parts=[LNTuningConfig(), lora])).eval()
    batches = [{"input_ids": torch.randint(3, 8, (4, 16))}]
    plain, calibrated = (
        to_lora(ours, tmp_path / str(number), rank=2, batches=given).ranks.column("changes")[0]
        for number, given in enumerate((None, batches))
    )
    assert calibrated != pytest.approx(plain, rel=1e-2)


def test_without_an_exact_rank_the_ranks_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_lntune.interop.lora_report.RANKS", (2, 4))
    with pytest.raises(
        ConfigError, match=r"needs rank 16, .* Choose a rank, as rank=64:\nrank +MB +changes +logits\n2 "
    ):
        to_lora(tune(build(EXACTLY["llama"]), None), tmp_path)
    assert not list(tmp_path.iterdir())


def test_small_changes_are_padded(tmp_path: Path) -> None:
    ours = tune(build(EXACTLY["llama"]), 3)
    report = to_lora(ours, tmp_path, rank=6)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.rank_pattern, report.rank) == (6, 6, {}, 6)
    assert {len(value) for name, value in tensors.items() if "lora_A" in name} == {6}
    assert {int(value.any(1).sum()) for name, value in tensors.items() if "lora_A" in name} == {3}
    assert sorted(config.target_modules) == ["down_proj", *sorted(config.target_modules)][1:]
    assert "exact: no norm has more tuned entries than the rank" in str(report)


# What servers want.


def loaded_by_lorax(tensors: dict[str, Tensor], names: list[str]) -> set[str]:
    """The linear maps on which LoRAX puts LoRA.

    It takes one type after the other (`q_proj`, `k_proj`, ...) and leaves out those that some layer has no LoRA on
    (`LoraWeights.load` in `lorax_server/adapters/lora.py`). It stacks the layers of a type, so their ranks are equal.
    """
    found = set()
    for kind in {name.rpartition(".")[2] for name in names}:
        own = [name for name in names if name.rpartition(".")[2] == kind]
        pairs = [[tensors.get(f"base_model.model.{name}.lora_{side}.weight") for side in "AB"] for name in own]
        if all(a is not None and b is not None for a, b in pairs):
            torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
            found |= {*own}
    return found


def test_layers_that_are_not_tuned_have_lora_of_zeros(tmp_path: Path) -> None:
    served, inputs = EXACTLY["llama"], cases.inputs("llama")
    linears = [name for name, own in build(served).named_modules() if isinstance(own, nn.Linear)]
    base, ours = adapted.output(build(served), inputs), tune(build(served), layers_to_transform=[1])
    reports, files = {}, {}
    for every_layer in (True, False):
        folder = tmp_path / str(every_layer)
        reports[every_layer] = to_lora(ours, folder, every_layer=every_layer)
        files[every_layer] = load_file(folder / "adapter_model.safetensors")
        found = adapted.output(alone(build(served), folder), inputs)
        assert share(found, adapted.output(ours, inputs), base) <= EXACT
    tuned = {name for name in linears if f"base_model.model.{name}.lora_A.weight" in files[False]}
    kinds = {name.rpartition(".")[2] for name in tuned}
    assert tuned
    assert all(".1." in name for name in tuned)
    of_these_kinds = {name for name in linears if name.rpartition(".")[2] in kinds}
    assert loaded_by_lorax(files[False], linears) == set()
    assert loaded_by_lorax(files[True], linears) == of_these_kinds
    zeros = {name for name in files[True] if name not in files[False]}
    assert all(not files[True][name].any() for name in zeros)
    assert (reports[True].zeros, reports[False].zeros) == (len(zeros) // 2, 0)
    assert f"{len(zeros) // 2} linear maps have LoRA of zeros" in str(reports[True])
    assert "zeros" not in str(reports[False])
    for every_layer, report in reports.items():
        size = sum(tensor.numel() * 4 for tensor in files[every_layer].values())
        assert report.ranks.column("MB")[-1] == pytest.approx(size / 1e6)


# What else an adapter holds.


@pytest.mark.parametrize(
    "targets", [["q_proj", "o_proj", "lm_head"], pytest.param(["down_proj"], marks=pytest.mark.full)]
)
def test_lora_of_its_own_becomes_part_of_the_same(targets: list[str], tmp_path: Path) -> None:
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=True)
    served, inputs = EXACTLY["llama"], cases.inputs("llama")
    base = adapted.output(build(served), inputs)
    ours = tune(build(served), None, UnifiedConfig(parts=[LNTuningConfig(), lora]))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    report = to_lora(ours, tmp_path)
    assert report.exact
    assert share(adapted.output(alone(build(served), tmp_path), inputs), adapted.output(ours, inputs), base) <= EXACT


@pytest.mark.parametrize("family", ["llama-classifier", "bert-classifier"])
def test_heads_go_with_it_and_take_what_they_read(family: str, tmp_path: Path) -> None:
    """A head that is saved whole takes the final norm's change without LoRA, with its bias; a post-norm is left out."""
    inputs = adapted.inputs(family)
    ours = tune(adapted.build(family), None, task_type="SEQ_CLS")
    if family == "bert-classifier":
        deny(ours, tmp_path, "output.LayerNorm: its output is also read by add in")
        return
    to_lora(ours, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not [name for name in tensors if "score" in name and "lora" in name]
    torch.testing.assert_close(
        adapted.output(alone(adapted.build(family), tmp_path), inputs), adapted.output(ours, inputs)
    )


class Head(nn.Module):
    """A LayerNorm with a bias before a head that an adapter holds whole."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.middle, self.last = nn.RMSNorm(4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3, bias=bias)
        nn.init.normal_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.middle(self.norm(x))))


def test_a_head_that_is_saved_whole_takes_a_bias(tmp_path: Path) -> None:
    batch = {"x": torch.randn(5, 4)}
    config = LNTuningConfig(modules_to_save=["head"])
    ours = tune(Head(bias=True), None, config)
    to_lora(ours, tmp_path, batches=[batch])
    with torch.no_grad():
        torch.testing.assert_close(alone(Head(bias=True), tmp_path)(**batch), ours(**batch))
    (tmp_path / "no").mkdir()
    deny(tune(Head(bias=False), None, config), tmp_path / "no", "a bias on head, which has none", batches=[batch])


def test_one_of_several_adapters(tmp_path: Path) -> None:
    served, inputs = EXACTLY["llama"], cases.inputs("llama")
    ours = adapted.adapt(build(served), "one", "two")
    flags = {name: parameter.requires_grad for name, parameter in ours.named_parameters()}
    to_lora(ours, tmp_path, "two")
    assert {name: parameter.requires_grad for name, parameter in ours.named_parameters()} == flags
    assert ours.active_adapters == ["one"]
    ours.set_adapter("two")
    base = adapted.output(build(served), inputs)
    assert share(adapted.output(alone(build(served), tmp_path), inputs), adapted.output(ours, inputs), base) <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    served = EXACTLY["gemma"]
    ours = tune(build(served, dtype))
    report = to_lora(ours, tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    assert report.error <= report.rounding
    # Over the same base in float32 nothing is lost: the values of the file are not rounded to the base's dtype.
    wide = build(served, dtype).float()
    inputs, base = cases.inputs("llama"), adapted.output(build(served, dtype).float(), cases.inputs("llama"))
    again = tune(build(served, dtype).float())
    found = adapted.output(alone(wide, tmp_path), inputs)
    assert share(found, adapted.output(again, inputs), base) <= EXACT


def test_double_precision(tmp_path: Path) -> None:
    """Rounding is measured in float64 too, and the check does not round to float32 on its way."""
    served, inputs = EXACTLY["llama"], cases.inputs("llama")
    base = adapted.output(build(served, torch.float64), inputs)
    ours = tune(build(served, torch.float64))
    report = to_lora(ours, tmp_path)
    assert 0 < report.rounding < 1e-12 * report.effect
    found = adapted.output(alone(build(served, torch.float64), tmp_path), inputs)
    assert share(found, adapted.output(ours, inputs), base) <= EXACT


# The check.


def test_a_wrong_export_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tune(build(EXACTLY["llama"]))
    from peft_lntune.interop import lora_export

    own = lora_export.fold_gain
    monkeypatch.setattr(lora_export, "fold_gain", lambda weight, gain, delta: own(weight, gain + 1, delta))
    deny(ours, tmp_path, "loaded by PEFT, the export gives logits that differ by .* Nothing was written")


class Masked(hf.LlamaForCausalLM):
    """Forbids a token, as models with tokens of images do."""

    value = -torch.inf

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., -1] = self.value
        return output


def test_infinite_logits_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference of two infinities is NaN, which is not above any limit."""
    from peft_lntune.interop import lora_export

    served = Served(lambda: Masked(hf.LlamaConfig(**cases._DECODER)))
    assert to_lora(tune(build(served)), tmp_path / "right").exact
    own = lora_export.fold_gain
    monkeypatch.setattr(lora_export, "fold_gain", lambda weight, gain, delta: own(weight, gain + 1, delta))
    deny(tune(build(served)), tmp_path / "wrong", "loaded by PEFT, the export gives logits that differ")
    monkeypatch.setattr(Masked, "value", torch.nan)
    (tmp_path / "nan").mkdir()
    deny(tune(build(served)), tmp_path / "nan", "answers with NaN or infinite values .* Nothing was written")


def test_a_reader_that_was_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_lntune.interop import folds

    own = folds.find_consumers

    def blind(*arguments: Any) -> Any:
        found = own(*arguments)
        found["model.layers.1.input_layernorm"].linears.pop()
        return found

    monkeypatch.setattr(folds, "find_consumers", blind)
    deny(tune(build(EXACTLY["llama"])), tmp_path, "do not stand for the norms of adapter 'default'")


def test_a_rank_that_is_worse_than_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_lntune.interop import lora_export

    own = lora_export.truncated

    def worse(*arguments: Any) -> Any:
        best, energy = own(*arguments)
        return best._replace(b=-best.b), energy

    monkeypatch.setattr(lora_export, "truncated", worse)
    deny(tune(build(EXACTLY["llama"]), None), tmp_path, "truncated to rank 8, the export is as far", rank=8)
