"""The component and layer of the model to which a parameter belongs, read from its name.

Norms are named after their roles, which `roles.py` reads from the structure around them. `table.py` has the contents of
other modules.
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
    """The place of a parameter in a model.

    Attributes:
        component: such as "query" or "FFN norm"; where unknown, the module's path without the layer's number.
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
"""A head on top of the body, including its norms."""

_HEADS = {
    *("classifier", "classification_head", "cls", "lm_head", "pre_classifier", "qa_outputs", "score"),
    *("vocab_layer_norm", "vocab_projector", "vocab_transform"),
}
"""Names of heads, as the first part of the path."""

# Short ends of paths, with another meaning inside an attention module.
_IN_ATTENTION = {
    "output.dense": Contents((Component.ATTENTION_OUTPUT,), Component.ATTENTION_OUTPUT.label),
    "fc1": UNKNOWN,
    "fc2": UNKNOWN,
}
_ATTENTION = re.compile(r"(^|_)att(n|ention)?$")


def find_components(
    names: Iterable[str], roles: Mapping[str, tuple[str, ...]] | None = None
) -> dict[str, ParameterPlace]:
    """Find the component, the layer and the kind of each parameter.

    The layer is the first number in the name. Where a model has several stacks of layers (an encoder and a decoder, a
    text and an image tower), the stack's name precedes the component's: "encoder query", "decoder query".

    Args:
        names: names of the model's parameters, preferably all: the role of a norm is read from the modules around it.
        roles: roles of norms by module, where known already, such as `find_norms(model)[name].roles`.

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
            layer = None  # a number in a head is not that of a layer
        else:
            component = f"{_stack_of(owner, stacks)}{component}"
        places[name] = ParameterPlace(component, layer, "bias" if name.endswith("bias") else "weight")
    return places


def find_contents(names: Iterable[str], roles: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Contents]:
    """Find the contents of the module of each parameter, regardless of the stack of layers.

    Args:
        names: names of the model's parameters, preferably all: the role of a norm is read from the modules around it.
        roles: roles of norms by module, where known already, such as `find_norms(model)[name].roles`.

    Returns:
        The contents for each parameter. They have several components where one matrix holds several, and none where
        the module is unknown, is a norm, or is part of a head (`HEAD`).

    Example:
        >>> held = find_contents(["h.0.attn.c_attn.weight", "h.0.mixer.key.weight"])
        >>> [(contents.label, len(contents.components)) for contents in held.values()]
        [('query, key, value', 3), ('', 0)]
    """
    owners = {name: _owner(name) for name in names}
    contents = _contents(owners.values(), roles)
    return {name: contents[owner] for name, owner in owners.items()}


def group_by_place(places: Mapping[str, ParameterPlace], *, layers: bool = True) -> dict[ParameterPlace, list[str]]:
    """Group parameters by place.

    Args:
        places: the place of each parameter.
        layers: True: one group per component and layer; False: one group per component, with layer None.

    Returns:
        The names of the parameters of each place, in order of first appearance.
    """
    groups: dict[ParameterPlace, list[str]] = {}
    for name, place in places.items():
        groups.setdefault(place if layers else place._replace(layer=None), []).append(name)
    return groups


def _owner(name: str) -> str:
    """The module of a parameter; the name itself if it does not end in weight or bias, such as a class token."""
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
    """The name of each stack of layers, by the first parts of its path."""
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
