"""The full table of sub-layers of every family, and of structures that have no family here."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_lntune.architectures.sublayers import SUBLAYER_ROLES, Sublayer, find_sublayers
from peft_lntune.architectures.table import ARCHITECTURES
from peft_lntune.core.module_tree import base_modules
from tests.cases import FAMILIES, LAYERS, build, inputs

A, X, F = SUBLAYER_ROLES

# Where the blocks are, * for each layer, and what is in one: role, entry, exit.
Table = dict[str, list[tuple[str, str, str]]]

BERT = [(A, "attention.self.query", "attention.output.dense"), (F, "intermediate.dense", "output.dense")]
BERT_CROSSED = [BERT[0], (X, "crossattention.self.query", "crossattention.output.dense"), BERT[1]]
LLAMA = [(A, "self_attn.q_proj", "self_attn.o_proj"), (F, "mlp.gate_proj", "mlp.down_proj")]
NEOX = [(A, "attention.query_key_value", "attention.dense"), (F, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")]
BART = [(A, "self_attn.q_proj", "self_attn.out_proj"), (F, "fc1", "fc2")]
BART_CROSSED = [BART[0], (X, "encoder_attn.q_proj", "encoder_attn.out_proj"), BART[1]]
CLIP = [(A, "self_attn.q_proj", "self_attn.out_proj"), (F, "mlp.fc1", "mlp.fc2")]
SEQ2SEQ: Table = {"model.encoder.layers.*": BART, "model.decoder.layers.*": BART_CROSSED}

TABLE: dict[str, Table] = {
    "bert": {"bert.encoder.layer.*": BERT},
    "bert-crossed": {"bert.encoder.layer.*": BERT_CROSSED},
    "roberta": {"roberta.encoder.layer.*": BERT},
    "xlm-roberta": {"roberta.encoder.layer.*": BERT},
    "distilbert": {
        "distilbert.transformer.layer.*": [
            (A, "attention.q_lin", "attention.out_lin"),
            (F, "ffn.lin1", "ffn.lin2"),
        ]
    },
    "electra": {"electra.encoder.layer.*": BERT},
    "deberta-v2": {"deberta.encoder.layer.*": [(A, "attention.self.query_proj", "attention.output.dense"), BERT[1]]},
    "modernbert": {"model.layers.*": [(A, "attn.Wqkv", "attn.Wo"), (F, "mlp.Wi", "mlp.Wo")]},
    "gpt2": {
        "transformer.h.*": [
            (A, "attn.c_attn", "attn.c_proj"),
            (X, "crossattention.q_attn", "crossattention.c_proj"),
            (F, "mlp.c_fc", "mlp.c_proj"),
        ]
    },
    "gpt-neox": {"gpt_neox.layers.*": NEOX},
    "gpt-neox-sequential": {"gpt_neox.layers.*": NEOX},
    "opt": {"model.decoder.layers.*": BART},
    **{
        family: {"model.layers.*": LLAMA}
        for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "cohere")
    },
    "mixtral": {"model.layers.*": LLAMA[:1]},  # of experts no leaf answers for the whole FFN
    "phi3": {
        "model.layers.*": [(A, "self_attn.qkv_proj", "self_attn.o_proj"), (F, "mlp.gate_up_proj", "mlp.down_proj")]
    },
    "mamba": {},
    "mamba2": {},
    "t5": {
        "encoder.block.*.layer.0": [(A, "SelfAttention.q", "SelfAttention.o")],
        "encoder.block.*.layer.1": [(F, "DenseReluDense.wi", "DenseReluDense.wo")],
        "decoder.block.*.layer.0": [(A, "SelfAttention.q", "SelfAttention.o")],
        "decoder.block.*.layer.1": [(X, "EncDecAttention.q", "EncDecAttention.o")],
        "decoder.block.*.layer.2": [(F, "DenseReluDense.wi", "DenseReluDense.wo")],
    },
    "bart": SEQ2SEQ,
    "whisper": SEQ2SEQ,
    "vit": {"vit.layers.*": [(A, "attention.q_proj", "attention.o_proj"), (F, "mlp.fc1", "mlp.fc2")]},
    "clip": {"text_model.encoder.layers.*": CLIP, "vision_model.encoder.layers.*": CLIP},
}


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_all_are_found_and_nothing_else(self, family):
        expected = {
            Sublayer(role, block, f"{block}.{entry}", f"{block}.{exit}")
            for pattern, rows in TABLE[family].items()
            for block in (pattern.replace("*", str(layer)) for layer in range(LAYERS))
            for role, entry, exit in rows
        }
        found = find_sublayers(base_modules(build(family)))
        assert set(found) == expected
        assert len(found) == len(expected)

    def test_both_leaves_are_called_once_each_in_turn(self, family):
        """What a layer's hooks rely on, whatever the names say."""
        model, called = build(family), []
        places = find_sublayers(base_modules(model))
        for place in places:
            for name in (place.entry, place.exit):
                model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: called.append(name))
        with torch.no_grad():
            model(**inputs(family))
        for place in places:
            assert [name for name in called if name in (place.entry, place.exit)] == [place.entry, place.exit]


def test_in_a_block_they_come_in_the_order_of_their_roles():
    found = find_sublayers(base_modules(build("bart")))
    decoder = [place.role for place in found if place.block == "model.decoder.layers.0"]
    assert decoder == list(SUBLAYER_ROLES)
    blocks = [place.block for place in found]
    assert blocks == sorted(blocks, key=blocks.index)


def test_an_adapted_model_has_the_same():
    plain = find_sublayers(base_modules(build("bert")))
    adapted = get_peft_model(build("bert"), LoraConfig(target_modules=["query", "dense"])).base_model.model
    assert find_sublayers(base_modules(adapted)) == plain


def names(*leaves: str) -> list[str]:
    """Names of all modules of a model with these leaves."""
    found = {""}
    for leaf in leaves:
        parts = leaf.split(".")
        found |= {".".join(parts[: end + 1]) for end in range(len(parts))}
    return sorted(found)


@pytest.mark.parametrize(
    ("leaves", "found"),
    [
        ("attention.self.in_proj attention.output.dense", {A: "attention.output.dense"}),  # DeBERTa
        (
            "attention.attention.query attention.output.dense mlp.fc1 mlp.fc2",
            {A: "attention.output.dense", F: "mlp.fc2"},
        ),
        (
            "attention.attn.q attention.attn.o intermediate.dense output.dense",
            {A: "attention.attn.o", F: "output.dense"},
        ),
        ("attention.query attention.dense ffn ffn_output", {A: "attention.dense", F: "ffn_output"}),  # ALBERT
        ("attn.q_proj attn.out_proj mlp.fc_in mlp.fc_out", {A: "attn.out_proj", F: "mlp.fc_out"}),  # GPT-J
        ("attn.attention.q_proj attn.attention.out_proj", {A: "attn.attention.out_proj"}),  # GPT-Neo
        ("self_attention.query_key_value self_attention.dense", {A: "self_attention.dense"}),  # BLOOM, Falcon
        ("self_attn.q_proj self_attn.dense mlp.fc1 mlp.fc2", {A: "self_attn.dense", F: "mlp.fc2"}),  # Phi
        ("DenseReluDense.wi_0 DenseReluDense.wi_1 DenseReluDense.wo", {F: "DenseReluDense.wo"}),  # T5 1.1
        ("mlp.gate_proj mlp.down_proj mlp.up_proj router experts", {}),  # an FFN and experts side by side
        ("mlp.experts.0.gate_proj mlp.experts.0.down_proj mlp.gate", {}),
        ("intermediate.dense output.dense", {}),  # no block around them
        ("fc1 fc2", {}),
        ("self_attn.q_proj mlp.gate_proj", {}),  # no exit
    ],
)
def test_structures_of_other_models(leaves, found):
    for above in ("", "layers.0."):
        places = find_sublayers(names(*(f"{above}{leaf}" for leaf in leaves.split())))
        assert {place.role: place.exit for place in places} == {role: f"{above}{leaf}" for role, leaf in found.items()}


def test_torchs_own_layers_have_an_ffn_and_attention_that_calls_no_leaf():
    model = nn.Transformer(8, 2, 1, 1, 8, batch_first=True)
    found = find_sublayers(base_modules(model))
    assert [(place.role, place.exit) for place in found] == [
        (F, "encoder.layers.0.linear2"),
        (F, "decoder.layers.0.linear2"),
    ]


def test_no_two_rows_are_the_same_question():
    spans = [span for row in ARCHITECTURES.values() for span in row.sublayers]
    questions = [(span.role, span.entry, span.exit) for span in spans]
    assert len(set(questions)) == len(questions)
    assert {span.role for span in spans} == set(SUBLAYER_ROLES)
