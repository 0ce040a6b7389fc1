"""The sub-layers of a model's blocks: through which leaf each one reads its input, and through which it answers.

A bottleneck adapter works on a sub-layer, but a block has no module for a residual sum, and some have none for the FFN.
What every block has are two leaves: one whose input is x, the sub-layer's input (behind the norm, where the norm comes
first), and one whose output is h, what the block adds to the residual. The table below names the two, one row a
structure, whatever models are built that way.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["STRUCTURES", "SUBLAYER_ROLES", "Structure", "Sublayer", "find_sublayers"]

ATTENTION, CROSS, FFN = SUBLAYER_ROLES = ("attention", "cross_attention", "ffn")


@dataclass(frozen=True)
class Sublayer:
    """One sub-layer of a block: `h = sublayer(x)`.

    Attributes:
        role: `"attention"` (over the block's own tokens), `"cross_attention"` (over an encoder's output) or `"ffn"`.
        block: name of the module that it was found in.
        entry: name of the leaf whose input is x.
        exit: name of the leaf whose output is h, before dropout.
    """

    role: str
    block: str
    entry: str
    exit: str


@dataclass(frozen=True)
class Structure:
    """A module below which there is a sub-layer.

    Attributes:
        name: what is built that way.
        role: of the sub-layer.
        entry: path of its first leaf below the module.
        exit: path of its last leaf.
        has: further paths that there must be below the module.
        lacks: paths that there must not be.
    """

    name: str
    role: str
    entry: str
    exit: str
    has: frozenset[str] = field(default_factory=frozenset)
    lacks: frozenset[str] = field(default_factory=frozenset)

    def fits(self, block: str, modules: frozenset[str]) -> bool:
        paths = {self.entry, self.exit} | self.has
        return all(_below(block, path) in modules for path in paths) and not any(
            _below(block, path) in modules for path in self.lacks
        )


def _row(name: str, role: str, entry: str, exit: str, has: str = "", lacks: str = "") -> Structure:
    return Structure(name, role, entry, exit, frozenset(has.split()), frozenset(lacks.split()))


# Experts have no row: each works on some of the tokens, and no leaf's output is that of the whole FFN.
STRUCTURES = (
    # Self-attention
    _row("BERT, RoBERTa, Electra", ATTENTION, "attention.self.query", "attention.output.dense"),
    _row("DeBERTa", ATTENTION, "attention.self.in_proj", "attention.output.dense"),
    _row("DeBERTa v2 and v3", ATTENTION, "attention.self.query_proj", "attention.output.dense"),
    _row("DINOv2", ATTENTION, "attention.attention.query", "attention.output.dense"),
    _row("MPNet", ATTENTION, "attention.attn.q", "attention.attn.o"),
    _row("ALBERT", ATTENTION, "attention.query", "attention.dense"),
    _row("DistilBERT", ATTENTION, "attention.q_lin", "attention.out_lin"),
    _row("ModernBERT", ATTENTION, "attn.Wqkv", "attn.Wo"),
    _row("GPT-2", ATTENTION, "attn.c_attn", "attn.c_proj"),
    _row("GPT-J", ATTENTION, "attn.q_proj", "attn.out_proj"),
    _row("GPT-Neo", ATTENTION, "attn.attention.q_proj", "attn.attention.out_proj"),
    _row("GPT-NeoX", ATTENTION, "attention.query_key_value", "attention.dense"),
    _row("BLOOM, Falcon", ATTENTION, "self_attention.query_key_value", "self_attention.dense"),
    _row("Llama, Mistral, Mixtral, Qwen, Gemma, OLMo, Cohere", ATTENTION, "self_attn.q_proj", "self_attn.o_proj"),
    _row("Phi-3", ATTENTION, "self_attn.qkv_proj", "self_attn.o_proj"),
    _row("Phi", ATTENTION, "self_attn.q_proj", "self_attn.dense"),
    _row("BART, mBART, OPT, Whisper, CLIP, SigLIP", ATTENTION, "self_attn.q_proj", "self_attn.out_proj"),
    _row("ViT", ATTENTION, "attention.q_proj", "attention.o_proj"),
    _row("T5", ATTENTION, "SelfAttention.q", "SelfAttention.o"),
    # Cross-attention
    _row("BERT, RoBERTa, Electra as decoders", CROSS, "crossattention.self.query", "crossattention.output.dense"),
    _row("GPT-2", CROSS, "crossattention.q_attn", "crossattention.c_proj"),
    _row("BART, mBART, Whisper", CROSS, "encoder_attn.q_proj", "encoder_attn.out_proj"),
    _row("T5", CROSS, "EncDecAttention.q", "EncDecAttention.o"),
    # FFN
    _row("BERT, RoBERTa, Electra, DeBERTa, MPNet", FFN, "intermediate.dense", "output.dense", has="attention"),
    _row("ALBERT", FFN, "ffn", "ffn_output", has="attention"),
    _row("DistilBERT", FFN, "ffn.lin1", "ffn.lin2"),
    _row("ModernBERT", FFN, "mlp.Wi", "mlp.Wo"),
    _row("GPT-2, GPT-Neo", FFN, "mlp.c_fc", "mlp.c_proj"),
    _row("GPT-J", FFN, "mlp.fc_in", "mlp.fc_out"),
    _row("GPT-NeoX, BLOOM, Falcon", FFN, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    _row("Llama, Mistral, Qwen, Gemma, OLMo, Cohere", FFN, "mlp.gate_proj", "mlp.down_proj", lacks="experts router"),
    _row("Phi-3", FFN, "mlp.gate_up_proj", "mlp.down_proj"),
    _row("ViT, DINOv2, CLIP, SigLIP, Phi", FFN, "mlp.fc1", "mlp.fc2"),
    _row("BART, mBART, OPT, Whisper", FFN, "fc1", "fc2", has="self_attn"),
    # torch's own attention computes with the weights of its leaves and calls none of them, so it has no row.
    _row("torch's own layers", FFN, "linear1", "linear2", has="self_attn"),
    _row("T5", FFN, "DenseReluDense.wi", "DenseReluDense.wo"),
    _row("T5 1.1, mT5", FFN, "DenseReluDense.wi_0", "DenseReluDense.wo"),
)


def find_sublayers(modules: Iterable[str]) -> list[Sublayer]:
    """Find the sub-layers of a model from the names of its modules.

    Args:
        modules: the names of all modules, as `peft_lntune.core.module_tree.base_modules` gives them: an adapted
        model's are
            those it had before.

    Returns:
        The sub-layers, block by block in the order of `modules`, in a block by `SUBLAYER_ROLES`. Empty where no row of
        `STRUCTURES` knows the model.

    Example:
        >>> names = ["", "h", "h.0", "h.0.mlp", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
        >>> find_sublayers(names)
        [Sublayer(role='ffn', block='h.0', entry='h.0.mlp.c_fc', exit='h.0.mlp.c_proj')]
    """
    names = list(modules)
    known = frozenset(names)
    found: list[Sublayer] = []
    for block in names:
        for role in SUBLAYER_ROLES:
            row = next((row for row in STRUCTURES if row.role == role and row.fits(block, known)), None)
            if row is not None:
                found.append(Sublayer(role, block, _below(block, row.entry), _below(block, row.exit)))
    return found


def _below(block: str, path: str) -> str:
    return f"{block}.{path}" if block else path
