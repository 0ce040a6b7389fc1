"""Which row of a batch uses which adapter: the names, the layout of the batch, and the owner of the route.

One `Route` is shared by all layers of a model; each layer gets its rows from it. See docs/design.md, "Route".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from peft_lntune.errors import RoutingError
from peft_lntune.routing.ownership import Ownership
from peft_lntune.routing.packed import PackedRows
from peft_lntune.routing.samples import Fact
from peft_lntune.routing.stacks import BASE, KeptRows, NormRows, Stack, spread

__all__ = ["BASE", "Route"]


class Route:
    """The rows of the present batch, if a route is on. Plain Python state, set and cleared outside compiled calls.

    Attributes:
        active: whether a route is on in any thread.
        names: the adapter of each sample.
        order: order of the adapters in the stacks of layers that hold their own.
        what: the user's term for `names`, for errors.
        one: whether one name is for all rows.
        mixed: whether rows have different adapters.
        alike: whether all samples of the latest call have the same adapter, and are as many as the names.
        count: number of names.
        facts: where the samples are in each layer's input, for the layout of the latest call.
        refusing: whether the rows of some layer are refused in the latest call.
        known: facts for each call layout, see `Entries`.
        kept: cached rows of a PeftModel's adapters, see `rows_of_layers`.
        gathered: the rows of every norm, one per name.
        packed: while a batch of packed rows runs, the rows by token; None: rows are by sample.
    """

    def __init__(self) -> None:
        self.active = False
        self.names: list[str] = []
        self.order: tuple[str, ...] = ()
        self.what = ""
        self.one = False
        self.mixed = self.alike = self.refusing = False
        self.count = 0
        self.facts: Mapping[str, Fact] = {}
        self.known: dict[object, Any] = {}
        self.kept: KeptRows = {}
        self._ownership = Ownership()
        self.held = self._ownership.held  # `on`, for callers outside compiled code
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._index = torch.empty(0, dtype=torch.long)
        self._expansions: set[int] = {1}
        self._tokens = 0
        self.gathered: Sequence[Stack] = ()
        self.packed: PackedRows | None = None
        self._rows: dict[int, dict[str, NormRows]] = {}

    def __deepcopy__(self, memo: dict) -> "Route":
        # A copy of a model has its own route, and its rows are made on demand.
        return memo.setdefault(id(self), Route())

    def __reduce__(self):
        return Route, ()

    def drop(self) -> None:
        """Drop the cached rows, because a delta or a base parameter has changed or may have changed."""
        self.kept = {}

    def on(self) -> bool:
        """Whether the caller's forward pass is routed.

        Raises:
            RoutingError: the route is on in another thread or task, or the caller was started in one that has ended.
        """
        # A graph must not depend on threads or contexts.
        return self.active if torch.compiler.is_compiling() else self._ownership.held()

    def lent(self) -> AbstractContextManager[None]:
        """A context in which the caller's thread may use the route of another thread; for threads of autograd."""
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
            gathered: the rows of every norm, one per name.
            what: the user's term for `names`, for errors.
            order: order of the adapters in the stacks of layers that hold their own.

        Yields:
            Nothing.

        Raises:
            RoutingError: another routed forward of this model is running.
        """
        self.check_idle()
        with self._ownership.entered():
            self.names = [names] if isinstance(names, str) else list(names)
            self.count, self.one, self.mixed = len(self.names), isinstance(names, str), len(set(self.names)) > 1
            self.gathered, self.what, self.order = gathered, what, tuple(order)
            try:
                if order:  # made here, not at the first layer, so that it is an input of a compiled graph
                    place = {name: number for number, name in enumerate(order)}
                    self._index = torch.tensor([place[name] for name in self.names], dtype=torch.long)
                # Made here, not at the first norm, so that the rows are inputs of a compiled graph.
                self._rows = {1: spread(gathered)}
                self.active = True
                yield
            finally:
                self.active, self.names, self._rows, self._tokens = False, [], {}, 0
                self.alike = self.refusing = False
                self._indices, self.gathered = {}, ()

    def check_idle(self) -> None:
        """Check that no routed forward of this model is running.

        Raises:
            RoutingError: one is running.
        """
        if self.active:
            raise RoutingError(
                f"this model is already running a forward pass routed to {sorted(set(self.names))}; one model runs "
                "one routed forward at a time. Wait for the first to end, or use a second copy of the model."
            )

    @contextmanager
    def packing(self, packed: PackedRows, what: str = "`adapter`") -> Iterator[None]:
        """Inside this context, the parameters of norms follow the tokens of packed rows.

        It is entered inside the caller's route, or inside one that was lent to the caller, or enters one itself.

        Args:
            packed: the rows by token.
            what: the user's term for the names, for errors.

        Yields:
            Nothing.

        Raises:
            RoutingError: another packed batch of this model is running.
        """
        if self.packed is not None:
            raise RoutingError(
                "this model is already running a batch of packed rows; one model runs one at a time. Use a second copy "
                "of the model."
            )
        with ExitStack() as stack:
            if not self.active:
                stack.enter_context(self.serving((), what=what))
            self.packed = packed
            try:
                yield
            finally:
                self.packed = None

    @contextmanager
    def expanding(self, expansions: set[int]) -> Iterator[None]:
        """Inside this context, a generation may repeat the samples.

        Args:
            expansions: the possible factors.
        """
        before = self._expansions
        self._expansions = before if self.one else expansions
        try:
            yield
        finally:
            self._expansions = before

    def size(self, lengths: Sequence[int]) -> int | None:
        """The number of samples in a batch.

        Args:
            lengths: lengths of its tensors along the first axis.

        Returns:
            The first length that fits the names; None where no length fits.
        """
        possible = {self.count * factor for factor in self._expansions}
        return next((length for length in lengths if length in possible), None)

    def rows(self, owner: str, shape: Sequence[int], label: str) -> NormRows:
        """The rows of one norm.

        Args:
            owner: name under which the stacks hold the norm's parameters.
            shape: shape of the norm's input, `(B, ..., d)`.
            label: name of the norm, for errors.

        Returns:
            Rows for all samples of the input; None in place of rows where no adapter tunes the norm.

        Raises:
            RoutingError: the batch has another length than the list of names.
        """
        if not torch.compiler.is_compiling() and (self.alike or self.refusing):
            fact = self.facts.get(label)
            alike = self.alike and shape[0] != self.count
            if alike or (fact is not None and fact.refused and self._equal(owner)):
                # It does not matter which row of the input is whose.
                rows = self._rows[1].get(owner, NormRows())
                return NormRows(*(None if values is None else values[:1] for values in rows))
        factor = self.factor(shape, label)
        if factor not in self._rows:
            self._rows[factor] = spread(self.gathered, factor)
        return self._rows[factor].get(owner, NormRows())

    def _equal(self, owner: str) -> bool:
        """Whether the rows of a norm are the same for all samples, and no gradient would tell them apart."""
        values = [each for each in self._rows[1].get(owner, NormRows()) if each is not None]
        return not any(each.requires_grad for each in values) and all(bool(each.eq(each[:1]).all()) for each in values)

    def index(self, shape: Sequence[int], label: str, device: torch.device) -> Tensor:
        """The place in `order` of each row's adapter, for layers that hold their own stacks in that order.

        Args:
            shape: shape of the layer's input, `(B, ...)`.
            label: name of the layer, for errors.
            device: device of the stacks.

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
        """Run the rows of each adapter together, for modules whose parameters are too large to have one set per row.

        Args:
            x: the input, `(B, ...)`.
            label: name of the module, for errors.
            run: `(adapter name, its rows of x) -> output`.

        Returns:
            The outputs, in the order of `x`.
        """
        factor = self.factor(x.shape, label)
        if self.one:
            return run(self.names[0], x)
        rows: dict[str, list[int]] = {}
        for row in range(x.shape[0]):
            rows.setdefault(self.names[row // factor], []).append(row)
        if len(rows) == 1:
            return run(self.names[0], x)
        outputs = [run(name, x[index]) for name, index in rows.items()]
        order = torch.tensor([row for index in rows.values() for row in index], device=x.device)
        return torch.cat(outputs)[order.argsort()]

    def factor(self, shape: Sequence[int], label: str) -> int:
        """The number of rows of an input that belong to one name.

        Args:
            shape: shape of a layer's input, `(B, ...)`.
            label: name of the layer, for errors.

        Returns:
            The number of rows; 1 where one name is for all rows.

        Raises:
            RoutingError: the batch has another length than the list of names, or it is not certain that its rows are
                those of the samples.
        """
        if self.packed is not None:
            raise RoutingError(
                f"{label} cannot be routed in packed rows: there, parameters follow tokens, which norms can do alone. "
                "Give batches with one sequence per row, padded, or adapters that tune norms only."
            )
        if self.one:
            return 1
        batch = shape[0]
        # The count, not the list, so that a graph does not depend on the names.
        # Not divmod, which Dynamo does not support where the batch's length is a symbol.
        factor, rest = (batch // self.count, batch % self.count) if self.count else (0, batch)
        several = factor not in self._expansions
        # OPT flattens samples and tokens before some norms: (B, T, d) becomes (B * T, d), sample by sample.
        tokens = {expansion * self._tokens for expansion in self._expansions} if len(shape) == 2 else set()
        # Where several axes have the length of the batch, the shape does not tell which is that of the samples.
        alike = batch > 1 and any(length == batch for length in shape[1:-1])
        if torch.compiler.is_compiling() and not (several or rest or alike or self.refusing):
            fact = None  # a graph must not depend on facts that it does not need
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
        if (several or alike) and self.mixed:  # in this order, so that a graph depends on `mixed` only if needed
            raise RoutingError(self._refusal(shape, label, _UNCLEAR))
        self._tokens = shape[1] if len(shape) == 3 and not several else self._tokens
        return factor

    def another_length(self, length: int, where: str) -> str:
        """The error message for a batch of another length than the list of names.

        Args:
            length: length of the batch.
            where: where it was found, in words.

        Returns:
            A message that begins like PEFT's.
        """
        return (
            f"Length of {self.what} should be the same as the number of inputs, but got {self.count} and {length} "
            f"respectively. (Seen {where}; where a model reorders or drops tokens before a layer, as experts do, it "
            "cannot be routed by sample.)"
        )

    def refuse_shared(self, shape: Sequence[int], label: str) -> None:
        """Refuse an input that is a parameter of the model where samples have different adapters.

        Args:
            shape: its shape.
            label: name of the layer, for errors.

        Raises:
            RoutingError: the batch is mixed.
        """
        if self.mixed:
            raise RoutingError(self._refusal(shape, label, "its input is a parameter, which all samples share"))

    def _refusal(self, shape: Sequence[int], label: str, why: str) -> str:
        return (
            f"the rows of {label} cannot be matched with {self.what}: {why}. Its input has the shape {tuple(shape)} "
            f"for {self.count} names. A batch must have its samples along the first axis, one row or one block of rows "
            "for each in the order of the names (batch_first=True; one image for each row). Otherwise run one batch "
            f"per adapter, or train adapters that leave this layer out (exclude_modules=[{label!r}])."
        )


_UNCLEAR = (
    "more than one axis of its input could be that of the samples, or samples and tokens share one, and it was not "
    "measured which (a compiled model is not measured: run one routed batch before compiling, or another length)"
)
