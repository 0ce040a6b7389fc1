"""The adapter of a request: what a request carries through the engine, and the parameters of a batch of requests."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from peft_lntune.routing.packed import PackedRows
from peft_lntune.routing.stacks import Stack
from peft_lntune.routing.tokens import TokenFact

__all__ = ["BASE_SERIAL", "Adapters", "RequestAdapter", "next_serial", "packed_requests"]

BASE_SERIAL = 0
"""The serial number of the base model; those of adapters begin at 1."""

_SERIALS = itertools.count(BASE_SERIAL + 1)


def next_serial() -> int:
    """A number that no adapter in this process has had before.

    Returns:
        The number. An adapter that is replaced under its name gets another one, so nothing that was computed with the
        old one is taken for the new one's.
    """
    return next(_SERIALS)


class RequestAdapter:
    """The adapter of a request, with a copy of its parameters.

    A request keeps it until it ends, through forks, offloading and restarts, so the adapter may be removed meanwhile.

    Attributes:
        name: name of the adapter.
        serial: number of this version of it; 0 for the base model.
        rows: its parameters in the order of the stacks, `(k, *shape)` each.

    Args:
        name: see above.
        serial: see above.
        rows: see above.
    """

    def __init__(self, name: str, serial: int, rows: Sequence[Tensor]) -> None:
        self.name, self.serial, self.rows = name, serial, tuple(rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RequestAdapter":
        return self  # transformers copies a request deeply to fork it

    def __repr__(self) -> str:
        return f"RequestAdapter({self.name!r})"


class Adapters(Protocol):
    """Where the adapters of requests come from: a bank, or a PeftModel.

    Attributes:
        owner: the bank or the tuner; a manager that is kept belongs to one.
    """

    owner: object

    def take(self, names: Iterable[str | None]) -> dict[str | None, RequestAdapter]:
        """The adapters of these names; None: the base model.

        Raises:
            PeftLNTuneError: one is unknown, or cannot be served by token.
        """

    def as_it_is(self, requests: Sequence[RequestAdapter]) -> bool:
        """Whether the model as it is, without a route, gives the answers of all these requests."""

    def facts(self) -> Mapping[str, TokenFact] | None:
        """Where the model has the tokens of a packed row, by the labels of the layers; None: not measured."""

    def gathered(self, rows: Sequence[Sequence[Tensor]]) -> list[Stack]:
        """Stacks of effective parameters from the rows of several adapters."""

    def routed(self, packed: PackedRows) -> AbstractContextManager[None]:
        """A context in which the model's norms follow these rows; entered by the thread of the engine."""

    def check_start(self, manager: Any) -> None:
        """Check that a manager may start, and note it.

        Raises:
            RoutingError: another one runs on this model.
        """


def packed_requests(
    adapters: Adapters, requests: Sequence[RequestAdapter], lengths: Sequence[int], device: torch.device
) -> PackedRows:
    """The parameters of each token of a batch of requests, one after the other in one row.

    The number of operations depends neither on the number of requests nor on that of adapters: where each request has
    one token, the parameters are gathered by token at once; otherwise those of each adapter once, and by token in each
    norm.

    Args:
        adapters: where the adapters come from.
        requests: the adapter of each request.
        lengths: number of tokens of each request in this batch.
        device: device of the model.

    Returns:
        The rows by token.
    """
    shape, facts = (1, sum(lengths)), adapters.facts()
    if len(requests) == sum(lengths):
        return PackedRows(adapters.gathered([each.rows for each in requests]), None, shape, facts)
    places = {adapter: place for place, adapter in enumerate(dict.fromkeys(requests))}
    index = torch.tensor([places[each] for each in requests]).repeat_interleave(torch.tensor(lengths))
    return PackedRows(adapters.gathered([each.rows for each in places]), index[None].to(device), shape, facts)
