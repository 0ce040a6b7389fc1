"""The full table of roles of every family, and what is not known."""

import pytest
from torch import nn

from peft_lntune.architectures.roles import ROLES, STRUCTURES, find_roles
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


# * stands for each layer; two roles are joined by +.
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
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    expected = {
        pattern.replace("*", str(layer)): tuple(roles.split("+"))
        for pattern, roles in TABLE[family].items()
        for layer in range(LAYERS)
    }
    found = find_norms(build(family), parameterless=True)
    assert {name: norm.roles for name, norm in found.items()} == expected


def names(*children: str) -> list[str]:
    return ["", *children]


@pytest.mark.parametrize(
    ("children", "roles"),
    [
        ("ln_1 attn mlp", {"ln_1": ("attention", "ffn")}),  # GPT-J
        ("input_layernorm self_attention mlp", {"input_layernorm": ("attention", "ffn")}),  # Falcon
        ("self_attn q_layernorm k_layernorm", {"q_layernorm": ("qk",)}),  # Phi
        ("mamba feed_forward input_layernorm pre_ff_layernorm", {"input_layernorm": ("mixer",)}),  # Jamba
        ("self_attn feed_forward input_layernorm pre_ff_layernorm", {"input_layernorm": ("attention",)}),
        ("mamba feed_forward pre_ff_layernorm", {"pre_ff_layernorm": ("ffn",)}),
        ("attention ffn full_layer_layer_norm", {"full_layer_layer_norm": ("ffn",)}),  # ALBERT
        ("attention norm1 norm2 mlp", {"norm1": ("attention",), "norm2": ("ffn",)}),  # DINOv2
        ("norm1 attn norm2 mlp", {"norm1": ("attention",), "norm2": ("ffn",)}),  # timm
        ("patch_embed blocks norm", {"norm": ("final",)}),
        ("to_q to_k norm_cross", {"norm_cross": ("cross_attention",)}),  # diffusers
        ("word_embeddings word_embeddings_layernorm h", {"word_embeddings_layernorm": ("embedding",)}),  # BLOOM
    ],
)
def test_structures_of_other_models(children, roles):
    assert find_roles(names(*children.split()), roles) == roles


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


@pytest.mark.parametrize("case", NORMS)
def test_unknown(case):
    block = nn.ModuleDict({"before": NORMS[case].norm(), "inner": nn.Linear(2, 2), "norm": NORMS[case].norm()})
    found = find_norms(nn.ModuleDict({"blocks": nn.ModuleList([block])}))
    assert {name: norm.roles for name, norm in found.items()} == {"blocks.0.before": (), "blocks.0.norm": ()}


def test_the_table_is_sound():
    """Each row names known roles, and no two rows are the same question with another answer."""
    seen = {}
    for row in STRUCTURES:
        for path, roles in row.roles.items():
            assert roles
            assert set(roles) <= set(ROLES)
            assert list(roles) == [role for role in ROLES if role in roles]
            assert seen.setdefault((row.has, row.lacks, path), roles) == roles
