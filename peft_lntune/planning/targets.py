"""By PEFT's rules, which modules the names and layers of a config choose."""

import re
from collections.abc import Iterable
from typing import Any

from peft_lntune.config import LNTuneConfig

__all__ = ["in_layers", "is_chosen", "is_saved", "matches"]


def is_chosen(config: Any, name: str) -> bool:
    """Tell whether a place found by structure is among the target modules, if any are named, and in the layers.

    Args:
        config: any config of this package.
        name: of the module.

    Returns:
        Whether it is, and is not excluded.
    """
    named = config.target_modules is None or matches(config.target_modules, name)
    return named and not matches(config.exclude_modules, name) and in_layers(config, name)


def is_saved(config: LNTuneConfig, name: str) -> bool:
    """Tell whether a module is one of `modules_to_save`, or inside one, by PEFT's rule.

    Args:
        config: any config of this package.
        name: of the module.

    Returns:
        Whether it is.
    """
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ())


def matches(pattern: Iterable[str] | str | None, name: str) -> bool:
    """Match a name by PEFT's rule: a string is a regular expression for all of it, a list holds names or endings.

    Args:
        pattern: the string or the list; None or an empty one matches nothing.
        name: of a module.

    Returns:
        Whether it matches.

    Example:
        >>> matches(["ln_1"], "h.0.ln_1"), matches("ln_1", "h.0.ln_1")
        (True, False)
    """
    if not pattern:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern)


def in_layers(config: LNTuneConfig, name: str) -> bool:
    """Tell whether a module is in the layers that a config chooses, and in none that it leaves out.

    Args:
        config: any config of this package.
        name: of the module.

    Returns:
        Whether it is.
    """
    chosen, excluded = config.layers_to_transform, getattr(config, "layers_to_exclude", None)
    if excluded is not None and _is_in(config, name, excluded):
        return False
    return chosen is None or chosen == [] or _is_in(config, name, chosen)


def _is_in(config: LNTuneConfig, name: str, layers: list[int] | int) -> bool:
    """PEFT's rule: the first number in the name is the layer, or the first one after `layers_pattern`."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name)
        if found:
            return int(found["index"]) in wanted
    return False
