"""The roles of norms: which sub-layer each one serves, told from the structure around it.

A role is the sub-layer a norm feeds (pre-norm) or closes (post-norm). The same name means different things in
different blocks: `post_attention_layernorm` feeds the FFN in Llama and closes the attention in Gemma 2. What decides is
the names beside it, so the table below holds one row a structure, whatever models are built that way.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["ROLES", "STRUCTURES", "Structure", "find_roles"]

ATTENTION, CROSS, FFN, MIXER = ("attention",), ("cross_attention",), ("ffn",), ("mixer",)
QK, EMBEDDING, FINAL = ("qk",), ("embedding",), ("final",)
BOTH = ("attention", "ffn")  # one norm that feeds both sub-layers of a parallel block

ROLES = {
    "attention": "feeds or closes self-attention",
    "cross_attention": "feeds or closes attention over an encoder's output",
    "ffn": "feeds or closes the feed-forward layer, experts included",
    "mixer": "feeds, closes or lies in a token mixer that is not attention: a state space, a convolution",
    "qk": "normalizes the queries or keys inside attention",
    "embedding": "closes the embeddings, before the first block",
    "final": "stands after the last block: the body's last norm, or one in the head on top of it",
}


@dataclass(frozen=True)
class Structure:
    """A module that has certain children, and the roles of the norms below it.

    Attributes:
        name: what is built that way.
        roles: by the norm's path below the module, its roles.
        has: names of children that the module must have.
        lacks: names of children that it must not have.
    """

    name: str
    roles: Mapping[str, tuple[str, ...]]
    has: frozenset[str]
    lacks: frozenset[str] = field(default_factory=frozenset)

    def fits(self, children: frozenset[str]) -> bool:
        return self.has <= children and not self.lacks & children


def _row(name: str, has: str, roles: Mapping[str, tuple[str, ...]], lacks: str = "") -> Structure:
    return Structure(name, roles, frozenset(has.split()), frozenset(lacks.split()))


# The first row that fits the nearest module above a norm and knows the norm's path wins.
STRUCTURES = (
    # Inside attention
    _row("q and k norms (Qwen3, Gemma 3, OLMo 2, Cohere)", "q_norm k_norm", {"q_norm": QK, "k_norm": QK}),
    _row("q and k norms (Phi, StableLM)", "q_layernorm k_layernorm", {"q_layernorm": QK, "k_layernorm": QK}),
    _row(
        "q and k norms (diffusers)",
        "to_q to_k norm_q norm_k",
        {"norm_q": QK, "norm_k": QK, "norm_added_q": QK, "norm_added_k": QK},
    ),
    _row("attention over an image (diffusers)", "group_norm to_q to_k", {"group_norm": ATTENTION}),
    _row("cross-attention of U-Nets (diffusers)", "norm_cross to_q to_k", {"norm_cross": CROSS}),
    # Blocks, norm first
    _row(
        "norms on both sides of each sub-layer (Gemma 2 and 3), or behind each (OLMo 2)",
        "self_attn mlp post_attention_layernorm post_feedforward_layernorm",
        {
            "input_layernorm": ATTENTION,
            "post_attention_layernorm": ATTENTION,
            "pre_feedforward_layernorm": FFN,
            "post_feedforward_layernorm": FFN,
        },
    ),
    _row(
        "norm before each sub-layer (Llama, Mistral, Mixtral, Qwen, Phi-3, Gemma 1, GPT-NeoX, BLOOM)",
        "input_layernorm post_attention_layernorm mlp",
        {"input_layernorm": ATTENTION, "post_attention_layernorm": FFN},
    ),
    _row(
        "one norm for two parallel sub-layers (Cohere, Phi)",
        "input_layernorm self_attn mlp",
        {"input_layernorm": BOTH},
        lacks="post_attention_layernorm",
    ),
    _row(
        "one norm for two parallel sub-layers (Falcon)",
        "input_layernorm self_attention mlp",
        {"input_layernorm": BOTH},
        lacks="post_attention_layernorm ln_attn",
    ),
    _row("attention among state spaces (Jamba)", "self_attn pre_ff_layernorm", {"input_layernorm": ATTENTION}),
    _row("state space with an FFN (Jamba)", "mamba pre_ff_layernorm", {"input_layernorm": MIXER}),
    _row("FFN of either (Jamba)", "feed_forward pre_ff_layernorm", {"pre_ff_layernorm": FFN}),
    _row("GPT-2", "ln_1 attn ln_2 mlp", {"ln_1": ATTENTION, "ln_cross_attn": CROSS, "ln_2": FFN}),
    _row("one norm for two parallel sub-layers (GPT-J)", "ln_1 attn mlp", {"ln_1": BOTH}, lacks="ln_2"),
    _row("ViT", "layernorm_before layernorm_after", {"layernorm_before": ATTENTION, "layernorm_after": FFN}),
    _row("CLIP, SigLIP", "self_attn layer_norm1 layer_norm2", {"layer_norm1": ATTENTION, "layer_norm2": FFN}),
    _row("timm's vision transformers", "norm1 attn norm2 mlp", {"norm1": ATTENTION, "norm2": FFN}),
    _row(
        "transformer block of U-Nets and DiT (diffusers)",
        "norm1 attn1 norm3 ff",
        {"norm1": ATTENTION, "norm1.norm": ATTENTION, "norm2": CROSS, "norm3": FFN},
    ),
    _row("residual block of U-Nets (diffusers)", "norm1 conv1 norm2 conv2", {"norm1": MIXER, "norm2": MIXER}),
    _row("ModernBERT", "attn mlp mlp_norm", {"attn_norm": ATTENTION, "mlp_norm": FFN}),
    _row("state space (Mamba, Mamba 2)", "norm mixer", {"norm": MIXER, "mixer.norm": MIXER}),
    _row("T5's self-attention", "SelfAttention layer_norm", {"layer_norm": ATTENTION}),
    _row("T5's cross-attention", "EncDecAttention layer_norm", {"layer_norm": CROSS}),
    _row("T5's FFN", "DenseReluDense layer_norm", {"layer_norm": FFN}),
    # Blocks, norm last
    _row(
        "BERT, RoBERTa, Electra, DeBERTa",
        "attention intermediate output",
        {
            "attention.output.LayerNorm": ATTENTION,
            "attention.LayerNorm": ATTENTION,  # MPNet
            "crossattention.output.LayerNorm": CROSS,
            "output.LayerNorm": FFN,
        },
    ),
    _row(
        "ALBERT",
        "attention ffn full_layer_layer_norm",
        {"attention.LayerNorm": ATTENTION, "full_layer_layer_norm": FFN},
    ),
    _row("DistilBERT", "sa_layer_norm output_layer_norm", {"sa_layer_norm": ATTENTION, "output_layer_norm": FFN}),
    _row("DeBERTa's convolution", "conv LayerNorm", {"LayerNorm": MIXER}, lacks="layer"),
    # Blocks, norm first or last by configuration
    _row(
        "BART, mBART, OPT, Whisper",
        "self_attn self_attn_layer_norm fc1 fc2",
        {"self_attn_layer_norm": ATTENTION, "encoder_attn_layer_norm": CROSS, "final_layer_norm": FFN},
    ),
    _row(
        "torch's decoder layer",
        "self_attn multihead_attn linear1 linear2",
        {"norm1": ATTENTION, "norm2": CROSS, "norm3": FFN},
    ),
    _row("torch's encoder layer", "self_attn linear1 linear2", {"norm1": ATTENTION, "norm2": FFN}),
    _row("DINOv2", "attention norm1 norm2 mlp", {"norm1": ATTENTION, "norm2": FFN}),
    # Before the first block
    _row("BERT's embeddings", "word_embeddings LayerNorm", {"LayerNorm": EMBEDDING}),
    _row("DeBERTa's relative positions", "rel_embeddings LayerNorm", {"LayerNorm": EMBEDDING}),
    _row("ModernBERT's embeddings", "tok_embeddings norm", {"norm": EMBEDDING}),
    _row("BART's embeddings", "embed_positions layernorm_embedding", {"layernorm_embedding": EMBEDDING}),
    _row("BLOOM's embeddings", "word_embeddings h", {"word_embeddings_layernorm": EMBEDDING}),
    _row("CLIP's images", "embeddings pre_layrnorm", {"pre_layrnorm": EMBEDDING}),
    # After the last block
    _row(
        "stack of layers",
        "layers",
        {
            "norm": FINAL,
            "layer_norm": FINAL,
            "layernorm": FINAL,
            "final_norm": FINAL,
            "final_layer_norm": FINAL,
            "final_layernorm": FINAL,
            "norm_f": FINAL,
        },
    ),
    _row("stack of T5 blocks", "block final_layer_norm", {"final_layer_norm": FINAL}),
    _row("stack of GPT-2 blocks", "h ln_f", {"ln_f": FINAL}),
    _row("stack of timm's blocks", "patch_embed blocks", {"norm": FINAL, "fc_norm": FINAL}),
    _row("output of U-Nets (diffusers)", "conv_norm_out conv_out", {"conv_norm_out": FINAL}),
    _row(
        "encoder in a tower (CLIP, SigLIP, DINOv2)",
        "embeddings encoder",
        {"final_layer_norm": FINAL, "post_layernorm": FINAL, "layernorm": FINAL},
    ),
    _row("BERT's head", "transform decoder", {"transform.LayerNorm": FINAL}),
    _row("RoBERTa's head", "dense layer_norm decoder", {"layer_norm": FINAL}),
    _row("DistilBERT's head", "vocab_transform vocab_layer_norm", {"vocab_layer_norm": FINAL}),
    _row("Electra's head", "activation LayerNorm dense", {"LayerNorm": FINAL}),
    _row("ModernBERT's head", "dense act norm", {"norm": FINAL}),
)


def find_roles(modules: Iterable[str], norms: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Tell the roles of norms from the names around them.

    Args:
        modules: the names of all modules of the model.
        norms: the names of its norms, among `modules`.

    Returns:
        For each norm its roles, in the order of `ROLES`; empty where no row of `STRUCTURES` knows its place.

    Example:
        >>> names = ["", "h", "h.0", "h.0.ln_1", "h.0.attn", "h.0.mlp", "ln_f"]
        >>> find_roles(names, ["h.0.ln_1", "ln_f"])
        {'h.0.ln_1': ('attention', 'ffn'), 'ln_f': ('final',)}
    """
    children: dict[str, set[str]] = {}
    for name in modules:
        parent, _, child = name.rpartition(".")
        children.setdefault(parent, set()).add(child)
    frozen = {name: frozenset(names) for name, names in children.items()}
    return {norm: _roles_of(norm, frozen) for norm in norms}


def _roles_of(norm: str, children: Mapping[str, frozenset[str]]) -> tuple[str, ...]:
    """Go up from the norm's parent, and take what the first fitting row says of the path that lies below."""
    above, _, path = norm.rpartition(".")
    while path:
        for row in STRUCTURES:
            if path in row.roles and row.fits(children.get(above, frozenset())):
                return row.roles[path]
        if not above:
            return ()
        above, _, name = above.rpartition(".")
        path = f"{name}.{path}"
    return ()
