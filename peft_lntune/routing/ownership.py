"""The owner of a route. A route belongs to the thread that entered it, and to the asyncio task there.

Threads and tasks started with a copy of this context (`asyncio.to_thread`, a child task) may use the route too, as long
as it is open. Any other thread or task that runs the model meanwhile gets an error, never another's rows.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from peft_lntune.errors import RoutingError

__all__ = ["Ownership"]


class _Entry:
    """One entry of a route."""

    def __init__(self, ownership: "Ownership") -> None:
        self.ownership = ownership


_ENTERED: ContextVar[tuple[_Entry, ...]] = ContextVar("peft_lntune_entered", default=())
"""The entries of all models in the present context."""


class Ownership:
    """Tracks which thread or task owns a route.

    Example:
        >>> ownership = Ownership()
        >>> ownership.held()
        False
        >>> with ownership.entered():
        ...     ownership.held()
        True
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: _Entry | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside this context, the route belongs to the caller.

        Raises:
            RoutingError: it has an owner already.
        """
        entry = _Entry(self)
        with self._lock:
            if self._current is not None:
                raise RoutingError(
                    "this model is already running a routed forward pass; one model runs one routed forward at a time. "
                    "Wait for the first to end, or use a second copy of the model."
                )
            self._current = entry
        try:
            with _holding(entry):
                yield
        finally:
            self._current = None

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside this context, the caller may use the route of another thread, if there is one.

        For threads of autograd, which recompute layers in the backward pass.
        """
        entry = self._current
        if entry is None or entry in _ENTERED.get():
            yield
            return
        with _holding(entry):
            yield

    def held(self) -> bool:
        """Whether the route is on for the caller.

        Raises:
            RoutingError: the route is on for another thread or task, or the caller was started in one that has ended.
        """
        entries, current = _ENTERED.get(), self._current
        if not entries and current is None:
            return False
        if current in entries:
            return True
        if any(entry.ownership is self for entry in entries):
            raise RoutingError(
                "this forward pass was started inside a route that has been left since, so its rows are gone. Wait for "
                "all threads and tasks started in a route before leaving it."
            )
        if current is not None:
            raise RoutingError(
                "a route is on in another thread or asyncio task, and it belongs to that one; this forward pass runs "
                "elsewhere. Enter the route in the thread that runs the model (inside the function given to Thread, "
                "for a generation that is streamed), or use a second copy of the model."
            )
        return False


@contextmanager
def _holding(entry: _Entry) -> Iterator[None]:
    _ENTERED.set((*_ENTERED.get(), entry))
    try:
        yield
    finally:
        # Not with a token, which is valid in one context only: a generator may be closed in another.
        _ENTERED.set(tuple(each for each in _ENTERED.get() if each is not entry))
