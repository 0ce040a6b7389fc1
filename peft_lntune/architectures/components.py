"""Which component of the model a parameter belongs to, and of which layer, told from the names.

Norms have the names of their roles, which `roles.py` tells from the structure around them. What other modules hold says
`table.py`.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import NamedTuple

from peft_lntune.architectures.role_names import is_called_norm
from peft_lntune.architectures.roles import find_roles
from peft_lntune.architectures.table import UNKNOWN, Component, Contents, contents_by_path

__all__ = ["HEAD", "ParameterPlace", "find_components", "find_contents", "group_by_place"]


class ParameterPlace(NamedTuple):
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


HEAD = Contents((), "head")
"""What stands on top of a body, its norms too."""

_HEADS = {
    *("classifier", "classification_head", "cls", "lm_head", "pre_classifier", "qa_outputs", "score"),
    *("vocab_layer_norm", "vocab_projector", "vocab_transform"),
}
"""What a head is called, by the first part of the path."""

# Short ends, which mean something else inside an attention module.
_IN_ATTENTION = {
    "output.dense": Contents((Component.ATTENTION_OUTPUT,), Component.ATTENTION_OUTPUT.label),
    "fc1": UNKNOWN,
    "fc2": UNKNOWN,
}
_ATTENTION = re.compile(r"(^|_)att(n|ention)?$")


def find_components(
    names: Iterable[str], roles: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, ParameterPlace]:
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
    contents = _contents(owners.values(), roles)
    stacks = _stacks(owner for owner, held in contents.items() if held not in (UNKNOWN, HEAD))
    places = {}
    for name, owner in owners.items():
        above, layer, below = _split(owner)
        held = contents[owner]
        component = held.label
        if held == UNKNOWN:
            component = ".".join((*above, *below)) or "model"
        elif held == HEAD:
            layer = None  # a number in a head counts its own modules
        else:
            component = f"{_stack_of(owner, stacks)}{component}"
        places[name] = ParameterPlace(component, layer, "bias" if name.endswith("bias") else "weight")
    return places


def find_contents(names: Iterable[str], roles: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Contents]:
    """Tell what the module of each parameter holds, whatever stack of layers it is in.

    Args:
        names: names of the model's parameters, better all of them: a norm's role is told from what is around it.
        roles: by module, the roles of norms where they are known already, as in `find_norms(model)[name].roles`.

    Returns:
        The contents for each parameter. There are several components where one matrix holds several, and none where
        the module is not known, is a norm, or is part of a head (`HEAD`).

    Example:
        >>> held = find_contents(["h.0.attn.c_attn.weight", "h.0.mixer.key.weight"])
        >>> [(contents.label, len(contents.components)) for contents in held.values()]
        [('query, key, value', 3), ('', 0)]
    """
    owners = {name: _owner(name) for name in names}
    contents = _contents(owners.values(), roles)
    return {name: contents[owner] for name, owner in owners.items()}


def group_by_place(places: Mapping[str, ParameterPlace], *, layers: bool = True) -> dict[ParameterPlace, list[str]]:
    """The parameters of each place, in order of first appearance; `layers=False` pools the layers (layer None)."""
    groups: dict[ParameterPlace, list[str]] = {}
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


def _contents(owners: Iterable[str], roles: Mapping[str, tuple[str, ...]] | None) -> dict[str, Contents]:
    owners = dict.fromkeys(owners)
    known = {**find_roles(_with_parents(owners), filter(is_called_norm, owners)), **(roles or {})}
    ends = contents_by_path()
    return {owner: _held(owner, known.get(owner, ()), ends) for owner in owners}


def _held(owner: str, roles: tuple[str, ...], ends: Mapping[str, Contents]) -> Contents:
    parts = owner.split(".")
    if parts[0] in _HEADS:
        return HEAD
    if roles:
        return Contents((), " and ".join(_NORMS[role] for role in roles) + " norm")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        if end in _IN_ATTENTION and start and _ATTENTION.search(parts[start - 1]):
            return _IN_ATTENTION[end]
        if end in ends:
            return ends[end]
    return UNKNOWN


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
