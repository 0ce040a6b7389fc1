"""Wrap functions of PEFT and transformers: all or none, each once, and so that the original can be put back."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["MARK", "wrap_once"]

MARK = "_lntune_wraps"
"""The attribute that a function has which was made here. What it wraps is its `__wrapped__`."""


def wrap_once(wraps: Iterable[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]) -> None:
    """Put wrapped functions in the place of functions that others own. Calling it again changes nothing.

    Args:
        wraps: for each function the class or module that holds it, its name there, and what makes the new function
            from the old one. Of a class method that is the function beneath.

    Raises:
        AttributeError: one of the names is gone. Nothing has changed.

    Example:
        >>> class Owner:
        ...     def double(self, value):
        ...         return 2 * value
        >>> wrap_once([(Owner, "double", lambda original: lambda self, value: original(self, value) + 1)])
        >>> Owner().double(3), Owner.double.__wrapped__(None, 3)
        (7, 6)
    """
    wraps = list(wraps)
    gone = [f"{owner.__name__}.{name}" for owner, name, _ in wraps if name not in vars(owner)]
    if gone:
        raise AttributeError(f"{gone[0]} is gone")
    for owner, name, wrap in wraps:
        original = vars(owner)[name]
        function = getattr(original, "__func__", original)
        if not hasattr(function, MARK):
            wrapped = functools.wraps(function)(wrap(function))
            setattr(wrapped, MARK, True)
            setattr(owner, name, classmethod(wrapped) if isinstance(original, classmethod) else wrapped)
