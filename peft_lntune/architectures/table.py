"""The table of architectures: one row per structure, which may be that of many models.

The rows answer four questions: which sub-layer a norm serves (`roles.py`), where a sub-layer begins and ends
(`sublayers.py`), to which component a parameter belongs (`components.py`), and what LoRA tunes by default
(`lora_targets`).
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from peft_lntune.architectures.role_names import ATTENTION, CROSS, FFN, MIXER
from peft_lntune.core.module_tree import below

__all__ = [
    "ARCHITECTURES",
    "LAYER_MATRICES",
    "MATRICES",
    "UNKNOWN",
    "Architecture",
    "Component",
    "ComponentName",
    "Contents",
    "MatrixName",
    "NormPlace",
    "Span",
    "attention",
    "contents_by_path",
    "ffn",
    "lora_targets",
]

EMBEDDING, FINAL = "embedding", "final"


class Component(StrEnum):
    """A component of a model. Attention over an encoder's output counts as attention.

    Configs accept and store the value.

    Attributes:
        label: name in tables.
        meaning: description in error messages and docs.
    """

    label: str
    meaning: str

    def __new__(cls, value: str, label: str, meaning: str) -> "Component":
        member = str.__new__(cls, value)
        member._value_, member.label, member.meaning = value, label, meaning
        return member

    QUERY = "query", "query", "the projection to queries"
    KEY = "key", "key", "the projection to keys"
    VALUE = "value", "value", "the projection to values"
    ATTENTION_OUTPUT = "attention_output", "attention output", "the projection behind attention"
    FFN_UP = "ffn_up", "FFN up", "the FFN's first projection"
    FFN_GATE = "ffn_gate", "FFN gate", "the FFN's gate, where it has one"
    FFN_DOWN = "ffn_down", "FFN down", "the FFN's last projection"
    NORM = "norm", "norm", "every norm"
    EMBEDDING = "embedding", "embeddings", "word, position and type embeddings"
    POOLER = "pooler", "pooler", "the dense layer over the first token"


MatrixName = Literal[
    "query", "key", "value", "attention_output", "ffn_up", "ffn_gate", "ffn_down", "embedding", "pooler"
]
ComponentName = Literal[MatrixName, "norm"]

MATRICES = tuple(component for component in Component if component is not Component.NORM)
"""The components whose weights are matrices."""

LAYER_MATRICES = tuple(part for part in MATRICES if part not in (Component.EMBEDDING, Component.POOLER))
"""The matrices of a model's layers."""


@dataclass(frozen=True)
class Contents:
    """The contents of a module.

    Attributes:
        components: components in the order of the matrix's outputs; empty for modules that configs cannot choose, such
            as a router.
        label: name in tables.
        by_head: whether several components are interleaved head by head, or in an unknown order.
    """

    components: tuple[Component, ...]
    label: str
    by_head: bool = False


UNKNOWN = Contents((), "")


class _Place:
    def __init__(self, has: Iterable[str], lacks: str) -> None:
        self.has, self.lacks = tuple(has), tuple(lacks.split())

    def fits(self, module: str, names: Container[str]) -> bool:
        """Whether a module has this structure.

        Args:
            module: name of the module.
            names: names of all modules.

        Returns:
            True where all paths of `has` exist below the module, and none of `lacks`.
        """
        found = all(below(module, path) in names for path in self.has)
        return found and not any(below(module, path) in names for path in self.lacks)


class NormPlace(_Place):
    """A module that contains norms.

    Args:
        has: paths that must exist below the module, separated by spaces.
        roles: the role or roles of each norm, by its path below the module.
        lacks: paths that must not exist below the module, separated by spaces.

    Example:
        >>> place = NormPlace("attn mlp", {"ln": ("attention", "ffn")})
        >>> place.fits("h.0", ["h.0", "h.0.ln", "h.0.attn", "h.0.mlp"])
        True
    """

    def __init__(self, has: str, roles: Mapping[str, str | tuple[str, ...]], lacks: str = "") -> None:
        super().__init__(has.split(), lacks)
        self.roles = {path: (its,) if isinstance(its, str) else its for path, its in roles.items()}


class Span(_Place):
    """A sub-layer below a block, from the leaf that reads its input to the one that gives its output.

    Args:
        role: `"attention"`, `"cross_attention"` or `"ffn"`.
        modules: contents of its modules, by their paths below the block; `UNKNOWN` where the path alone is ambiguous.
            The first reads the input, the last gives the output.
        has: further paths that must exist below the block, separated by spaces.
        lacks: paths that must not exist below the block, separated by spaces.

    Example:
        >>> span = Span("ffn", {"mlp.up": UP, "mlp.down": DOWN})
        >>> span.entry, span.exit
        ('mlp.up', 'mlp.down')
    """

    def __init__(self, role: str, modules: Mapping[str, Contents], has: str = "", lacks: str = "") -> None:
        self.role, self.modules = role, modules
        self.entry, *_, self.exit = modules
        super().__init__((self.entry, self.exit, *has.split()), lacks)


class Architecture:
    """One row of the table. Entries of other rows need not be repeated.

    Args:
        places: sub-layers; and places with norms whose roles the general rules (`role_rules.py`) do not cover or would
            misread.
        modules: contents of further modules, by the end of their path; the longest known end applies.
        lora: names of the modules that LoRA tunes by default, separated by spaces, for models without a default in
            PEFT.

    Example:
        >>> row = Architecture(
        ...     NormPlace("mix mlp", {"mix_ln": "attention"}), attention("mix", "wq wk wv wo"), ffn("mlp", "up down")
        ... )
        >>> row.sublayers[0].entry, row.sublayers[0].modules["mix.wk"].label
        ('mix.wq', 'key')
    """

    def __init__(self, *places: NormPlace | Span, modules: Mapping[str, Contents] = {}, lora: str = "") -> None:
        self.norms = [place for place in places if isinstance(place, NormPlace)]
        self.sublayers = [place for place in places if isinstance(place, Span)]
        self.modules, self.lora = modules, tuple(lora.split())


def _holds(*components: Component, cross: bool = False, by_head: bool = False) -> Contents:
    first, *others = (component.label for component in components)
    label = ", ".join([first, *(other.removeprefix("FFN ") for other in others)])
    if cross:
        label = f"cross-attention {label.removeprefix('attention ')}"
    return Contents(components, f"{label} by head" if by_head else label, by_head)


_QKV = (Component.QUERY, Component.KEY, Component.VALUE)
_SPLITS = {4: tuple((part,) for part in _QKV), 3: (_QKV[:1], _QKV[1:]), 2: (_QKV,)}
BY_HEAD = _holds(*_QKV, by_head=True)


def attention(module: str, names: str, *, cross: bool = False, by_head: bool = False) -> Span:
    """Make an attention sub-layer.

    Args:
        module: path of the attention module below its block.
        names: paths below that module, separated by spaces. Four: the projections to queries, keys and values, and the
            output projection; three: keys and values are in one; two: all three are in one.
        cross: whether the keys come from an encoder.
        by_head: whether a matrix for all three holds them head by head, or in an unknown order.

    Returns:
        The sub-layer.

    Example:
        >>> [contents.label for contents in attention("attn", "c_attn c_proj").modules.values()]
        ['query, key, value', 'attention output']
    """
    paths = names.split()
    parts = (*_SPLITS[len(paths)], (Component.ATTENTION_OUTPUT,))
    held = [_holds(*its, cross=cross, by_head=by_head and len(its) > 1) for its in parts]
    modules = {f"{module}.{path}": contents for path, contents in zip(paths, held, strict=True)}
    return Span(CROSS if cross else ATTENTION, modules)


UP, GATE, DOWN = _holds(Component.FFN_UP), _holds(Component.FFN_GATE), _holds(Component.FFN_DOWN)
GATE_UP = _holds(Component.FFN_GATE, Component.FFN_UP)


def ffn(module: str, names: str, *, gated: bool = False, has: str = "", lacks: str = "") -> Span:
    """Make a feed-forward sub-layer.

    Args:
        module: path of the FFN below its block; empty where its projections are children of the block.
        names: paths below that module, separated by spaces: the gate, if there is one, then up, then down.
        gated: whether the first of two paths holds the gate and the up projection, in this order.
        has: further paths that must exist below the block, separated by spaces.
        lacks: paths that must not exist below the block, separated by spaces.

    Returns:
        The sub-layer.

    Example:
        >>> [contents.label for contents in ffn("mlp", "gate_proj up_proj down_proj").modules.values()]
        ['FFN gate', 'FFN up', 'FFN down']
    """
    paths = names.split()
    held = (GATE_UP, DOWN) if gated else (GATE, UP, DOWN)[-len(paths) :]
    modules = {below(module, path): contents for path, contents in zip(paths, held, strict=True)}
    return Span(FFN, modules, has, lacks)


WORDS, POSITIONS, TYPES, PATCHES = (
    Contents((Component.EMBEDDING,), f"{kind} embeddings") for kind in ("word", "position", "type", "patch")
)
POOLER = _holds(Component.POOLER)
_CONVNEXT = (FFN, MIXER)  # a norm between convolution and FFN closes the first and feeds the second

# Experts are not a sub-layer: each works on some of the tokens, and no leaf's output is that of the whole FFN.
ARCHITECTURES: dict[str, Architecture] = {
    "Llama, Mistral, Qwen, Gemma, OLMo, Cohere": Architecture(
        attention("self_attn", "q_proj k_proj v_proj o_proj"),
        ffn("mlp", "gate_proj up_proj down_proj", lacks="experts router"),
        modules={"embed_tokens": WORDS},
        lora="q_proj v_proj",
    ),
    "Mixtral": Architecture(
        modules={"mlp.gate": Contents((), "router"), "mlp.experts.gate_up_proj": GATE_UP, "mlp.experts.down_proj": DOWN}
    ),
    "BERT, RoBERTa, ELECTRA": Architecture(
        NormPlace("transform decoder", {"transform.LayerNorm": FINAL}),
        attention("attention", "self.query self.key self.value output.dense"),
        attention("crossattention", "self.query self.key self.value output.dense", cross=True),
        ffn("", "intermediate.dense output.dense", has="attention"),
        modules={
            "word_embeddings": WORDS,
            "embeddings.position_embeddings": POSITIONS,
            "token_type_embeddings": TYPES,
            "pooler.dense": POOLER,
        },
        lora="query value",
    ),
    "DistilBERT": Architecture(
        NormPlace("vocab_transform vocab_layer_norm", {"vocab_layer_norm": FINAL}),
        attention("attention", "q_lin k_lin v_lin out_lin"),
        ffn("ffn", "lin1 lin2"),
        lora="q_lin v_lin",
    ),
    "T5, mT5": Architecture(
        attention("SelfAttention", "q k v o"),
        attention("EncDecAttention", "q k v o", cross=True),
        ffn("DenseReluDense", "wi wo"),
        ffn("DenseReluDense", "wi_0 wi_1 wo"),
        modules={"shared": WORDS, "relative_attention_bias": POSITIONS},
        lora="q v",
    ),
    "MPNet": Architecture(attention("attention.attn", "q k v o")),
    "GPT-NeoX": Architecture(
        attention("attention", "query_key_value dense", by_head=True),
        ffn("mlp", "dense_h_to_4h dense_4h_to_h"),
        modules={"embed_in": WORDS},
        lora="query_key_value",
    ),
    "BLOOM, Falcon": Architecture(
        NormPlace("word_embeddings h", {"word_embeddings_layernorm": EMBEDDING}),
        attention("self_attention", "query_key_value dense", by_head=True),
    ),
    "Phi-3": Architecture(
        attention("self_attn", "qkv_proj o_proj"), ffn("mlp", "gate_up_proj down_proj", gated=True), lora="qkv_proj"
    ),
    "Phi": Architecture(attention("self_attn", "q_proj k_proj v_proj dense")),
    "GPT-2": Architecture(
        attention("attn", "c_attn c_proj"),
        attention("crossattention", "q_attn c_attn c_proj", cross=True),
        ffn("mlp", "c_fc c_proj"),
        modules={"wte": WORDS, "wpe": POSITIONS},
        lora="c_attn",
    ),
    "GPT-Neo": Architecture(attention("attn.attention", "q_proj k_proj v_proj out_proj")),
    "GPT-J, CodeGen": Architecture(
        attention("attn", "q_proj k_proj v_proj out_proj"),
        ffn("mlp", "fc_in fc_out"),
        modules={"attn.qkv_proj": BY_HEAD},
    ),
    "ModernBERT": Architecture(
        attention("attn", "Wqkv Wo"), ffn("mlp", "Wi Wo", gated=True), modules={"tok_embeddings": WORDS}, lora="Wqkv"
    ),
    "MPT": Architecture(modules={"ffn.up_proj": UP, "ffn.down_proj": DOWN}),
    "DeBERTa": Architecture(
        NormPlace("conv LayerNorm", {"LayerNorm": MIXER}, lacks="layer activation"),
        NormPlace("rel_embeddings LayerNorm", {"LayerNorm": EMBEDDING}),
        attention("attention", "self.in_proj output.dense", by_head=True),
        attention("attention", "self.query_proj self.key_proj self.value_proj output.dense"),
    ),
    "ALBERT": Architecture(
        NormPlace("attention ffn full_layer_layer_norm", {"full_layer_layer_norm": FFN}),
        attention("attention", "query key value dense"),
        Span(FFN, {"ffn": UNKNOWN, "ffn_output": DOWN}, has="attention"),
        modules={"albert_layers.0.ffn": UP, "pooler": POOLER},
    ),
    "ProphetNet": Architecture(
        modules={
            "position_embeddings": POSITIONS,
            **attention("self_attn", "query_proj key_proj value_proj out_proj").modules,
            **attention("cross_attn", "query_proj key_proj value_proj out_proj", cross=True).modules,
            "feed_forward.intermediate": UP,
            "feed_forward.output": DOWN,
        }
    ),
    "BART, OPT, Whisper": Architecture(
        attention("self_attn", "q_proj k_proj v_proj out_proj"),
        attention("encoder_attn", "q_proj k_proj v_proj out_proj", cross=True),
        ffn("", "fc1 fc2", has="self_attn"),
        modules={"embed_positions": POSITIONS},
    ),
    # torch's own attention uses the weights of its leaves without calling them, so it is not a sub-layer here.
    "torch's own layers": Architecture(
        NormPlace("self_attn multihead_attn linear1 linear2", {"norm1": ATTENTION, "norm2": CROSS, "norm3": FFN}),
        Span(FFN, {"linear1": UNKNOWN, "linear2": UNKNOWN}, has="self_attn"),
    ),
    # Recurrence
    "RWKV": Architecture(
        NormPlace("pre_ln attention feed_forward", {"pre_ln": EMBEDDING}),
        modules={
            "embeddings": WORDS,
            "attention.output": _holds(Component.ATTENTION_OUTPUT),
            "feed_forward.key": UP,
            "feed_forward.receptance": GATE,
            "feed_forward.value": DOWN,
        },
    ),
    "xLSTM": Architecture(modules={"ffn.proj_up_gate": GATE, "ffn.proj_up": UP, "ffn.proj_down": DOWN}),
    "LFM2": Architecture(NormPlace("embed_tokens layers embedding_norm", {"embedding_norm": FINAL})),
    # Vision, sound, and both with language
    "ViT, CLIP, SigLIP, DINOv2": Architecture(
        attention("attention", "q_proj k_proj v_proj o_proj"),
        attention("attention", "attention.query attention.key attention.value output.dense"),
        ffn("mlp", "fc1 fc2"),
        modules={
            "embeddings.cls_token": Contents((), "class token"),
            "patch_embeddings.projection": PATCHES,
            "patch_embedding": PATCHES,
            "token_embedding": WORDS,
            "position_embedding": POSITIONS,
        },
    ),
    "BLIP": Architecture(
        modules={"self_attn.qkv": BY_HEAD, "self_attn.projection": _holds(Component.ATTENTION_OUTPUT)}
    ),
    "wav2vec 2.0": Architecture(
        modules={
            "attention.out_proj": _holds(Component.ATTENTION_OUTPUT),
            "feed_forward.intermediate_dense": UP,
            "feed_forward.output_dense": DOWN,
        }
    ),
    "SAM": Architecture(
        NormPlace(
            "self_attn cross_attn_token_to_image mlp cross_attn_image_to_token",
            {"layer_norm1": ATTENTION, "layer_norm2": CROSS, "layer_norm3": FFN, "layer_norm4": CROSS},
        )
    ),
    "LXMERT": Architecture(NormPlace("visual_attention", {"visual_attention.output.LayerNorm": CROSS})),
    "PoolFormer": Architecture(NormPlace("pooling output", {"before_norm": MIXER, "after_norm": FFN})),
    "ConvNeXt, and what fuses the memory of SAM 2": Architecture(
        NormPlace("dwconv pwconv1", {"layernorm": _CONVNEXT, "norm": _CONVNEXT}),
        NormPlace("depthwise_conv pointwise_conv1", {"layer_norm": _CONVNEXT}, lacks="glu"),
    ),
    "LayoutLMv3": Architecture(
        NormPlace("LayerNorm patch_embed norm encoder", {"LayerNorm": EMBEDDING, "norm": EMBEDDING})
    ),
    "Q-Former": Architecture(
        NormPlace("layernorm dropout encoder", {"layernorm": EMBEDDING}, lacks="embeddings pooler")
    ),
    "Moonshine": Architecture(NormPlace("conv1 groupnorm layers", {"groupnorm": EMBEDDING})),
    "timm": Architecture(NormPlace("patch_embed blocks", {"norm": FINAL, "fc_norm": FINAL})),
    "diffusers": Architecture(
        NormPlace("norm_cross to_q to_k", {"norm_cross": CROSS}),
        NormPlace("group_norm to_q to_k", {"group_norm": ATTENTION}),
        NormPlace("norm1 attn1 norm3 ff", {"norm1": ATTENTION, "norm1.norm": ATTENTION, "norm2": CROSS, "norm3": FFN}),
        NormPlace("norm1 conv1 norm2 conv2", {"norm1": MIXER, "norm2": MIXER}, lacks="ffn"),
        NormPlace("conv_norm_out conv_out", {"conv_norm_out": FINAL}),
    ),
}
"""The rows, by the architectures with this structure. Add a row for a missing architecture."""


def contents_by_path() -> dict[str, Contents]:
    """The contents of modules by the end of their path, from all rows.

    Returns:
        The contents by path.

    Example:
        >>> contents_by_path()["attn.c_attn"].components
        (<Component.QUERY: 'query'>, <Component.KEY: 'key'>, <Component.VALUE: 'value'>)
    """
    found: dict[str, Contents] = {}
    for row in ARCHITECTURES.values():
        for modules in (row.modules, *(span.modules for span in row.sublayers)):
            found |= {path: contents for path, contents in modules.items() if contents != UNKNOWN}
    return found


def lora_targets(modules: Iterable[str]) -> tuple[str, ...] | None:
    """The modules that LoRA tunes by default in a model without a default in PEFT: queries and values.

    Args:
        modules: names of all modules.

    Returns:
        The modules' own names, without the path above them; None where no row fits.

    Example:
        >>> lora_targets(["encoder.0.attn.q_lin", "encoder.0.attn.k_lin", "encoder.0.attn.v_lin"])
        ('q_lin', 'v_lin')
    """
    leaves = {name.rpartition(".")[2] for name in modules}
    return next((row.lora for row in ARCHITECTURES.values() if row.lora and leaves.issuperset(row.lora)), None)
