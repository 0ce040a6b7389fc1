"""Which component of the model a parameter belongs to, and of which layer, told from the names.

Norms have the names of their roles, which `peft_lntune.architectures.roles` tells from the structure around them. For
the other modules the table below holds one block a structure, whatever models are built that way.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import NamedTuple

from peft_lntune.architectures.role_names import is_called_norm
from peft_lntune.architectures.roles import find_roles

__all__ = ["BY_HEAD", "Place", "find_components", "find_kinds", "group_by_place"]


class Place(NamedTuple):
    """Where a parameter belongs.

    Attributes:
        component: such as "query" or "FFN norm"; the module's path without the layer's number where it is not known.
        layer: number of the layer; None outside the layers.
        parameter: "weight" or "bias".
    """

    component: str
    layer: int | None
    parameter: str


_NORMS = {
    "attention": "attention",
    "cross_attention": "cross-attention",
    "ffn": "FFN",
    "mixer": "mixer",
    "qk": "query and key",
    "embedding": "embedding",
    "final": "final",
}


def _attention(module: str, names: str, said: str = "") -> dict[str, str]:
    """Rows of an attention module: the names of its four projections, in this order."""
    parts = (f"{said}query", f"{said}key", f"{said}value", f"{said or 'attention '}output")
    return {f"{module}.{name}": part for name, part in zip(names.split(), parts, strict=True)}


BY_HEAD = "query, key, value by head"
"""Queries, keys and values in one matrix, head by head, or in an order that is not known here."""

# By the end of a module's path, its component; the longest end that is known wins.
STRUCTURES: dict[str, dict[str, str]] = {
    "BERT, RoBERTa, Electra, and ViT in older versions": {
        "word_embeddings": "word embeddings",
        "embeddings.position_embeddings": "position embeddings",
        "token_type_embeddings": "type embeddings",
        **_attention("attention", "self.query self.key self.value output.dense"),
        **_attention("attention", "attention.query attention.key attention.value output.dense"),
        **_attention("crossattention", "self.query self.key self.value output.dense", "cross-attention "),
        "intermediate.dense": "FFN up",
        "output.dense": "FFN down",
        "pooler.dense": "pooler",
    },
    "DeBERTa": {
        "attention.self.in_proj": BY_HEAD,
        **_attention("attention", "self.query_proj self.key_proj self.value_proj output.dense"),
    },
    "ALBERT": {
        **_attention("attention", "query key value dense"),
        "albert_layers.0.ffn": "FFN up",
        "ffn_output": "FFN down",
    },
    "BigBird, ALBERT": {"pooler": "pooler"},
    "MPNet": _attention("attention", "attn.q attn.k attn.v attn.o"),
    "ModernBERT, MPT": {
        "tok_embeddings": "word embeddings",
        "attn.Wqkv": "query, key, value",
        "attn.Wo": "attention output",
        "mlp.Wi": "FFN gate, up",
        "mlp.Wo": "FFN down",
        "ffn.up_proj": "FFN up",
        "ffn.down_proj": "FFN down",
    },
    "DistilBERT": {
        **_attention("attention", "q_lin k_lin v_lin out_lin"),
        "ffn.lin1": "FFN up",
        "ffn.lin2": "FFN down",
    },
    "GPT-2": {
        "wte": "word embeddings",
        "wpe": "position embeddings",
        "attn.c_attn": "query, key, value",
        "attn.c_proj": "attention output",
        "crossattention.q_attn": "cross-attention query",
        "crossattention.c_attn": "cross-attention key, value",
        "crossattention.c_proj": "cross-attention output",
        "mlp.c_fc": "FFN up",
        "mlp.c_proj": "FFN down",
    },
    "GPT-J, CodeGen": {
        **_attention("attn", "q_proj k_proj v_proj out_proj"),
        "attn.qkv_proj": BY_HEAD,
        "mlp.fc_in": "FFN up",
        "mlp.fc_out": "FFN down",
    },
    "GPT-NeoX, BLOOM, Falcon": {
        "embed_in": "word embeddings",
        "attention.query_key_value": BY_HEAD,
        "self_attention.query_key_value": BY_HEAD,
        "self_attention.dense": "attention output",
        "mlp.dense_h_to_4h": "FFN up",
        "mlp.dense_4h_to_h": "FFN down",
    },
    "Llama, Mistral, Qwen, Gemma, OLMo": {
        "embed_tokens": "word embeddings",
        **_attention("self_attn", "q_proj k_proj v_proj o_proj"),
        "mlp.gate_proj": "FFN gate",
        "mlp.up_proj": "FFN up",
        "mlp.down_proj": "FFN down",
    },
    "Phi": {"self_attn.dense": "attention output"},
    "RWKV": {
        "embeddings": "word embeddings",
        "attention.output": "attention output",
        "feed_forward.key": "FFN up",
        "feed_forward.receptance": "FFN gate",
        "feed_forward.value": "FFN down",
    },
    "xLSTM": {"ffn.proj_up_gate": "FFN gate", "ffn.proj_up": "FFN up", "ffn.proj_down": "FFN down"},
    "Phi-3": {"self_attn.qkv_proj": "query, key, value", "mlp.gate_up_proj": "FFN gate, up"},
    "Mixtral": {
        "mlp.gate": "router",
        "mlp.experts.gate_up_proj": "FFN gate, up",
        "mlp.experts.down_proj": "FFN down",
    },
    "T5": {
        "shared": "word embeddings",
        "relative_attention_bias": "position embeddings",
        **_attention("SelfAttention", "q k v o"),
        **_attention("EncDecAttention", "q k v o", "cross-attention "),
        "DenseReluDense.wi": "FFN up",
        "DenseReluDense.wi_0": "FFN gate",
        "DenseReluDense.wi_1": "FFN up",
        "DenseReluDense.wo": "FFN down",
    },
    "BART, OPT, Whisper, CLIP": {
        "embed_positions": "position embeddings",
        **_attention("self_attn", "q_proj k_proj v_proj out_proj"),
        **_attention("encoder_attn", "q_proj k_proj v_proj out_proj", "cross-attention "),
        "fc1": "FFN up",
        "fc2": "FFN down",
        "token_embedding": "word embeddings",
        "position_embedding": "position embeddings",
        "patch_embedding": "patch embeddings",
        "self_attn.qkv": BY_HEAD,
        "self_attn.projection": "attention output",
    },
    "Wav2Vec2, GPT-Neo": {
        "attention.out_proj": "attention output",
        "feed_forward.intermediate_dense": "FFN up",
        "feed_forward.output_dense": "FFN down",
    },
    "ProphetNet": {
        "position_embeddings": "position embeddings",
        **_attention("self_attn", "query_proj key_proj value_proj out_proj"),
        **_attention("cross_attn", "query_proj key_proj value_proj out_proj", "cross-attention "),
        "feed_forward.intermediate": "FFN up",
        "feed_forward.output": "FFN down",
    },
    "ViT": {
        "embeddings.cls_token": "class token",
        "patch_embeddings.projection": "patch embeddings",
        **_attention("attention", "q_proj k_proj v_proj o_proj"),
        "mlp.fc1": "FFN up",
        "mlp.fc2": "FFN down",
    },
}
_ENDS = {end: component for rows in STRUCTURES.values() for end, component in rows.items()}
# Short ends, which mean something else inside an attention module.
_IN_ATTENTION = {"output.dense": "attention output", "fc1": None, "fc2": None}
_ATTENTION = re.compile(r"(^|_)att(n|ention)?$")

# By component, the names that the configs have for what is in it, in the order of the matrix's outputs.
_QKV, _FFN = ("query", "key", "value"), ("up", "gate", "down")
_KINDS: dict[str, tuple[str, ...]] = {
    **{f"{said}{part}": (part,) for said in ("", "cross-attention ") for part in _QKV},
    **dict.fromkeys(("attention output", "cross-attention output"), ("attention_output",)),
    **dict.fromkeys(("query, key, value", BY_HEAD), _QKV),
    "cross-attention key, value": ("key", "value"),
    **{f"FFN {part}": (f"ffn_{part}",) for part in _FFN},
    "FFN gate, up": ("ffn_gate", "ffn_up"),
    **{f"{what} embeddings": ("embedding",) for what in ("word", "position", "type", "patch")},
    "pooler": ("pooler",),
}

# What stands on top of a body, by the first part of the path: all of it is "head", its norms too.
HEADS = frozenset(
    (
        "classifier",
        "classification_head",
        "cls",
        "lm_head",
        "pre_classifier",
        "qa_outputs",
        "score",
        "vocab_layer_norm",
        "vocab_projector",
        "vocab_transform",
    )
)


def find_components(names: Iterable[str], roles: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Place]:
    """Tell the component, the layer and the kind of each parameter.

    The layer is the first number in the name. Where a model has several stacks of layers (an encoder and a decoder, a
    text and an image tower), the stack's name goes before the component's: "encoder query", "decoder query".

    Args:
        names: names of the model's parameters, better all of them: a norm's role is told from what is around it.
        roles: by module, the roles of norms where they are known already, as in `find_norms(model)[name].roles`.

    Returns:
        The place of each parameter, in the order of `names`.

    Example:
        >>> names = ["h.0.ln_1.weight", "h.0.attn.c_attn.bias", "h.0.ln_2.weight", "h.0.mlp.c_fc.weight"]
        >>> for place in find_components(names).values():
        ...     print(*place)
        attention norm 0 weight
        query, key, value 0 bias
        FFN norm 0 weight
        FFN up 0 weight
    """
    owners = {name: _owner(name) for name in names}
    components = _components(owners, roles)
    stacks = _stacks(owner for owner, component in components.items() if component not in (None, "head"))
    places = {}
    for name, owner in owners.items():
        above, layer, below = _split(owner)
        component = components[owner]
        if component is None:
            component = ".".join((*above, *below)) or "model"
        elif component == "head":
            layer = None  # a number in a head counts its own modules
        else:
            component = f"{_stack_of(owner, stacks)}{component}"
        places[name] = Place(component, layer, "bias" if name.endswith("bias") else "weight")
    return places


def find_kinds(
    names: Iterable[str], roles: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Tell the component of each parameter as configs name it, whatever stack of layers it is in.

    Args:
        names: as in `find_components`.
        roles: as in `find_components`.

    Returns:
        For each parameter its component as the table has it, and the names of what is in it: several where one matrix
        holds several, none where the module is not known, is a norm, or is part of a head.

    Example:
        >>> find_kinds(["h.0.attn.c_attn.weight", "h.0.mixer.key.weight"])
        {'h.0.attn.c_attn.weight': ('query, key, value', ('query', 'key', 'value')), 'h.0.mixer.key.weight': ('', ())}
    """
    owners = {name: _owner(name) for name in names}
    components = _components(owners, roles)
    found = {name: components[owner] or "" for name, owner in owners.items()}
    return {name: (component, _KINDS.get(component, ())) for name, component in found.items()}


def group_by_place(places: Mapping[str, Place], *, layers: bool = True) -> dict[Place, list[str]]:
    """The parameters of each place, in order of first appearance; `layers=False` pools the layers (layer None)."""
    groups: dict[Place, list[str]] = {}
    for name, place in places.items():
        groups.setdefault(place if layers else place._replace(layer=None), []).append(name)
    return groups


def _owner(name: str) -> str:
    """The module of a parameter; a parameter that is no weight or bias (a class token) stands for itself."""
    owner, _, last = name.rpartition(".")
    return owner if last in ("weight", "bias") else name


def _with_parents(owners: Iterable[str]) -> set[str]:
    parts = [owner.split(".") for owner in owners]
    return {".".join(path[:length]) for path in parts for length in range(len(path) + 1)}


def _components(owners: Mapping[str, str], roles: Mapping[str, tuple[str, ...]] | None) -> dict[str, str | None]:
    norms = {owner for owner in owners.values() if is_called_norm(owner)}
    known = {**find_roles(_with_parents(owners.values()), norms), **(roles or {})}
    return {owner: _component(owner, known.get(owner, ())) for owner in owners.values()}


def _component(owner: str, roles: tuple[str, ...]) -> str | None:
    parts = owner.split(".")
    if parts[0] in HEADS:
        return "head"
    if roles:
        return " and ".join(_NORMS[role] for role in roles) + " norm"
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        if end in _IN_ATTENTION and start and _ATTENTION.search(parts[start - 1]):
            return _IN_ATTENTION[end]
        if end in _ENDS:
            return _ENDS[end]
    return None


def _split(owner: str) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """The parts of a path above its first number, that number, and the parts below; None where there is no number."""
    parts = tuple(owner.split("."))
    for place, part in enumerate(parts):
        if part.isdigit():
            return parts[:place], int(part), parts[place + 1 :]
    return parts, None, ()


def _stacks(owners: Iterable[str]) -> dict[tuple[str, ...], str]:
    """By the first parts of a path, what sets the stack of layers there apart from the others."""
    splits = [_split(owner) for owner in owners]
    paths = list(dict.fromkeys(above for above, layer, _ in splits if layer is not None))
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))))
    named = {}
    for path in paths:
        others = [other for other in paths if other != path]
        length = next((n for n in range(len(path)) if all(other[:n] != path[:n] for other in others)), len(path))
        named[path[:length]] = ".".join(path[shared:length])
    return named


def _stack_of(owner: str, stacks: Mapping[tuple[str, ...], str]) -> str:
    parts = tuple(owner.split("."))
    return next((f"{said} " for path, said in stacks.items() if said and parts[: len(path)] == path), "")
