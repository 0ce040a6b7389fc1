"""Trainer's weight decay leaves deltas alone in every family, and what is PEFT's as PEFT has it."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from peft_lntune import BottleneckConfig, LNTuningConfig, ModuleTuningConfig, SupermaskConfig, UnifiedConfig
from tests.adapted import build, deltas

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
# Their norms are called ln_1, ln_f, norm_1, layer_norm1, input_layernorm, LayerNorm.
FAMILIES = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=40)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**TEXT)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**CLIP, image_size=8, patch_size=4)),
    "bert": lambda: build("bert"),
    "llama": lambda: build("llama"),
}
PROJECTIONS = r".*\.(c_attn|Wqkv|query_key_value|q_proj|query)"
CONFIGS = {
    "norms": LNTuningConfig,
    "modules": lambda: ModuleTuningConfig(target_modules=PROJECTIONS),
    "masks": lambda: SupermaskConfig(target_modules=PROJECTIONS),
}


def decayed(model: nn.Module, folder: object) -> set[str]:
    arguments = hf.TrainingArguments(folder, weight_decay=0.1, use_cpu=True, report_to=[])
    trainer = hf.Trainer(model, arguments)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for group in trainer.optimizer.param_groups if group["weight_decay"]]
    return {names[id(parameter)] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_no_delta_and_no_mask_is_decayed(family, kind, tmp_path):
    model = get_peft_model(FAMILIES[family](), CONFIGS[kind]())
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert decayed(model, tmp_path) == set()


def test_nor_is_a_masked_delta(tmp_path):
    model = get_peft_model(FAMILIES["gpt2"](), LNTuningConfig())
    model.set_masks({name: torch.arange(delta.shape[0]) < 2 for name, delta in deltas(model).items()})
    assert decayed(model, tmp_path) == set()


def test_what_stands_beside_and_lora_are_decayed_as_in_peft(tmp_path):
    parts = [LNTuningConfig(), BottleneckConfig(), LoraConfig(target_modules=["c_attn"])]
    found = decayed(get_peft_model(FAMILIES["gpt2"](), UnifiedConfig(parts=parts)), tmp_path)
    assert {"lora_A", "lora_B", "lntune_down", "lntune_up"} == {
        part for part in ("lora_A", "lora_B", "lntune_down", "lntune_up", "lntune_weight") if part in str(found)
    }


def test_other_models_are_as_they_were():
    model = FAMILIES["gpt2"]()
    names = get_parameter_names(model, [nn.LayerNorm], ["bias"])
    assert names == get_parameter_names.__wrapped__(model, [nn.LayerNorm], ["bias"])
    assert "transformer.h.0.attn.c_attn.weight" in names
