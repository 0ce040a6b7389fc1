"""Names of a saved adapter in a model that calls its modules otherwise: the `key_mapping` of PEFT's loaders.

PEFT renames the tensors of a file, but masked deltas are one tensor there, and their names stand in the config. So the
mapping is in force, in the thread that loads, for as long as one call of a loader runs.
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
    """Inside this context names of files are renamed by PEFT's `key_mapping`; None: they are not."""
    token = _CURRENT.set(None if mapping is None else _Renaming(mapping))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def is_renamed() -> bool:
    """Whether the caller of the loader has said how names are mapped."""
    return _CURRENT.get() is not None


def new_name(name: str) -> str:
    """The name in the model, from the name in the file, without PEFT's prefix; the first pattern that is found counts.

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
    """The name in the file of what `new_name` has renamed; any other name as it is."""
    current = _CURRENT.get()
    return name if current is None else current.old.get(name, name)
