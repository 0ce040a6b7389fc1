"""Which row of a batch uses which adapter: the names, the layout of the batch, and who entered the route.

One `Route` is shared by all layers of a model; a layer asks it for its own rows. See docs/design.md, "Route".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from peft_lntune.errors import RoutingError
from peft_lntune.routing.ownership import Ownership
from peft_lntune.routing.samples import Fact
from peft_lntune.routing.stacks import BASE, KeptRows, NormRows, Stack, spread

__all__ = ["BASE", "Route"]


class Route:
    """The rows in force, or nothing. Plain Python state: it is set and cleared outside any compiled call.

    Attributes:
        active: whether a route is on, in whatever thread.
        names: the adapter of each sample.
        order: of the adapters, for layers that keep stacks of their own.
        what: how the user calls `names`, for errors.
        one: whether one name is for all rows.
        mixed: whether rows have different adapters.
        count: how many names there are.
        facts: where the samples are in each layer's input, in the way in which the model was called last.
        known: the same for each way in which the model was called, see `Entries`.
        kept: rows of a PeftModel's adapters, see `rows_of_layers`.
    """

    def __init__(self) -> None:
        self.active = False
        self.names: list[str] = []
        self.order: tuple[str, ...] = ()
        self.what = ""
        self.one = False
        self.mixed = False
        self.count = 0
        self.facts: Mapping[str, Fact] = {}
        self.known: dict[object, Mapping[str, Fact]] = {}
        self.kept: KeptRows = {}
        self._ownership = Ownership()
        self.held = self._ownership.held  # `on`, for callers that know that nothing is compiled
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._index = torch.empty(0, dtype=torch.long)
        self._expansions: set[int] = {1}
        self._tokens = 0
        self._gathered: Sequence[Stack] = ()
        self._rows: dict[int, dict[str, NormRows]] = {}

    def __deepcopy__(self, memo: dict) -> "Route":
        # A copy of a model routes on its own, and rows are made again on demand.
        return memo.setdefault(id(self), Route())

    def __reduce__(self):
        return Route, ()

    def drop(self) -> None:
        """Forget the rows that are kept, because a delta or a base parameter changed or may have changed."""
        self.kept = {}

    def on(self) -> bool:
        """Whether the caller's forward pass is routed; see `Ownership.held`.

        Raises:
            RoutingError: the route is on in another thread or task, or the caller was started in one that has ended.
        """
        # A graph must know neither threads nor contexts.
        return self.active if torch.compiler.is_compiling() else self._ownership.held()

    def lent(self) -> AbstractContextManager[None]:
        """Return a context in which the caller's thread may use the route of another; for threads of autograd."""
        return self._ownership.lent()

    @contextmanager
    def serving(
        self,
        names: Sequence[str] | str,
        gathered: Sequence[Stack] = (),
        what: str = "`adapter_names`",
        order: Sequence[str] = (),
    ) -> Iterator[None]:
        """Route the forward passes inside this context.

        Args:
            names: the adapter of each sample, or one string for all samples.
            gathered: the rows of every norm, one for each name.
            what: how the user calls `names`, for errors.
            order: of the adapters, for layers that keep stacks of their own.

        Raises:
            RoutingError: another routed forward of this model is under way.
        """
        self.check_idle()
        with self._ownership.entered():
            self.names = [names] if isinstance(names, str) else list(names)
            self.count, self.one, self.mixed = len(self.names), isinstance(names, str), len(set(self.names)) > 1
            self._gathered, self.what, self.order = gathered, what, tuple(order)
            try:
                if order:  # here and not at the first layer, so that a compiled model finds it as an input of its graph
                    place = {name: number for number, name in enumerate(order)}
                    self._index = torch.tensor([place[name] for name in self.names], dtype=torch.long)
                # Here and not at the first norm, so that a compiled model finds the rows as inputs of its graph.
                self._rows = {1: spread(gathered)}
                self.active = True
                yield
            finally:
                self.active, self.names, self._rows, self._tokens = False, [], {}, 0
                self._indices, self._gathered = {}, ()

    def check_idle(self) -> None:
        """Raise a `RoutingError` where a routed forward of this model is under way."""
        if self.active:
            raise RoutingError(
                f"this model is already running a forward pass routed to {sorted(set(self.names))}; one model runs "
                "one routed forward at a time. Wait for the first to end, or use a second copy of the model."
            )

    @contextmanager
    def expanding(self, expansions: set[int]) -> Iterator[None]:
        """Inside this context a generation repeats the samples.

        Args:
            expansions: by which factors it may.
        """
        before = self._expansions
        self._expansions = before if self.one else expansions
        try:
            yield
        finally:
            self._expansions = before

    def size(self, lengths: Sequence[int]) -> int | None:
        """How many samples a batch has.

        Args:
            lengths: of its tensors along the first axis.

        Returns:
            The first length that fits the names; None where none does.
        """
        possible = {self.count * factor for factor in self._expansions}
        return next((length for length in lengths if length in possible), None)

    def rows(self, owner: str, shape: Sequence[int], label: str) -> NormRows:
        """The rows of one norm; without any, where no adapter touches it.

        Args:
            owner: of the rows.
            shape: of the norm's input, `(B, ..., d)`.
            label: name of the norm, for errors.

        Returns:
            Rows for all samples of the input.

        Raises:
            RoutingError: the batch has another length than the list of names.
        """
        factor = self.factor(shape, label)
        if factor not in self._rows:
            self._rows[factor] = spread(self._gathered, factor)
        return self._rows[factor].get(owner, NormRows())

    def index(self, shape: Sequence[int], label: str, device: torch.device) -> Tensor:
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
        factor = self.factor(shape, label)
        if (factor, device) not in self._indices:
            index = self._index if factor == 1 else self._index.repeat_interleave(factor)
            self._indices[factor, device] = index.to(device)
        return self._indices[factor, device]

    def by_adapter(self, x: Tensor, label: str, run: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Run the rows of each adapter in one pass, for modules whose parameters do not fit a row.

        Args:
            x: the input, `(B, ...)`.
            label: name of the module, for errors.
            run: `(adapter name, its rows of x) -> output`.

        Returns:
            The outputs, in the order of `x`.
        """
        if self.one:
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

    def factor(self, shape: Sequence[int], label: str) -> int:
        """How many rows of an input belong to one name.

        Args:
            shape: of a layer's input, `(B, ...)`.
            label: name of the layer, for errors.

        Returns:
            The number of rows; 1 where one name is for all rows.

        Raises:
            RoutingError: the batch has another length than the list of names, or its rows are not those of samples, or
                that cannot be told.
        """
        if self.one:
            return 1
        batch = shape[0]
        # A number and not the list: a graph must not depend on the names in it.
        # Not by divmod, which Dynamo does not know where the batch's length is a symbol.
        factor, rest = (batch // self.count, batch % self.count) if self.count else (0, batch)
        several = factor not in self._expansions
        # OPT puts samples and tokens into one axis before some norms: (B, T, d) becomes (B * T, d), sample by sample.
        tokens = {expansion * self._tokens for expansion in self._expansions} if len(shape) == 2 else set()
        # Several axes of the samples' length: which of them is theirs cannot be seen.
        alike = batch > 1 and any(length == batch for length in shape[1:-1])
        if torch.compiler.is_compiling() and not several and not rest and not alike:
            fact = None  # a graph must not depend on what has been learnt where nothing hangs on it
        else:
            fact = self.facts.get(label)
        if fact is not None and self.mixed:
            if fact.refused:
                raise RoutingError(self._refusal(shape, label, fact.refused))
            if rest or (several and not fact.blocks):
                raise RoutingError(self.another_length(batch, f"in {label}, along its first axis"))
            return factor
        if rest or (several and factor not in tokens):
            raise RoutingError(self.another_length(batch, f"in {label}, along its first axis"))
        if (several or alike) and self.mixed:  # in this order: a graph need not know whether names differ
            raise RoutingError(self._refusal(shape, label, _UNCLEAR))
        self._tokens = shape[1] if len(shape) == 3 and not several else self._tokens
        return factor

    def another_length(self, length: int, where: str) -> str:
        """The message about a batch of another length than the list of names.

        Args:
            length: of the batch.
            where: it was seen, in words.

        Returns:
            A message that begins as PEFT's does.
        """
        return (
            f"Length of {self.what} should be the same as the number of inputs, but got {self.count} and {length} "
            f"respectively. (Seen {where}; where a model reorders or drops tokens before a layer, as experts do, it "
            "cannot be routed by sample.)"
        )

    def _refusal(self, shape: Sequence[int], label: str, why: str) -> str:
        return (
            f"the rows of {label} cannot be matched with {self.what}: {why}. Its input has the shape {tuple(shape)} "
            f"for {self.count} names. A batch must have its samples along the first axis, one row or one block of rows "
            "for each in the order of the names (batch_first=True; one image for each row). Otherwise run one batch "
            "per adapter."
        )


_UNCLEAR = (
    "more than one axis of its input could be that of the samples, or samples and tokens share one, and it was not "
    "measured which (a compiled model is not measured: run one routed batch before compiling, or another length)"
)
