"""Find modules and parameters that a model holds more than once.

Blocks may be shared under several names, norms may also be in plain lists, and parameters may be tied. A module that is
replaced must be replaced in all its places.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from peft_lntune.core.module_tree import is_tuner_layer

__all__ = ["Place", "find_places", "tied_parameters"]

_TORCHS_OWN = frozenset(nn.Module().__dict__)
_DEPTH = 3  # of lists in lists


@dataclass(frozen=True)
class Place:
    """One place that holds a module.

    Attributes:
        name: such as `encoder.norm` for a child, or `encoder.norms[0]` for an entry of a plain list.
        put: puts another module there; None where that is impossible, as in a bound method.
    """

    name: str
    put: Callable[[nn.Module], None] | None


def find_places(model: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, list[Place]]:
    """Find every place where a model holds given modules: children, attributes, plain lists, tuples and dicts.

    Args:
        model: the model to search; the contents of tuner layers are skipped.
        modules: the modules to look for.

    Returns:
        The places of each module that was found.

    Example:
        >>> norm = nn.LayerNorm(2)
        >>> model = nn.Sequential(norm, nn.Sequential(norm))
        >>> model.norms = [norm]
        >>> [place.name for place in find_places(model, [norm])[norm]]
        ['norms[0]', '0', '1.0']
    """
    wanted = {id(module): module for module in modules}
    found: dict[nn.Module, list[Place]] = {}
    for name, holder in model.named_modules():
        if is_tuner_layer(holder):
            continue
        start = f"{name}." if name else ""
        for key, value in holder.__dict__.items():
            if key not in _TORCHS_OWN:
                put = partial(holder.__dict__.__setitem__, key)
                for module, place in _search(value, start + key, put, wanted, holder, _DEPTH):
                    found.setdefault(module, []).append(place)
        for key, child in holder._modules.items():
            if id(child) in wanted and child is not None:
                found.setdefault(child, []).append(Place(start + key, partial(holder._modules.__setitem__, key)))
    return found


def _search(
    value: Any, name: str, put: Callable[[Any], None], wanted: Mapping[int, nn.Module], holder: nn.Module, depth: int
) -> Iterator[tuple[nn.Module, Place]]:
    if id(value) in wanted:
        yield wanted[id(value)], Place(name, put)
    elif isinstance(value, MethodType):
        if id(value.__self__) in wanted and value.__self__ is not holder:
            yield wanted[id(value.__self__)], Place(f"{name} (a bound method)", None)
    elif isinstance(value, (list, dict)) and depth:
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from _search(item, f"{name}[{key!r}]", partial(value.__setitem__, key), wanted, holder, depth - 1)
    elif isinstance(value, tuple) and depth:
        for key, item in enumerate(value):
            yield from _search(
                item, f"{name}[{key}]", partial(_put_in_tuple, put, value, key), wanted, holder, depth - 1
            )


def _put_in_tuple(put: Callable[[Any], None], value: tuple[Any, ...], key: int, item: Any) -> None:
    items = [*value[:key], item, *value[key + 1 :]]
    put(type(value)(*items) if hasattr(value, "_fields") else type(value)(items))


def tied_parameters(modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Find the parameters that several modules share.

    Args:
        modules: distinct modules by name.

    Returns:
        For each shared parameter, as the pair of its module's name and its own, its other places as such pairs.

    Example:
        >>> a, b = nn.LayerNorm(2, bias=False), nn.LayerNorm(2, bias=False)
        >>> b.weight = a.weight
        >>> tied_parameters({"a": a, "b": b})
        {('a', 'weight'): [('b', 'weight')], ('b', 'weight'): [('a', 'weight')]}
    """
    places: dict[int, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for key, value in module._parameters.items():
            if value is not None:
                places.setdefault(id(value), []).append((name, key))
    shared = [where for where in places.values() if len(where) > 1]
    return {place: [other for other in where if other != place] for where in shared for place in where}
