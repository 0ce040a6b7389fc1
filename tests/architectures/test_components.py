"""The full table of components of the families, and what a name that is not known becomes."""

import pytest
import torch
import transformers

from peft_lntune.architectures.components import ParameterPlace, find_components, find_contents, group_by_place
from peft_lntune.architectures.table import ARCHITECTURES, UNKNOWN, Contents
from peft_lntune.errors import UnsupportedError
from peft_lntune.norms.find import find_norms
from peft_lntune.planning.components import find_component_parameters
from peft_lntune.planning.facts import ModelFacts
from tests.cases import LAYERS, build


def rows(prefix: str, text: str) -> dict[str, str]:
    """`path: component` lines; one with ! has no bias, one with = names a parameter, not a module."""
    found = {}
    for line in text.strip().splitlines():
        path, _, component = line.strip().partition(": ")
        name = prefix + path.rstrip("!=")
        for parameter in ("",) if path.endswith("=") else (".weight",) if path.endswith("!") else (".weight", ".bias"):
            found[name + parameter] = component
    return found


def encoder(body: str) -> dict[str, str]:
    return {
        **rows(
            f"{body}.embeddings.",
            """
            word_embeddings!: word embeddings
            position_embeddings!: position embeddings
            token_type_embeddings!: type embeddings
            LayerNorm: embedding norm
            """,
        ),
        **rows(
            f"{body}.encoder.layer.*.",
            """
            attention.self.query: query
            attention.self.key: key
            attention.self.value: value
            attention.output.dense: attention output
            attention.output.LayerNorm: attention norm
            intermediate.dense: FFN up
            output.dense: FFN down
            output.LayerNorm: FFN norm
            """,
        ),
    }


BERT_HEAD = {
    "cls.predictions.bias": "head",
    **rows("cls.predictions.transform.", "dense: head\nLayerNorm: head"),
}
LLAMA = rows(
    "model.",
    """
    embed_tokens!: word embeddings
    layers.*.self_attn.q_proj!: query
    layers.*.self_attn.k_proj!: key
    layers.*.self_attn.v_proj!: value
    layers.*.self_attn.o_proj!: attention output
    layers.*.mlp.gate_proj!: FFN gate
    layers.*.mlp.up_proj!: FFN up
    layers.*.mlp.down_proj!: FFN down
    layers.*.input_layernorm!: attention norm
    layers.*.post_attention_layernorm!: FFN norm
    norm!: final norm
    """,
)
HEAD = {"lm_head.weight": "head"}


def without(table: dict[str, str], *parts: str) -> dict[str, str]:
    return {name: component for name, component in table.items() if not any(part in name for part in parts)}


def bart_layers(stack: str, crossed: bool) -> dict[str, str]:
    attentions = {"self_attn": f"{stack} ", **({"encoder_attn": f"{stack} cross-attention "} if crossed else {})}
    table = rows(
        f"model.{stack}.",
        f"""
        embed_positions!: {stack} position embeddings
        layernorm_embedding: {stack} embedding norm
        layers.*.self_attn_layer_norm: {stack} attention norm
        layers.*.fc1: {stack} FFN up
        layers.*.fc2: {stack} FFN down
        layers.*.final_layer_norm: {stack} FFN norm
        """,
    )
    for module, said in attentions.items():
        for projection, part in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output")):
            part = f"{stack} attention output" if (module, part) == ("self_attn", "output") else f"{said}{part}"
            table |= rows(f"model.{stack}.layers.*.{module}.", f"{projection}_proj: {part}")
    if crossed:
        table |= rows("model.decoder.layers.*.", "encoder_attn_layer_norm: decoder cross-attention norm")
    return table


# * stands for each layer.
TABLE: dict[str, dict[str, str]] = {
    "bert": {**encoder("bert"), **BERT_HEAD},
    "bert-crossed": {
        **encoder("bert"),
        **BERT_HEAD,
        **rows(
            "bert.encoder.layer.*.crossattention.",
            """
            self.query: cross-attention query
            self.key: cross-attention key
            self.value: cross-attention value
            output.dense: cross-attention output
            output.LayerNorm: cross-attention norm
            """,
        ),
    },
    "roberta": {
        **encoder("roberta"),
        "lm_head.bias": "head",
        **rows("lm_head.", "dense: head\nlayer_norm: head"),
    },
    "distilbert": {
        **rows(
            "distilbert.",
            """
            embeddings.word_embeddings!: word embeddings
            embeddings.position_embeddings!: position embeddings
            embeddings.LayerNorm: embedding norm
            transformer.layer.*.attention.q_lin: query
            transformer.layer.*.attention.k_lin: key
            transformer.layer.*.attention.v_lin: value
            transformer.layer.*.attention.out_lin: attention output
            transformer.layer.*.sa_layer_norm: attention norm
            transformer.layer.*.ffn.lin1: FFN up
            transformer.layer.*.ffn.lin2: FFN down
            transformer.layer.*.output_layer_norm: FFN norm
            """,
        ),
        **rows("", "vocab_transform: head\nvocab_layer_norm: head"),
        "vocab_projector.bias": "head",
    },
    "gpt2": rows(
        "transformer.",
        """
        wte!: word embeddings
        wpe!: position embeddings
        h.*.ln_1: attention norm
        h.*.attn.c_attn: query, key, value
        h.*.attn.c_proj: attention output
        h.*.ln_cross_attn: cross-attention norm
        h.*.crossattention.q_attn: cross-attention query
        h.*.crossattention.c_attn: cross-attention key, value
        h.*.crossattention.c_proj: cross-attention output
        h.*.ln_2: FFN norm
        h.*.mlp.c_fc: FFN up
        h.*.mlp.c_proj: FFN down
        ln_f: final norm
        """,
    ),
    "llama": {**LLAMA, **HEAD},
    "gemma2": {
        **without(LLAMA, "post_attention"),
        **rows(
            "model.layers.*.",
            """
            post_attention_layernorm!: attention norm
            pre_feedforward_layernorm!: FFN norm
            post_feedforward_layernorm!: FFN norm
            """,
        ),
    },
    "qwen3": {
        **LLAMA,
        **HEAD,
        **rows("model.layers.*.self_attn.", "q_norm!: query and key norm\nk_norm!: query and key norm"),
    },
    "cohere": {
        **without(LLAMA, "layernorm"),
        **rows("model.layers.*.", "input_layernorm!: attention and FFN norm"),
        **rows("model.layers.*.self_attn.", "q_norm!: query and key norm\nk_norm!: query and key norm"),
    },
    "phi3": {
        **without(LLAMA, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
        **HEAD,
        **rows("model.layers.*.", "self_attn.qkv_proj!: query, key, value\nmlp.gate_up_proj!: FFN gate, up"),
    },
    "mixtral": {
        **without(LLAMA, "mlp"),
        **HEAD,
        **rows(
            "model.layers.*.mlp.",
            """
            gate!: router
            experts.gate_up_proj=: FFN gate, up
            experts.down_proj=: FFN down
            """,
        ),
    },
    "t5": {
        "shared.weight": "word embeddings",
        # Only the first layer of a stack has the table of relative positions.
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "encoder position embeddings",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "decoder position embeddings",
        **rows(
            "encoder.",
            """
            block.*.layer.0.SelfAttention.q!: encoder query
            block.*.layer.0.SelfAttention.k!: encoder key
            block.*.layer.0.SelfAttention.v!: encoder value
            block.*.layer.0.SelfAttention.o!: encoder attention output
            block.*.layer.0.layer_norm!: encoder attention norm
            block.*.layer.1.DenseReluDense.wi!: encoder FFN up
            block.*.layer.1.DenseReluDense.wo!: encoder FFN down
            block.*.layer.1.layer_norm!: encoder FFN norm
            final_layer_norm!: encoder final norm
            """,
        ),
        **rows(
            "decoder.",
            """
            block.*.layer.0.SelfAttention.q!: decoder query
            block.*.layer.0.SelfAttention.k!: decoder key
            block.*.layer.0.SelfAttention.v!: decoder value
            block.*.layer.0.SelfAttention.o!: decoder attention output
            block.*.layer.0.layer_norm!: decoder attention norm
            block.*.layer.1.EncDecAttention.q!: decoder cross-attention query
            block.*.layer.1.EncDecAttention.k!: decoder cross-attention key
            block.*.layer.1.EncDecAttention.v!: decoder cross-attention value
            block.*.layer.1.EncDecAttention.o!: decoder cross-attention output
            block.*.layer.1.layer_norm!: decoder cross-attention norm
            block.*.layer.2.DenseReluDense.wi!: decoder FFN up
            block.*.layer.2.DenseReluDense.wo!: decoder FFN down
            block.*.layer.2.layer_norm!: decoder FFN norm
            final_layer_norm!: decoder final norm
            """,
        ),
    },
    "bart": {
        "model.shared.weight": "word embeddings",
        **bart_layers("encoder", crossed=False),
        **bart_layers("decoder", crossed=True),
    },
    "vit": {
        **rows(
            "vit.",
            """
            embeddings.cls_token=: class token
            embeddings.position_embeddings=: position embeddings
            embeddings.patch_embeddings.projection: patch embeddings
            layers.*.attention.q_proj: query
            layers.*.attention.k_proj: key
            layers.*.attention.v_proj: value
            layers.*.attention.o_proj: attention output
            layers.*.layernorm_before: attention norm
            layers.*.layernorm_after: FFN norm
            layers.*.mlp.fc1: FFN up
            layers.*.mlp.fc2: FFN down
            layernorm: final norm
            """,
        ),
        **rows("", "classifier: head"),
    },
    # Structures without a block of their own: what is not known is a path, its norms are known all the same.
    "modernbert": {
        "model.layers.1.attn_norm.weight": "attention norm",  # the first layer has none
        "decoder.bias": "decoder",
        **rows("head.", "dense!: head.dense\nnorm!: final norm"),
        **rows(
            "model.",
            """
            embeddings.tok_embeddings!: word embeddings
            embeddings.norm!: embedding norm
            layers.*.attn.Wqkv!: query, key, value
            layers.*.attn.Wo!: attention output
            layers.*.mlp_norm!: FFN norm
            layers.*.mlp.Wi!: FFN gate, up
            layers.*.mlp.Wo!: FFN down
            final_norm!: final norm
            """,
        ),
    },
    "mamba": {
        **rows(
            "backbone.",
            """
            embeddings!: word embeddings
            layers.*.norm!: mixer norm
            layers.*.mixer.A_log=: backbone.layers.mixer.A_log
            layers.*.mixer.D=: backbone.layers.mixer.D
            layers.*.mixer.conv1d: backbone.layers.mixer.conv1d
            layers.*.mixer.in_proj!: backbone.layers.mixer.in_proj
            layers.*.mixer.x_proj!: backbone.layers.mixer.x_proj
            layers.*.mixer.dt_proj: backbone.layers.mixer.dt_proj
            layers.*.mixer.out_proj!: backbone.layers.mixer.out_proj
            norm_f!: final norm
            """,
        ),
    },
}


@pytest.mark.parametrize("family", TABLE)
def test_families(family):
    expected = {}
    for pattern, component in TABLE[family].items():
        parameter = "bias" if pattern.endswith(".bias") else "weight"
        for layer in range(LAYERS) if "*" in pattern else (None,):
            alone = next((int(part) for part in pattern.split(".") if part.isdigit()), None)
            place = ParameterPlace(component, alone if layer is None else layer, parameter)
            expected[pattern.replace("*", str(layer))] = place
    found = find_components(dict(build(family).named_parameters()))
    assert found == expected


@pytest.mark.parametrize("family", [family for family in TABLE if family != "modernbert"])
def test_roles_that_are_known_change_nothing(family):
    model = build(family)
    roles = {name: norm.roles for name, norm in find_norms(model).items()}
    names = dict(model.named_parameters())
    assert find_components(names, roles) == find_components(names)


def test_vit_of_older_versions():
    names = ["attention.attention.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    found = find_components([f"vit.encoder.layer.3.{name}.weight" for name in names])
    assert [place[:2] for place in found.values()] == [
        ("query", 3),
        ("attention output", 3),
        ("FFN up", 3),
        ("FFN down", 3),
    ]


def test_t5_with_a_gate():
    names = [f"encoder.block.0.layer.1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1", "wo")]
    assert [place.component for place in find_components(names).values()] == ["FFN gate", "FFN up", "FFN down"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("weight", ("model", None, "weight")),  # a module that is a leaf itself
        ("scale", ("scale", None, "weight")),
        ("0.weight", ("model", 0, "weight")),
        ("net.3.sub.7.linear.bias", ("net.sub.7.linear", 3, "bias")),  # a second number stays: an expert, a sub-layer
        ("mixer.dt_bias", ("mixer.dt_bias", None, "bias")),
        ("classifier.2.bias", ("head", None, "bias")),
    ],
)
def test_unknown_names(name, place):
    assert find_components([name]) == {name: place}


@pytest.mark.parametrize(
    ("names", "components"),
    [
        (["layer.0.intermediate.dense.weight", "heads.0.weight", "cls.1.weight"], ["FFN up", "heads", "head"]),
        (["a.0.mlp.fc1.weight", "b.0.mlp.fc1.weight"], ["a FFN up", "b FFN up"]),
        (
            [
                "m.text.encoder.layer.0.output.dense.weight",
                "m.vision.layers.0.mlp.fc2.weight",
                "m.text.pooler.dense.bias",
            ],
            ["text FFN down", "vision FFN down", "text pooler"],
        ),
        (
            [f"{stack}.0.mlp.fc1.weight" for stack in ("a.x.layers", "a.y.layers", "b.layers")],
            ["a.x FFN up", "a.y FFN up", "b FFN up"],
        ),
        (["layers.0.fc1.weight", "layers.more.0.fc1.weight"], ["FFN up", "more FFN up"]),
        (["0.mlp.fc1.weight", "b.0.mlp.fc1.weight"], ["FFN up", "b FFN up"]),
    ],
)
def test_stacks_of_layers_are_told_apart(names, components):
    assert [place.component for place in find_components(names).values()] == components


def test_groups():
    names = ["h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.bias", "h.1.mlp.c_fc.weight"]
    places = find_components(names)
    assert list(group_by_place(places).values()) == [[name] for name in names]
    assert group_by_place(places, layers=False) == {
        ParameterPlace("FFN up", None, "weight"): [names[0], names[2]],
        ParameterPlace("FFN up", None, "bias"): [names[1]],
    }


def test_no_two_rows_contradict_each_other():
    seen: dict[str, Contents] = {}
    for row in ARCHITECTURES.values():
        for modules in (row.modules, *(span.modules for span in row.sublayers)):
            for end, contents in modules.items():
                if contents != UNKNOWN:
                    assert seen.setdefault(end, contents) == contents


KNOWN = ("query", "key", "value", "attention_output", "ffn_up", "ffn_gate", "ffn_down")
SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
# By class, the matrices of each component, as the model's own source names them; {} stands for the layers.
BLOCKS = {
    "RwkvModel": {
        "key": "blocks.{}.attention.key",
        "value": "blocks.{}.attention.value",
        "attention_output": "blocks.{}.attention.output",
        "ffn_up": "blocks.{}.feed_forward.key",
        "ffn_gate": "blocks.{}.feed_forward.receptance",
        "ffn_down": "blocks.{}.feed_forward.value",
    },
    "DebertaV2Model": {
        "query": "encoder.layer.{}.attention.self.query_proj",
        "key": "encoder.layer.{}.attention.self.key_proj",
        "value": "encoder.layer.{}.attention.self.value_proj",
        "attention_output": "encoder.layer.{}.attention.output.dense",
        "ffn_up": "encoder.layer.{}.intermediate.dense",
        "ffn_down": "encoder.layer.{}.output.dense",
    },
    "GPTJModel": {
        "query": "h.{}.attn.q_proj",
        "key": "h.{}.attn.k_proj",
        "value": "h.{}.attn.v_proj",
        "attention_output": "h.{}.attn.out_proj",
        "ffn_up": "h.{}.mlp.fc_in",
        "ffn_down": "h.{}.mlp.fc_out",
    },
    "MPNetModel": {
        "query": "encoder.layer.{}.attention.attn.q",
        "key": "encoder.layer.{}.attention.attn.k",
        "value": "encoder.layer.{}.attention.attn.v",
        "attention_output": "encoder.layer.{}.attention.attn.o",
        "ffn_up": "encoder.layer.{}.intermediate.dense",
        "ffn_down": "encoder.layer.{}.output.dense",
    },
    "BertModel": {
        "query": "encoder.layer.{}.attention.self.query",
        "attention_output": "encoder.layer.{}.attention.output.dense",
        "ffn_down": "encoder.layer.{}.output.dense",
    },
}


def on_meta(name, **more):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class(**{**SMALL, **more}))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_matrix_is_told_by_the_block_it_is_in(name):
    """`key` of an FFN is no attention's key, and `output.dense` of an attention is no FFN's."""
    model = on_meta(name)
    for component in KNOWN if len(BLOCKS[name]) > 3 else BLOCKS[name]:
        expected = BLOCKS[name].get(component)
        found = find_component_parameters(ModelFacts(model), [component], tune=("weight",))
        assert list(found) == ([] if expected is None else [expected.format(layer) for layer in range(2)])


def test_cross_attention_of_models_that_name_it_otherwise():
    model = on_meta("LxmertModel", l_layers=1, x_layers=1, r_layers=1, num_attention_heads=2, intermediate_size=8)
    down = find_component_parameters(ModelFacts(model), ["ffn_down"], tune=("weight",))
    assert down
    assert not any("att" in name.rpartition(".output")[0].rpartition(".")[2] for name in down)


@pytest.mark.parametrize("name", ["GPTNeoXModel", "BloomModel", "FalconModel", "GPTBigCodeModel"])
def test_queries_that_lie_head_by_head_are_not_cut_out(name):
    more = {"multi_query": False} if name == "GPTBigCodeModel" else {}
    model = on_meta(name, **more)
    with pytest.raises(UnsupportedError, match="query, key, value in one matrix, head by head"):
        find_component_parameters(ModelFacts(model), ["query"])
    whole = find_component_parameters(ModelFacts(model), ["query", "key", "value"])
    assert len(whole) == 2
    assert {block for found in whole.values() for block in found.values()} == {None}


@pytest.mark.parametrize(
    ("name", "ends"),
    [("MptModel", (8, 16, 24)), ("ModernBertModel", (8, 16, 24)), ("GPTBigCodeModel", (8, 12, 16))],
)
def test_queries_that_lie_one_after_the_other_are(name, ends):
    """Fewer outputs are keys where heads share them."""
    model = on_meta(name, n_heads=2, d_model=8, n_layers=2, intermediate_size=8, pad_token_id=0)
    for number, component in enumerate(("query", "key", "value")):
        for found in find_component_parameters(ModelFacts(model), [component], tune=("weight",)).values():
            assert found["weight"].ranges == (((0, *ends)[number], ends[number]),)


def test_a_path_that_ends_like_a_component_is_none():
    names = ["h.0.mixer.key.weight", "h.0.memory.query.weight", "h.0.mixer.pooler_key.weight", "h.0.router.value.bias"]
    assert set(find_contents(names).values()) == {UNKNOWN}
