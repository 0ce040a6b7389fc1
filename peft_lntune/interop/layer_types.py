"""Linear maps of one type in all layers of a model, such as the `q_proj` of each layer."""

import re
from collections.abc import Iterable

__all__ = ["untuned_of_tuned_types"]

_LAYER = re.compile(r"\.\d+(?=\.)")


def untuned_of_tuned_types(names: Iterable[str], tuned: Iterable[str]) -> list[str]:
    """The linear maps that are not tuned, but whose counterpart in another layer is.

    LoRAX loads a type of linear map only if every layer has LoRA on it, and otherwise drops the type in all layers.

    Args:
        names: the names of all linear maps.
        tuned: the names of those that are tuned.

    Returns:
        Names in the order of `names`. Two names are of one type if they differ in the number of the layer alone, which
        is the first number between two dots.

    Example:
        >>> names = ["layers.0.q_proj", "layers.0.o_proj", "layers.1.q_proj", "layers.1.o_proj", "lm_head"]
        >>> untuned_of_tuned_types(names, ["layers.1.q_proj"])
        ['layers.0.q_proj']
    """
    done = set(tuned)
    types = {_type(name) for name in done}
    return [name for name in names if name not in done and _type(name) in types]


def _type(name: str) -> str:
    return _LAYER.sub(".*", f".{name}", count=1)
