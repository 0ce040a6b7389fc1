"""Find modules and parameters that a model holds more than once.

Blocks may be shared under several names, norms may also be in plain lists, objects, partials and closures, and
parameters may be tied. A module that is replaced must be replaced in all its places.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, getitem, itemgetter, setitem
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_lntune.core.module_tree import is_tuner_layer

__all__ = ["Place", "find_places", "tied_parameters"]

_TORCHS_OWN = frozenset(nn.Module().__dict__)
_DEPTH = 3  # of lists in lists, or objects in objects
_CLOSED = (torch.Tensor, nn.Module, ModuleType, type)  # not searched; a module of the model is a holder of its own


@dataclass(frozen=True)
class Place:
    """One place that holds a module.

    Attributes:
        name: such as `encoder.norm` for a child, or `encoder.norms[0]` for an entry of a plain list.
        put: puts another module there; None where that is impossible, as in a bound method or a closure.
    """

    name: str
    put: Callable[[nn.Module], None] | None


def find_places(model: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, list[Place]]:
    """Find every place where a model holds given modules.

    These are children, attributes, and what attributes hold: lists, tuples, dicts, objects, partials and closures.

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
    seen: set[int] = set()
    for name, holder in model.named_modules():
        if is_tuner_layer(holder):
            continue
        start = f"{name}." if name else ""
        for key in [key for key in holder.__dict__ if key not in _TORCHS_OWN]:
            slot = _Slot(start + key, partial(getitem, holder.__dict__, key), partial(setitem, holder.__dict__, key))
            for module, place in _search(slot, wanted, holder, _DEPTH, seen):
                found.setdefault(module, []).append(place)
        for key, child in holder._modules.items():
            if id(child) in wanted and child is not None:
                found.setdefault(child, []).append(Place(start + key, partial(holder._modules.__setitem__, key)))
    return found


class _Slot(NamedTuple):
    """A place for a value: its name, and functions that read and replace the value as it is then; None: it stays."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], None] | None

    def at(self, name: str, get: Callable[[Any], Any], changed: Callable[[Any, Any], Any]) -> "_Slot":
        """A slot inside a value that cannot be changed: `changed` makes another value with a new part."""
        put = self.put

        def put_inside(new: Any) -> None:
            assert put is not None
            put(changed(self.get(), new))

        return _Slot(self.name + name, lambda: get(self.get()), None if put is None else put_inside)

    def inside(self, container: Any, key: Any, name: str) -> "_Slot":
        """A slot inside a value that can be changed."""
        return _Slot(self.name + name, partial(getitem, container, key), partial(setitem, container, key))


def _search(
    slot: _Slot, wanted: Mapping[int, nn.Module], holder: nn.Module, depth: int, seen: set[int]
) -> Iterator[tuple[nn.Module, Place]]:
    value = slot.get()
    if id(value) in wanted:
        if value is not holder:  # a forward that was put into a module may hold the module itself
            yield wanted[id(value)], Place(slot.name, slot.put)
    elif isinstance(value, MethodType):
        if id(value.__self__) in wanted and value.__self__ is not holder:
            yield wanted[id(value.__self__)], Place(f"{slot.name} (a bound method)", None)
    elif depth:
        for part in _parts(slot, value, seen):
            yield from _search(part, wanted, holder, depth - 1, seen)


def _parts(slot: _Slot, value: Any, seen: set[int]) -> Iterator[_Slot]:
    if isinstance(value, (list, dict)):
        for key in list(value if isinstance(value, dict) else range(len(value))):
            yield slot.inside(value, key, f"[{key!r}]")
    elif isinstance(value, tuple):
        for number in range(len(value)):
            yield slot.at(f"[{number}]", itemgetter(number), partial(_tuple_with, number))
    elif isinstance(value, partial):
        yield slot.at(".func", attrgetter("func"), lambda old, new: partial(new, *old.args, **old.keywords))
        yield slot.at(".args", attrgetter("args"), lambda old, new: partial(old.func, *new, **old.keywords))
        for key in value.keywords:
            yield slot.at(f".{key}", partial(_keyword, key), partial(_with_keyword, key))
    elif isinstance(value, FunctionType):
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if cell != CellType():  # a deep copy of the model has the same function, and is not to change with it
                yield _Slot(f"{slot.name} (a closure over {key})", partial(getattr, cell, "cell_contents"), None)
    elif not isinstance(value, _CLOSED) and id(value) not in seen:
        seen.add(id(value))
        state = getattr(value, "__dict__", None)
        for key in list(state) if isinstance(state, dict) else ():
            yield slot.inside(state, key, f".{key}")


def _tuple_with(number: int, old: tuple[Any, ...], item: Any) -> tuple[Any, ...]:
    items = [*old[:number], item, *old[number + 1 :]]
    made: tuple[Any, ...] = type(old)(*items) if hasattr(old, "_fields") else type(old)(items)
    return made


def _keyword(key: str, old: "partial[Any]") -> Any:
    return old.keywords[key]


def _with_keyword(key: str, old: "partial[Any]", item: Any) -> "partial[Any]":
    return partial(old.func, *old.args, **{**old.keywords, key: item})


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
