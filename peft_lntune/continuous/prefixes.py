"""Cached prefixes that belong to one adapter.

transformers finds a cached block of keys and values by a hash of its tokens. Another adapter computes other keys and
values from the same tokens, so the adapter is part of what is hashed here. A replaced adapter has another serial number
and finds nothing of the old one, even under the same name.
"""

from collections.abc import Callable
from typing import Any

from peft_lntune.continuous.adapters import BASE_SERIAL

__all__ = ["SaltedTokens", "salt_prefixes"]

_BITS = 31  # tokens are hashed as signed integers of 32 bits


class SaltedTokens(list):
    """The tokens of a request, of which each full block of the cache ends with the serial number of its adapter.

    Args:
        tokens: the tokens.
        serial: serial number of the adapter; 0, that of the base model, leaves the blocks as they are.

    Example:
        >>> tokens = SaltedTokens([5, 6, 7, 8, 9], 3)
        >>> tokens[0:4], tokens[4:8]
        ([5, 6, 7, 8, 3, 0], [9])
    """

    def __init__(self, tokens: list[int], serial: int) -> None:
        super().__init__(tokens)
        self.serial = serial

    def __add__(self, other: list[int]) -> "SaltedTokens":  # type: ignore[override]
        return SaltedTokens(super().__add__(other), self.serial)

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        # A block that is not full is not hashed, and must keep its length.
        if not isinstance(place, slice) or not self.serial or len(found) < place.stop - (place.start or 0):
            return found
        return [*found, self.serial % 2**_BITS, self.serial >> _BITS]


class _SaltedState:
    """A request as the cache sees it: its prompt is salted, all else is the request's own."""

    def __init__(self, state: Any, serial: int) -> None:
        self._state = state
        self.initial_tokens = SaltedTokens(state.initial_tokens, serial)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def salt_prefixes(processor: Any, serial_of: Callable[[Any], int]) -> None:
    """Make the cache of a batch processor share blocks among requests of one adapter only. A second call does nothing.

    Args:
        processor: the batch processor, with `cache` and `scheduler`.
        serial_of: the serial number of a request's adapter, from the request's state.
    """
    cache, scheduler = processor.cache, processor.scheduler
    if "search_prefix_match" in cache.__dict__:
        return
    search, mark = cache.search_prefix_match, cache.mark_complete_blocks

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        state = scheduler.waiting_requests.get(request_id) or scheduler.active_requests.get(request_id)
        if state is None:  # whose tokens these are is not known, so nothing is shared
            return 0
        found: int = search(request_id, SaltedTokens(prompt_ids, serial_of(state)))
        return found

    def mark_complete_blocks(state: Any, complete_blocks: dict[str, int]) -> None:
        serial = serial_of(state)
        mark(_SaltedState(state, serial) if serial != BASE_SERIAL else state, complete_blocks)

    cache.search_prefix_match, cache.mark_complete_blocks = search_prefix_match, mark_complete_blocks
