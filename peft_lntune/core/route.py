"""Which row of a batch uses which adapter, and the rows of parameters that follow from it.

All norms of one shape are stacked as `(adapters + 1, norms, 1, *shape)`, row 0 being the base model, so that a
batch costs one gather for each shape and not one for each norm or adapter. One `Route` is shared by all layers of
a model; a layer asks it for its own rows. See docs/design.md, "Route".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_lntune.errors import RoutingError

__all__ = ["BASE", "Entry", "Route", "Rows", "expansions_of", "fit_rows", "one_dtype"]

BASE = "__base__"
"""The name that stands for the base model in a list of adapter names, as in PEFT."""


class Entry(NamedTuple):
    """One routed parameter: whose it is, its value under each adapter, and what tells that one of them changed."""

    owner: int
    parameter: str
    value: Callable[[str], Tensor]
    key: tuple[object, ...]


class Rows(NamedTuple):
    """Parameters of one norm, a row for each sample of the batch: `(B, 1, *shape)`, or None where it has none."""

    weight: Tensor | None = None
    bias: Tensor | None = None


Gather = Callable[[int], dict[int, Rows]]
"""From how many rows of an input belong to one sample to the rows of each norm, by its owner."""


def fit_rows(rows: Tensor, x: Tensor, axis: int = -1) -> Tensor:
    """Rows `(B, 1, *shape)`, or one row for all, as they broadcast over `x`; no operation in the usual case.

    Args:
        rows: of a norm's weight or bias.
        x: the norm's input, `(B, ..., *shape)`, or `(B, *shape, ...)` for `axis=1`.
        axis: as in `peft_lntune.core.norms.Norm`.

    Example:
        >>> fit_rows(torch.ones(2, 1, 4), torch.ones(2, 3, 5, 4)).shape
        torch.Size([2, 1, 1, 4])
    """
    shape = rows.shape[2 + max(0, rows.dim() - 1 - x.dim()) :]  # `(1, C, 1, 1)`: the first is that of the samples
    middle = x.dim() - 1 - len(shape)
    if axis == 1:
        return rows.reshape(rows.shape[0], *shape, *(1,) * middle)
    return rows if middle == 1 else rows.reshape(rows.shape[0], *(1,) * middle, *shape)


def expansions_of(model: object, options: Mapping[str, Any]) -> set[int]:
    """By which factors `model.generate(**options)` may repeat the samples of a batch: beams, return sequences.

    Example:
        >>> sorted(expansions_of(None, {"num_beams": 4, "num_return_sequences": 2}))
        [1, 2, 4, 8]
    """
    configs = [options.get("generation_config"), getattr(model, "generation_config", None)]
    factors = {1}
    for name in ("num_beams", "num_return_sequences"):
        values = [options.get(name), *(getattr(config, name, None) for config in configs)]
        factors.add(next((value for value in values if value), 1))
    return factors | {max(factors) * min(factors - {1}, default=1)}


class Route:
    """The rows in force, or nothing. Plain Python state: it is set and cleared outside any compiled call."""

    def __init__(self) -> None:
        self.active = False
        self.names: list[str] = []
        self.order: tuple[str, ...] = ()
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._index = torch.empty(0, dtype=torch.long)
        self._broadcast = False
        self._what = ""
        self._count = 0
        self._expansions: set[int] = {1}
        self._tokens = 0
        self._rows: dict[int, dict[int, Rows]] = {}
        self._gather: Gather = self._gather_stacks
        self._stacks: list[tuple[list[Entry], Tensor]] = []
        self._key: object = None

    def __deepcopy__(self, memo: dict) -> "Route":
        # A copy of a model routes on its own, and stacks are made again on demand.
        return memo.setdefault(id(self), Route())

    def __reduce__(self):
        return Route, ()

    def drop(self) -> None:
        """Forget the stacks, because a delta or a base parameter changed."""
        self._stacks, self._key = [], None

    @contextmanager
    def __call__(
        self, names: Sequence[str] | str, adapters: Sequence[str], entries: Sequence[Entry], expansions: set[int]
    ) -> Iterator[None]:
        """Route the forward passes inside this context.

        Args:
            names: the adapter of each sample, or one string for all samples.
            adapters: every adapter of the model, in the order of the stacks' rows from 1 on.
            entries: every routed parameter of the model.
            expansions: by which factors generation may repeat the samples (beams, return sequences).

        Raises:
            RoutingError: another routed forward of this model is under way.
        """
        self.check_idle()
        self._build(adapters, entries)
        self.order = (BASE, *adapters)
        order = {name: row for row, name in enumerate(self.order)}
        each = [names] if isinstance(names, str) else names
        self._index = torch.tensor([order[name] for name in each], dtype=torch.long)
        with self.serving(names, self._gather_stacks, expansions):
            yield

    @contextmanager
    def serving(
        self, names: Sequence[str] | str, gather: Gather, expansions: set[int], what: str = "`adapter_names`"
    ) -> Iterator[None]:
        """Route the forward passes inside this context by rows that the caller has stacked.

        Args:
            names: the adapter of each sample, or one string for all samples.
            gather: gives the rows of every norm.
            expansions: by which factors generation may repeat the samples.
            what: how the user calls `names`, for errors.

        Raises:
            RoutingError: another routed forward of this model is under way.
        """
        self.check_idle()
        self.names = [names] if isinstance(names, str) else list(names)
        self._count = len(self.names)
        self._expansions = {1} if isinstance(names, str) else expansions
        self._broadcast = isinstance(names, str)
        self._gather, self._what = gather, what
        # Here and not at the first norm, so that a compiled model finds the rows as inputs of its graph.
        self._rows = {1: gather(1)}
        self.active = True
        try:
            yield
        finally:
            self.active, self.names, self._rows, self._tokens = False, [], {}, 0
            self._indices, self._gather = {}, self._gather_stacks

    def check_idle(self) -> None:
        """Raise a `RoutingError` where a routed forward of this model is under way."""
        if self.active:
            raise RoutingError(
                f"this model is already running a forward pass routed to {sorted(set(self.names))}; one model runs "
                "one routed forward at a time. Wait for the first to end, or use a second copy of the model."
            )

    @contextmanager
    def expanding(self, expansions: set[int]) -> Iterator[None]:
        """Within a generation that repeats the samples by these factors."""
        before = self._expansions
        self._expansions = before if self._broadcast else expansions
        try:
            yield
        finally:
            self._expansions = before

    def rows(self, owner: int, shape: torch.Size, label: str) -> Rows | None:
        """The rows of one norm for an input of `shape`, `(B, ..., d)`; None where no adapter touches it.

        Raises:
            RoutingError: the batch has another length than the list of names.
        """
        factor = self.factor(shape, label)
        if factor not in self._rows:
            self._rows[factor] = self._gather(factor)
        return self._rows[factor].get(owner)

    def index(self, shape: torch.Size, label: str, device: torch.device) -> Tensor:
        """The place in `order` of each row's adapter, for layers that keep stacks of their own in that order.

        Args:
            shape: of the layer's input, `(B, ...)`.
            label: name of the layer, for errors.
            device: where the stacks are.

        Returns:
            `(B,)` int64; `(1,)` where one name is for all rows.

        Raises:
            RoutingError: the batch has another length than the list of names.
        """
        return self._places(self.factor(shape, label), device)

    def by_adapter(self, x: Tensor, label: str, run: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Run the rows of each adapter in one pass, for modules whose parameters do not fit a row.

        Args:
            x: the input, `(B, ...)`.
            label: name of the module, for errors.
            run: `(adapter name, its rows of x) -> output`.

        Returns:
            The outputs, in the order of `x`.
        """
        if self._broadcast:
            return run(self.names[0], x)
        factor = self.factor(x.shape, label)
        rows: dict[str, list[int]] = {}
        for row in range(x.shape[0]):
            rows.setdefault(self.names[row // factor], []).append(row)
        if len(rows) == 1:
            return run(self.names[0], x)
        outputs = [run(name, x[index]) for name, index in rows.items()]
        order = torch.tensor([row for index in rows.values() for row in index], device=x.device)
        return torch.cat(outputs)[order.argsort()]

    def factor(self, shape: torch.Size, label: str) -> int:
        """How many rows of an input belong to one name; 1 where one name is for all rows.

        Args:
            shape: of a layer's input, `(B, ...)`.
            label: name of the layer, for errors.

        Raises:
            RoutingError: the batch has another length than the list of names.
        """
        if self._broadcast:
            return 1
        batch = shape[0]
        # A number and not the list: a graph must not depend on the names in it.
        # Not by divmod, which Dynamo does not know where the batch's length is a symbol.
        factor, rest = (batch // self._count, batch % self._count) if self._count else (0, batch)
        if not rest and factor in self._expansions:
            self._tokens = shape[1] if len(shape) == 3 else self._tokens
            return factor
        # OPT puts samples and tokens into one axis before some norms: (B, T, d) becomes (B * T, d), sample by sample.
        flattened = {expansion * self._tokens for expansion in self._expansions} if len(shape) == 2 else set()
        if rest or factor not in flattened:
            raise RoutingError(
                f"Length of {self._what} should be the same as the number of inputs, but got "
                f"{self._count} and {batch} respectively. (Seen in {label}, along its first axis; where a model "
                "reorders or drops tokens before a layer, as experts do, it cannot be routed by sample.)"
            )
        return factor

    def _build(self, adapters: Sequence[str], entries: Sequence[Entry]) -> None:
        key = (tuple(adapters), tuple((entry.owner, entry.key) for entry in entries))
        if key == self._key:
            return
        self.drop()
        groups: dict[object, list[Entry]] = {}
        for entry in entries:
            base = entry.value(BASE)
            groups.setdefault((base.shape, base.device), []).append(entry)
        for group in groups.values():
            rows = [torch.stack([entry.value(name) for entry in group]) for name in (BASE, *adapters)]
            self._stacks.append((group, torch.stack(one_dtype(rows)).unsqueeze(2)))
        self._key = key

    def _places(self, factor: int, device: torch.device) -> Tensor:
        if (factor, device) not in self._indices:
            index = self._index if factor == 1 else self._index.repeat_interleave(factor)
            self._indices[factor, device] = index.to(device)
        return self._indices[factor, device]

    def _gather_stacks(self, factor: int) -> dict[int, Rows]:
        parameters: dict[int, dict[str, Tensor]] = {}
        for group, stack in self._stacks:
            gathered = stack.index_select(0, self._places(factor, stack.device)).unbind(1)
            for entry, rows in zip(group, gathered, strict=True):
                parameters.setdefault(entry.owner, {})[entry.parameter] = rows
        return {owner: Rows(**found) for owner, found in parameters.items()}


def one_dtype(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the narrowest dtype that holds them all."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
