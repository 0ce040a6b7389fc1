"""The full table of components of the families, and what a name that is not known becomes."""

import pytest

from peft_lntune.analysis.components import STRUCTURES, Place, find_components, group_by_place
from peft_lntune.core.norms import find_norms
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
            embeddings.tok_embeddings!: model.embeddings.tok_embeddings
            embeddings.norm!: embedding norm
            layers.*.attn.Wqkv!: model.layers.attn.Wqkv
            layers.*.attn.Wo!: model.layers.attn.Wo
            layers.*.mlp_norm!: FFN norm
            layers.*.mlp.Wi!: model.layers.mlp.Wi
            layers.*.mlp.Wo!: model.layers.mlp.Wo
            final_norm!: final norm
            """,
        ),
    },
    "mamba": {
        **rows(
            "backbone.",
            """
            embeddings!: backbone.embeddings
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
            place = Place(component, alone if layer is None else layer, parameter)
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
        Place("FFN up", None, "weight"): [names[0], names[2]],
        Place("FFN up", None, "bias"): [names[1]],
    }


def test_no_two_structures_contradict_each_other():
    seen: dict[str, str] = {}
    for table in STRUCTURES.values():
        for end, component in table.items():
            assert seen.setdefault(end, component) == component
