"""The adapters of a bank for transformers' continuous batching: each request names one."""

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_lntune.continuous.adapters import BASE_SERIAL, RequestAdapter
from peft_lntune.core.detour import Detour
from peft_lntune.errors import RoutingError, UnsupportedError
from peft_lntune.layers import switched_off
from peft_lntune.routing.packed import PackedRows
from peft_lntune.routing.stacks import BASE, Stack
from peft_lntune.routing.tokens import TokenFact, measure_causal

if TYPE_CHECKING:
    from peft_lntune.bank.adapter_bank import AdapterBank

__all__ = ["BankAdapters"]


class BankAdapters:
    """Gives requests of continuous batching the adapters of a bank; see `peft_lntune.continuous.adapters.Adapters`.

    Args:
        bank: the bank.
    """

    def __init__(self, bank: "AdapterBank") -> None:
        self.owner: object = bank
        self._bank = bank
        self._taken: weakref.WeakValueDictionary[int, RequestAdapter] = weakref.WeakValueDictionary()
        self._facts: tuple[object, Mapping[str, TokenFact] | None] = None, None
        self._as_before_in: set[int] = set()
        self._manager: weakref.ReferenceType[Any] | None = None

    def detours(self) -> list[Detour]:
        """Detours of the model's methods for continuous batching, always taken while the bank is attached."""
        from peft_lntune.continuous.manager import ALWAYS  # its import takes long, and few need it

        model = self._bank._base
        found = {"init_continuous_batching": self._init, "generate_batch": self._generate}
        return [
            Detour(model, ALWAYS, run, method)
            for method, run in found.items()
            if callable(getattr(model, method, None))
        ]

    def _init(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        from peft_lntune.continuous.manager import make_manager

        if threading.get_ident() in self._as_before_in:
            return own(*args, **kwargs)
        if self._bank._route.on():
            raise RoutingError(
                "a manager of continuous batching outlives a route. Make it outside of the route, and name the adapter "
                "of each request: manager.add_request(ids, adapter=name); or call generate_batch in the route."
            )
        self._bank._check_ready()
        return make_manager(own, self, *args, **kwargs)

    def _generate(self, own: Any, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        from peft_lntune.continuous.manager import generate_batch

        route = self._bank._route
        if not route.on():
            if adapter_names is None:
                return self._as_before(own, *args, **kwargs)
            return generate_batch(self._bank._base, own, self, adapter_names, "`adapter_names`", *args, **kwargs)
        if adapter_names is not None:
            raise RoutingError(
                f"a route is on, and generate_batch got `adapter_names` beside {route.what}. Give the names once: "
                "leave the route, or leave `adapter_names` out."
            )
        names = route.names[0] if route.one else route.names
        return generate_batch(self._bank._base, own, self, names, route.what, *args, **kwargs)

    def _as_before(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        """`generate_batch` without a route: what it was without the bank."""
        kept = self._kept()
        if kept is not None and self._bank._check_ready():
            raise RoutingError(
                "the model keeps a manager of continuous batching (persistent_manager=True) of this bank, which serves "
                "the base model and not the active adapter of the PeftModel. Call generate_batch in a route, or "
                "model.destroy_cached_continuous_batching_manager() first."
            )

        here = threading.get_ident()
        self._as_before_in.add(here)
        try:
            return own(*args, **kwargs)
        finally:
            self._as_before_in.discard(here)

    def _kept(self) -> Any:
        """The manager of this bank that the model keeps, or None."""
        kept = getattr(self._bank._base, "_cached_continuous_batching_manager", None)
        return kept if getattr(getattr(kept, "adapters", None), "owner", None) is self._bank else None

    def let_go(self) -> None:
        """Destroy the manager of this bank that the model keeps, if there is one."""
        if self._kept() is not None:
            self._bank._base.destroy_cached_continuous_batching_manager()

    def check_paused(self, what: str, anywhere: bool = False) -> None:
        """Check that no engine runs the model, or that the caller's thread has paused it.

        Args:
            what: what is refused otherwise, for the error.
            anywhere: refuse it also while the engine is paused.

        Raises:
            RoutingError: an engine runs.
        """
        manager = None if self._manager is None else self._manager()
        if manager is not None and manager.is_running() and (anywhere or manager.is_held_here):
            instead = "Stop the manager first." if anywhere else "Call it inside `with manager.pause():`."
            raise RoutingError(f"{what} cannot run while an engine of continuous batching runs this model. {instead}")

    # `Adapters`.

    def take(self, names: Iterable[str | None]) -> dict[str | None, RequestAdapter]:
        with self._bank._lock:
            self._bank._check_ready()  # looks at every module, so once for all names
            return {name: self._take(BASE if name is None else name) for name in names}

    def _take(self, name: str) -> RequestAdapter:
        bank = self._bank
        [slot] = bank._slots_of([name])
        serial = BASE_SERIAL if slot == 0 else bank._serials[name]
        taken = self._taken.get(serial)
        if taken is not None:
            return taken
        bank._load([] if slot == 0 else [name])
        if bank._heads.held.get(slot):
            raise UnsupportedError(
                f"adapter {name!r} has a head of its own ({', '.join(bank._heads.held[slot])}), and continuous "
                "batching runs norms by token, not heads. Use generate in a route."
            )
        rows = [values[0] for _, values in bank._stacks.gather(torch.tensor([slot]))]
        taken = self._taken[serial] = RequestAdapter(name, serial, rows)
        return taken

    def as_it_is(self, requests: Sequence[RequestAdapter]) -> bool:
        # On a PeftModel, PEFT's own adapters must be off; in a route of another thread, the route must be lent.
        plain = all(each.serial == BASE_SERIAL for each in requests) and not self._bank._route.active
        return plain and not self._bank._check_ready()

    def facts(self) -> Mapping[str, TokenFact] | None:
        bank = self._bank
        watched = bank._watched()
        key = frozenset((name, id(module)) for name, module in watched.items())
        if self._facts[0] != key:
            self._facts = key, measure_causal(bank._base, watched)
        return self._facts[1]

    def gathered(self, rows: Sequence[Sequence[Tensor]]) -> list[Stack]:
        with torch.inference_mode(False), torch.no_grad():
            stacks = [
                Stack(stack.names, torch.stack(values))
                for stack, values in zip(self._bank._stacks, zip(*rows, strict=True), strict=True)
            ]
            return self._bank._base_rows.add_to(stacks)

    @contextmanager
    def routed(self, packed: PackedRows) -> Iterator[None]:
        bank = self._bank
        with ExitStack() as stack:
            tuners = bank._check_ready()
            stack.enter_context(bank._route.lent())  # a caller of generate_batch in a route waits in another thread
            stack.enter_context(bank._route.packing(packed))
            stack.enter_context(switched_off(tuners))
            yield

    def check_start(self, manager: Any) -> None:
        running = None if self._manager is None else self._manager()
        if running is not None and running is not manager and running.is_running():
            raise RoutingError(
                "an engine of continuous batching runs this model already. Add the requests to its manager, or stop it."
            )
        self._manager = weakref.ref(manager)
