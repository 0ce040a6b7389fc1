"""Who has entered a route. A route belongs to the thread that entered it, and to the asyncio task there.

What a thread or a task starts with a copy of its context (`asyncio.to_thread`, a child task) may use the route as well,
as long as it is open. Everything else that runs the same model meanwhile gets an error, never another one's rows.
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
"""The entries that hold here, of all models."""


class Ownership:
    """Whose a route is at the moment.

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
        """Inside this context the route belongs to the caller.

        Raises:
            RoutingError: somebody has entered it.
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
        """Inside this context the caller may use the route that another thread has entered, if there is one.

        For threads of autograd, which compute a layer again in the backward pass.
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
                "what was started in a route before leaving it."
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
        # Not by a token, which only the same context takes back: a generator may be closed in another one.
        _ENTERED.set(tuple(each for each in _ENTERED.get() if each is not entry))
