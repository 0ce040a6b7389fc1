"""Which component of the model a parameter belongs to, and of which layer, told from the names.

Norms have the names of their roles, which `peft_lntune.core.roles` tells from the structure around them. For the other
modules the table below holds one block a structure, whatever models are built that way.
"""

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import NamedTuple

from peft_lntune.core.role_names import is_called_norm
from peft_lntune.core.roles import find_roles

__all__ = ["Place", "find_components", "group_by_place"]


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
    "Llama, Mistral, Qwen, Gemma, OLMo": {
        "embed_tokens": "word embeddings",
        **_attention("self_attn", "q_proj k_proj v_proj o_proj"),
        "mlp.gate_proj": "FFN gate",
        "mlp.up_proj": "FFN up",
        "mlp.down_proj": "FFN down",
    },
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
    norms = {owner for owner in owners.values() if is_called_norm(owner)}
    known = {**find_roles(_with_parents(owners.values()), norms), **(roles or {})}
    components = {owner: _component(owner, known.get(owner, ())) for owner in owners.values()}
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


def _component(owner: str, roles: tuple[str, ...]) -> str | None:
    parts = owner.split(".")
    if parts[0] in HEADS:
        return "head"
    if roles:
        return " and ".join(_NORMS[role] for role in roles) + " norm"
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return next((_ENDS[end] for end in ends if end in _ENDS), None)


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
