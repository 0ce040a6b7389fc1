"""Roles on many architectures, each read off the forward pass of the model's source.

A row is a class of transformers and, for norms of it, what they feed or close there. "-" stands for a role that must
stay unknown: the norm serves none of the sub-layers that roles speak of.
"""

import importlib.util

import pytest

from benchmarks.harness.architectures import build_small, model_classes
from peft_lntune.architectures.roles import ROLES, find_roles
from peft_lntune.core.module_tree import base_modules

A, X, F, M, QK, E, Z = "attention", "cross_attention", "ffn", "mixer", "qk", "embedding", "final"

TABLE: dict[str, dict[str, str]] = {
    # Norms before each sub-layer, behind it, or on both sides
    "llama.LlamaModel": {"layers.0.input_layernorm": A, "layers.0.post_attention_layernorm": F, "norm": Z},
    "gemma2.Gemma2Model": {
        "layers.0.post_attention_layernorm": A,
        "layers.0.pre_feedforward_layernorm": F,
        "layers.0.post_feedforward_layernorm": F,
    },
    "olmo2.Olmo2Model": {"layers.0.post_attention_layernorm": A, "layers.0.self_attn.q_norm": QK},
    "glm4.Glm4Model": {
        "layers.0.post_self_attn_layernorm": A,
        "layers.0.post_attention_layernorm": F,
        "layers.0.post_mlp_layernorm": F,
    },
    "afmoe.AfmoeModel": {"layers.0.post_attention_layernorm": A, "layers.0.pre_mlp_layernorm": F},
    "vaultgemma.VaultGemmaModel": {"layers.0.input_layernorm": A, "layers.0.pre_feedforward_layernorm": F},
    "mpt.MptModel": {"blocks.0.norm_1": A, "blocks.0.norm_2": F, "norm_f": Z},
    "xlm.XLMModel": {"layer_norm_emb": E, "layer_norm1.0": A, "layer_norm2.0": F},
    # One norm before sub-layers side by side
    "cohere.CohereModel": {"layers.0.input_layernorm": f"{A}+{F}"},
    "phi.PhiModel": {"layers.0.input_layernorm": f"{A}+{F}", "final_layernorm": Z},
    "gptj.GPTJModel": {"h.0.ln_1": f"{A}+{F}", "ln_f": Z},
    "falcon_h1.FalconH1Model": {"layers.0.input_layernorm": f"{A}+{M}", "layers.0.pre_ff_layernorm": F},
    # Inside attention
    "deepseek_v3.DeepseekV3Model": {
        "layers.0.self_attn.q_a_layernorm": QK,
        "layers.0.self_attn.kv_a_layernorm": QK,
        "layers.0.input_layernorm": A,
    },
    "bitnet.BitNetModel": {"layers.0.self_attn.attn_sub_norm": A, "layers.0.mlp.ffn_sub_norm": F},
    # State spaces and recurrences, alone and among attention
    "mamba2.Mamba2Model": {"layers.0.norm": M, "layers.0.mixer.norm": M, "norm_f": Z},
    "jamba.JambaModel": {
        "layers.0.input_layernorm": M,
        "layers.4.input_layernorm": A,
        "layers.0.mamba.dt_layernorm": M,
        "layers.0.pre_ff_layernorm": F,
    },
    "nemotron_h.NemotronHModel": {"layers.0.norm": M, "layers.1.norm": F, "layers.2.norm": A},
    "qwen3_next.Qwen3NextModel": {"layers.0.input_layernorm": M, "layers.0.linear_attn.norm": M},
    "rwkv.RwkvModel": {"blocks.0.pre_ln": E, "blocks.0.ln1": M, "blocks.0.ln2": F, "ln_out": Z},
    "lfm2.Lfm2Model": {"layers.0.ffn_norm": F, "embedding_norm": Z},
    # Post-norm encoders, and those that became pre-norm
    "bert.BertModel": {
        "embeddings.LayerNorm": E,
        "encoder.layer.0.attention.output.LayerNorm": A,
        "encoder.layer.0.output.LayerNorm": F,
    },
    "xlm_roberta_xl.XLMRobertaXLModel": {
        "encoder.layer.0.attention.self_attn_layer_norm": A,
        "encoder.layer.0.LayerNorm": F,
        "encoder.LayerNorm": Z,
    },
    "megatron_bert.MegatronBertModel": {"encoder.layer.0.attention.ln": A, "encoder.layer.0.ln": F, "encoder.ln": Z},
    "esm.EsmModel": {
        "encoder.layer.0.attention.LayerNorm": A,
        "encoder.layer.0.LayerNorm": F,
        "encoder.emb_layer_norm_after": Z,
    },
    "fnet.FNetModel": {"encoder.layer.0.fourier.output.LayerNorm": M, "encoder.layer.0.output.LayerNorm": F},
    "squeezebert.SqueezeBertModel": {
        "encoder.layers.0.post_attention.layernorm": A,
        "encoder.layers.0.output.layernorm": F,
    },
    # Encoders with decoders
    "t5.T5Model": {"decoder.block.0.layer.1.layer_norm": X, "decoder.block.0.layer.2.layer_norm": F},
    "bart.BartModel": {"decoder.layers.0.encoder_attn_layer_norm": X, "decoder.layernorm_embedding": E},
    "pix2struct.Pix2StructTextModel": {
        "layer.0.encoder_decoder_attention.layer_norm": X,
        "layer.0.mlp.layer_norm": F,
        "final_layer_norm": Z,
    },
    "dia.DiaModel": {
        "encoder.layers.0.post_sa_norm": F,
        "decoder.layers.0.pre_ca_norm": X,
        "decoder.layers.0.pre_mlp_norm": F,
    },
    # Vision
    "vit.ViTModel": {"layers.0.layernorm_before": A, "layers.0.layernorm_after": F, "layernorm": Z},
    "clip.CLIPVisionModel": {"pre_layrnorm": E, "encoder.layers.0.layer_norm1": A, "post_layernorm": Z},
    "swin.SwinModel": {"embeddings.norm": E, "encoder.layers.0.downsample.norm": "-", "layernorm": Z},
    "convnext.ConvNextModel": {"embeddings.layernorm": E, "layernorm": Z},
    "focalnet.FocalNetModel": {"encoder.stages.0.layers.0.norm1": M, "encoder.stages.0.layers.0.norm2": F},
    "poolformer.PoolFormerModel": {"encoder.block.0.0.before_norm": M, "encoder.block.0.0.after_norm": F},
    "sam.SamModel": {
        "mask_decoder.transformer.layers.0.layer_norm1": A,
        "mask_decoder.transformer.layers.0.layer_norm2": X,
        "mask_decoder.transformer.layers.0.layer_norm3": F,
        "mask_decoder.transformer.layers.0.layer_norm4": X,
    },
    "glm4v.Glm4vVisionModel": {"post_conv_layernorm": E, "post_layernorm": Z},
    # Vision with language
    "blip_2.Blip2QFormerModel": {"layernorm": E, "encoder.layer.0.output_query.LayerNorm": F},
    "lxmert.LxmertModel": {
        "encoder.x_layers.0.visual_attention.output.LayerNorm": X,
        "encoder.x_layers.0.visn_self_att.output.LayerNorm": A,
    },
    "idefics.IdeficsModel": {
        "gated_cross_attn_layers.0.input_layernorm": X,
        "gated_cross_attn_layers.0.post_attention_layernorm": F,
    },
    "layoutlmv3.LayoutLMv3Model": {"LayerNorm": E, "norm": E},
    # Speech
    "wav2vec2.Wav2Vec2Model": {
        "feature_projection.layer_norm": E,
        "encoder.layer_norm": E,
        "encoder.layers.0.layer_norm": A,
        "encoder.layers.0.final_layer_norm": F,
    },
    "wav2vec2_conformer.Wav2Vec2ConformerModel": {
        "encoder.layers.0.ffn1_layer_norm": F,
        "encoder.layers.0.conv_module.layer_norm": M,
        "encoder.layer_norm": Z,
    },
    "moonshine.MoonshineModel": {"encoder.groupnorm": E},
    "gemma3n.Gemma3nTextModel": {"layers.0.altup.router_norm": "-", "layers.0.laurel.post_laurel_norm": "-"},
}


@pytest.mark.parametrize("name", TABLE)
def test_roles_are_those_of_the_forward_pass(name):
    family = name.partition(".")[0]
    if importlib.util.find_spec(f"transformers.models.{family}") is None:
        pytest.skip("this version of transformers has no such model")
    modules = base_modules(build_small(model_classes([family])[name]))
    assert TABLE[name].keys() <= modules.keys()
    expected = {norm: () if roles == "-" else tuple(roles.split("+")) for norm, roles in TABLE[name].items()}
    assert find_roles(modules, TABLE[name]) == expected


def test_the_table_knows_every_role():
    known = {role for rows in TABLE.values() for roles in rows.values() for role in roles.split("+")}
    assert known == {*ROLES, "-"}
    assert sum(map(len, TABLE.values())) >= 100
