"""Renaming for a model that names its modules differently: the `key_mapping` of PEFT's loaders.

PEFT renames the tensors of a file. Masked deltas are one tensor there, with their names in the config, so the mapping
must be known wherever the config is read. It is set in the loading thread while a loader runs.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

__all__ = ["is_renamed", "new_name", "old_name", "renaming"]


@dataclass
class _Renaming:
    mapping: Mapping[str, str]
    old: dict[str, str] = field(default_factory=dict)


_CURRENT: ContextVar[_Renaming | None] = ContextVar("lntune_renaming", default=None)


@contextmanager
def renaming(mapping: Mapping[str, str] | None) -> Iterator[None]:
    """Rename names of files by PEFT's `key_mapping` inside this context.

    Args:
        mapping: regular expressions and their replacements; None: no renaming.

    Yields:
        Nothing.
    """
    token = _CURRENT.set(None if mapping is None else _Renaming(mapping))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def is_renamed() -> bool:
    """Whether the caller of the loader gave a `key_mapping`."""
    return _CURRENT.get() is not None


def new_name(name: str) -> str:
    """Turn a name in the file into the name in the model, both without PEFT's prefix. The first pattern that matches
    is used.

    Args:
        name: the name in the file.

    Returns:
        The name in the model.

    Example:
        >>> with renaming({"^encoder": "bert.encoder"}):
        ...     new_name("encoder.layer.0"), old_name("bert.encoder.layer.0")
        ('bert.encoder.layer.0', 'encoder.layer.0')
    """
    current = _CURRENT.get()
    for pattern, replacement in current.mapping.items() if current is not None else ():
        renamed, times = re.subn(pattern, replacement, name)
        if current is not None and times:
            current.old[renamed] = name
            return renamed
    return name


def old_name(name: str) -> str:
    """Turn a name in the model back into the name in the file.

    Args:
        name: the name in the model.

    Returns:
        The name that `new_name` renamed to `name`; any other name unchanged.
    """
    current = _CURRENT.get()
    return name if current is None else current.old.get(name, name)
