"""Roles on many architectures, each read off the forward pass of the model's source, and what is not known."""

import importlib.util

import pytest
from torch import nn

from benchmarks.harness.architectures import build_small, model_classes
from peft_lntune.architectures.roles import ROLES, find_roles
from peft_lntune.architectures.table import ARCHITECTURES
from peft_lntune.core.module_tree import base_modules
from peft_lntune.norms.find import find_norms
from tests.cases import FAMILIES, LAYERS, NORMS, build

A, X, F, M, QK, E, Z = "attention", "cross_attention", "ffn", "mixer", "qk", "embedding", "final"

LLAMA = {
    "model.layers.*.input_layernorm": A,
    "model.layers.*.post_attention_layernorm": F,
    "model.norm": Z,
}
SANDWICH = {
    "model.layers.*.input_layernorm": A,
    "model.layers.*.post_attention_layernorm": A,
    "model.layers.*.pre_feedforward_layernorm": F,
    "model.layers.*.post_feedforward_layernorm": F,
    "model.norm": Z,
}
NEOX = {
    "gpt_neox.layers.*.input_layernorm": A,
    "gpt_neox.layers.*.post_attention_layernorm": F,
    "gpt_neox.final_layer_norm": Z,
}
QK_NORMS = {"model.layers.*.self_attn.q_norm": QK, "model.layers.*.self_attn.k_norm": QK}


def encoder(body: str) -> dict[str, str]:
    return {
        f"{body}.embeddings.LayerNorm": E,
        f"{body}.encoder.layer.*.attention.output.LayerNorm": A,
        f"{body}.encoder.layer.*.output.LayerNorm": F,
    }


def seq2seq(embedding: bool) -> dict[str, str]:
    last, role = ("layernorm_embedding", E) if embedding else ("layer_norm", Z)
    return {
        "model.encoder.layers.*.self_attn_layer_norm": A,
        "model.encoder.layers.*.final_layer_norm": F,
        f"model.encoder.{last}": role,
        "model.decoder.layers.*.self_attn_layer_norm": A,
        "model.decoder.layers.*.encoder_attn_layer_norm": X,
        "model.decoder.layers.*.final_layer_norm": F,
        f"model.decoder.{last}": role,
    }


# By family of `tests.cases`, every norm; by class of transformers, some; by the names of children, some. "*"
# stands for each layer, two roles are joined by "+", and "-" stands for a role that must stay unknown: the norm serves
# none of the sub-layers that roles speak of.
TABLE: dict[str, dict[str, str]] = {
    "bert": {**encoder("bert"), "cls.predictions.transform.LayerNorm": Z},
    "bert-crossed": {
        **encoder("bert"),
        "bert.encoder.layer.*.crossattention.output.LayerNorm": X,
        "cls.predictions.transform.LayerNorm": Z,
    },
    "roberta": {**encoder("roberta"), "lm_head.layer_norm": Z},
    "xlm-roberta": {**encoder("roberta"), "lm_head.layer_norm": Z},
    "electra": {**encoder("electra"), "generator_predictions.LayerNorm": Z},
    "deberta-v2": {
        **encoder("deberta"),
        "deberta.encoder.LayerNorm": E,
        "deberta.encoder.conv.LayerNorm": M,
        "cls.predictions.transform.LayerNorm": Z,
    },
    "distilbert": {
        "distilbert.embeddings.LayerNorm": E,
        "distilbert.transformer.layer.*.sa_layer_norm": A,
        "distilbert.transformer.layer.*.output_layer_norm": F,
        "vocab_layer_norm": Z,
    },
    "modernbert": {
        "model.embeddings.norm": E,
        "model.layers.1.attn_norm": A,  # the first layer has none
        "model.layers.*.mlp_norm": F,
        "model.final_norm": Z,
        "head.norm": Z,
    },
    "gpt2": {
        "transformer.h.*.ln_1": A,
        "transformer.h.*.ln_cross_attn": X,
        "transformer.h.*.ln_2": F,
        "transformer.ln_f": Z,
    },
    "gpt-neox": NEOX,
    "gpt-neox-sequential": NEOX,
    "opt": {
        "model.decoder.layers.*.self_attn_layer_norm": A,
        "model.decoder.layers.*.final_layer_norm": F,
        "model.decoder.final_layer_norm": Z,
    },
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, **QK_NORMS},
    "gemma": LLAMA,
    "gemma2": SANDWICH,
    "gemma3": {**SANDWICH, **QK_NORMS},
    "phi3": LLAMA,
    "olmo": LLAMA,  # its norms have no parameters
    "olmo2": {
        "model.layers.*.post_attention_layernorm": A,
        "model.layers.*.post_feedforward_layernorm": F,
        "model.norm": Z,
        **QK_NORMS,
    },
    "cohere": {"model.layers.*.input_layernorm": f"{A}+{F}", "model.norm": Z, **QK_NORMS},
    "mamba": {"backbone.layers.*.norm": M, "backbone.norm_f": Z},
    "mamba2": {"backbone.layers.*.norm": M, "backbone.layers.*.mixer.norm": M, "backbone.norm_f": Z},
    "t5": {
        "encoder.block.*.layer.0.layer_norm": A,
        "encoder.block.*.layer.1.layer_norm": F,
        "encoder.final_layer_norm": Z,
        "decoder.block.*.layer.0.layer_norm": A,
        "decoder.block.*.layer.1.layer_norm": X,
        "decoder.block.*.layer.2.layer_norm": F,
        "decoder.final_layer_norm": Z,
    },
    "bart": seq2seq(embedding=True),
    "whisper": seq2seq(embedding=False),
    "vit": {"vit.layers.*.layernorm_before": A, "vit.layers.*.layernorm_after": F, "vit.layernorm": Z},
    "clip": {
        "text_model.encoder.layers.*.layer_norm1": A,
        "text_model.encoder.layers.*.layer_norm2": F,
        "text_model.final_layer_norm": Z,
        "vision_model.pre_layrnorm": E,
        "vision_model.encoder.layers.*.layer_norm1": A,
        "vision_model.encoder.layers.*.layer_norm2": F,
        "vision_model.post_layernorm": Z,
    },
    # By class
    # Norms before each sub-layer, behind it, or on both sides
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
    # By the names of children
    "input_layernorm self_attention mlp": {"input_layernorm": f"{A}+{F}"},  # Falcon
    "self_attn q_layernorm k_layernorm": {"q_layernorm": QK},  # Phi, where it normalizes queries
    "attention ffn full_layer_layer_norm": {"full_layer_layer_norm": F},  # ALBERT
    "attention norm1 norm2 mlp": {"norm1": A, "norm2": F},  # DINOv2
    "norm1 attn norm2 mlp": {"norm1": A, "norm2": F},  # timm
    "patch_embed blocks norm": {"norm": Z},
    "to_q to_k norm_cross": {"norm_cross": X},  # diffusers
    "word_embeddings word_embeddings_layernorm h": {"word_embeddings_layernorm": E},  # BLOOM
}
CLASSES = [key for key in TABLE if "." in key]
CHILDREN = [key for key in TABLE if " " in key]


def expected(key: str, layers: int = LAYERS) -> dict[str, tuple[str, ...]]:
    return {
        pattern.replace("*", str(layer)): () if roles == "-" else tuple(roles.split("+"))
        for pattern, roles in TABLE[key].items()
        for layer in range(layers)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    found = find_norms(build(family), parameterless=True)
    assert {name: norm.roles for name, norm in found.items()} == expected(family)


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name):
    family = name.partition(".")[0]
    if importlib.util.find_spec(f"transformers.models.{family}") is None:
        pytest.skip("this version of transformers has no such model")
    modules = base_modules(build_small(model_classes([family])[name]))
    assert TABLE[name].keys() <= modules.keys()
    assert find_roles(modules, TABLE[name]) == expected(name)


def names(*children: str) -> list[str]:
    return ["", *children]


@pytest.mark.parametrize("children", CHILDREN)
def test_children(children):
    assert find_roles(names(*children.split()), TABLE[children]) == expected(children)


def test_the_table_knows_every_role():
    assert set(TABLE) == {*FAMILIES, *CLASSES, *CHILDREN}
    known = {role for rows in TABLE.values() for roles in rows.values() for role in roles.split("+")}
    assert known == {*ROLES, "-"}
    assert sum(map(len, TABLE.values())) >= 100


def test_torchs_own_layers():
    decoder = nn.Transformer(8, 2, 1, 1, 8, batch_first=True)
    found = {name: norm.roles for name, norm in find_norms(decoder).items()}
    assert found == {
        "encoder.layers.0.norm1": (A,),
        "encoder.layers.0.norm2": (F,),
        "encoder.norm": (Z,),
        "decoder.layers.0.norm1": (A,),
        "decoder.layers.0.norm2": (X,),
        "decoder.layers.0.norm3": (F,),
        "decoder.norm": (Z,),
    }


def test_the_same_name_in_another_structure():
    block = ["self_attn", "mlp", "post_attention_layernorm"]
    asked = ["post_attention_layernorm"]
    assert find_roles(names(*block, "input_layernorm"), asked) == {asked[0]: ("ffn",)}
    assert find_roles(names(*block, "post_feedforward_layernorm"), asked) == {asked[0]: ("attention",)}
    assert find_roles(names(*block), asked) == {asked[0]: ()}
    assert find_roles(names("mamba", "feed_forward", "pre_ff_layernorm"), ["pre_ff_layernorm"]) == {
        "pre_ff_layernorm": ("ffn",)
    }


@pytest.mark.parametrize("case", NORMS)
def test_unknown(case):
    block = nn.ModuleDict({"before": NORMS[case].norm(), "inner": nn.Linear(2, 2), "norm": NORMS[case].norm()})
    found = find_norms(nn.ModuleDict({"blocks": nn.ModuleList([block])}))
    assert {name: norm.roles for name, norm in found.items()} == {"blocks.0.before": (), "blocks.0.norm": ()}


def test_the_table_is_sound():
    """Each row names known roles, and no two rows are the same question with another answer."""
    seen = {}
    for place in (place for row in ARCHITECTURES.values() for place in row.norms):
        for path, roles in place.roles.items():
            assert roles
            assert set(roles) <= set(ROLES)
            assert list(roles) == [role for role in ROLES if role in roles]
            assert seen.setdefault((frozenset(place.has), frozenset(place.lacks), path), roles) == roles
