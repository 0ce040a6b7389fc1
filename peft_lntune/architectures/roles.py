"""The roles of norms: which sub-layer each one serves, told from the structure around it.

A role is the sub-layer a norm feeds (pre-norm) or closes (post-norm). The same name means different things in
different blocks: `post_attention_layernorm` feeds the FFN in Llama and closes the attention in Gemma 2. What decides is
the names beside it. `role_rules` reads them as a person would, whatever the model; the table below holds the structures
that these rules do not read or would read wrongly.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from peft_lntune.architectures.role_rules import Tree, role_in

__all__ = ["ROLES", "STRUCTURES", "Structure", "find_roles"]

ATTENTION, CROSS, FFN, MIXER = ("attention",), ("cross_attention",), ("ffn",), ("mixer",)
EMBEDDING, FINAL = ("embedding",), ("final",)
CONVNEXT = ("ffn", "mixer")

ROLES = {
    "attention": "feeds or closes self-attention",
    "cross_attention": "feeds or closes attention over an encoder's output",
    "ffn": "feeds or closes the feed-forward layer, experts included",
    "mixer": "feeds, closes or lies in a token mixer that is not attention: a state space, a convolution",
    "qk": "normalizes the queries or keys inside attention, or the latents that both are made of",
    "embedding": "lies in or closes the embeddings, before the first block",
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


# Structures that the rules do not read, or would read wrongly. The first row that fits the nearest module above a norm
# and knows the norm's path wins.
STRUCTURES = (
    # Inside a block
    _row("cross-attention of U-Nets (diffusers)", "norm_cross to_q to_k", {"norm_cross": CROSS}),
    _row("attention over an image (diffusers)", "group_norm to_q to_k", {"group_norm": ATTENTION}),
    _row(
        "transformer block of U-Nets and DiT (diffusers)",
        "norm1 attn1 norm3 ff",
        {"norm1": ATTENTION, "norm1.norm": ATTENTION, "norm2": CROSS, "norm3": FFN},
    ),
    _row(
        "residual block of U-Nets (diffusers)",
        "norm1 conv1 norm2 conv2",
        {"norm1": MIXER, "norm2": MIXER},
        lacks="ffn",
    ),
    _row("ALBERT", "attention ffn full_layer_layer_norm", {"full_layer_layer_norm": FFN}),
    _row(
        "torch's decoder layer",
        "self_attn multihead_attn linear1 linear2",
        {"norm1": ATTENTION, "norm2": CROSS, "norm3": FFN},
    ),
    _row(
        "attention in two ways (SAM)",
        "self_attn cross_attn_token_to_image mlp cross_attn_image_to_token",
        {"layer_norm1": ATTENTION, "layer_norm2": CROSS, "layer_norm3": FFN, "layer_norm4": CROSS},
    ),
    _row("attention to the other modality (LXMERT)", "visual_attention", {"visual_attention.output.LayerNorm": CROSS}),
    _row("pooling in place of attention (PoolFormer)", "pooling output", {"before_norm": MIXER, "after_norm": FFN}),
    # One norm between the convolution and the FFN closes the one and feeds the other.
    _row("ConvNeXt", "dwconv pwconv1", {"layernorm": CONVNEXT, "norm": CONVNEXT}),
    _row(
        "DINOv3's ConvNeXt, and what fuses the memory of SAM 2",
        "depthwise_conv pointwise_conv1",
        {"layer_norm": CONVNEXT},
        lacks="glu",
    ),
    _row("DeBERTa's convolution", "conv LayerNorm", {"LayerNorm": MIXER}, lacks="layer activation"),
    # Before the first block
    _row("first block of RWKV", "pre_ln attention feed_forward", {"pre_ln": EMBEDDING}),
    _row(
        "text and image embeddings (LayoutLMv3)",
        "LayerNorm patch_embed norm encoder",
        {"LayerNorm": EMBEDDING, "norm": EMBEDDING},
    ),
    _row(
        "learned queries of Q-Former", "layernorm dropout encoder", {"layernorm": EMBEDDING}, lacks="embeddings pooler"
    ),
    _row("convolutions over sound (Moonshine)", "conv1 groupnorm layers", {"groupnorm": EMBEDDING}),
    _row("BLOOM's embeddings", "word_embeddings h", {"word_embeddings_layernorm": EMBEDDING}),
    _row("DeBERTa's relative positions", "rel_embeddings LayerNorm", {"LayerNorm": EMBEDDING}),
    # After the last block
    _row("stack of LFM2's layers", "embed_tokens layers embedding_norm", {"embedding_norm": FINAL}),
    _row("stack of timm's blocks", "patch_embed blocks", {"norm": FINAL, "fc_norm": FINAL}),
    _row("output of U-Nets (diffusers)", "conv_norm_out conv_out", {"conv_norm_out": FINAL}),
    _row("BERT's head", "transform decoder", {"transform.LayerNorm": FINAL}),
    _row("RoBERTa's head", "dense layer_norm decoder", {"layer_norm": FINAL}),
    _row("DistilBERT's head", "vocab_transform vocab_layer_norm", {"vocab_layer_norm": FINAL}),
)


def find_roles(modules: Iterable[str] | Mapping[str, object], norms: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Tell the roles of norms from the names around them.

    Args:
        modules: the names of all modules of the model; or the modules by name, whose classes tell the few places where
            names alone leave it open.
        norms: the names of its norms, among `modules`.

    Returns:
        For each norm its roles, in the order of `ROLES`; empty where its place is not known.

    Example:
        >>> names = ["", "h", "h.0", "h.0.ln_1", "h.0.attn", "h.0.mlp", "ln_f"]
        >>> find_roles(names, ["h.0.ln_1", "ln_f"])
        {'h.0.ln_1': ('attention', 'ffn'), 'ln_f': ('final',)}
    """
    classes = {n: type(module).__name__ for n, module in modules.items()} if isinstance(modules, Mapping) else None
    tree = Tree.of(modules, classes)
    return {norm: _roles_of(norm, tree) for norm in norms}


def _roles_of(norm: str, tree: Tree) -> tuple[str, ...]:
    """What the nearest row above the norm says that fits, else what the nearest rule says."""
    above = _above(norm)
    for place, path in above:
        children = frozenset(tree.children.get(place, ()))
        for row in STRUCTURES:
            if path in row.roles and row.fits(children):
                return row.roles[path]
    for place, path in above:
        found = role_in(tree, place, path)
        if found is not None:
            return found
    return ()


def _above(norm: str) -> list[tuple[str, str]]:
    """The modules above a norm, nearest first, each with the norm's path below it."""
    parts = norm.split(".")
    return [(".".join(parts[:i]), ".".join(parts[i:])) for i in range(len(parts) - 1, -1, -1) if norm]
