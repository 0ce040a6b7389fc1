"""Many adapters of one model, in stacks from which a batch gathers its rows."""

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_lntune.bank.bank_file import BLOCK, BankFile, save_bank
from peft_lntune.bank.continuous import BankAdapters
from peft_lntune.bank.heads import Heads
from peft_lntune.continuous.adapters import next_serial
from peft_lntune.core.delta import PARAMETERS
from peft_lntune.core.detour import Detour
from peft_lntune.core.module_tree import called_modules
from peft_lntune.errors import AdapterFileError, ConfigError, RoutingError, UnsupportedError
from peft_lntune.layers import switched_off, unmerged_layers
from peft_lntune.routing.base_rows import BaseRows
from peft_lntune.routing.entries import Entries
from peft_lntune.routing.route import BASE, Route
from peft_lntune.routing.rows import NormRun, check_free
from peft_lntune.routing.stacks import Stack, Stacks, as_rows
from peft_lntune.tuner.read_adapter import Adapter, AdapterReader, AdapterSource
from peft_lntune.tuner.restoring import told_by_us

__all__ = ["AdapterBank"]


class AdapterBank:
    """Thousands of LN-tuning and Fisher adapters of one model, served row by row.

    All adapters are in a few tensors, one row per adapter. A routed batch gathers its rows once, whatever the number of
    adapters in the bank or in the batch, and each norm costs one operation more than in the base model.

    Rows are copied when a route is entered, so adapters may be added and removed at any time, also by other threads.
    One routed forward runs at a time, and a route belongs to the thread that entered it.

    Args:
        model: the base model, or a PeftModel, whose own adapters are off inside a route.
        capacity: number of adapters for which there is room at first. The room doubles when it is used up, which needs
            memory for both copies; give the number of adapters if it is known.
        dtype: dtype of the rows; None: float32. `torch.bfloat16` takes half the memory and rounds each delta to 8 bits.
        device: device of the rows; None: that of each norm.

    Raises:
        ConfigError: the capacity is not a positive number, or the dtype is not floating-point.
        UnsupportedError: the model has no norm with parameters, or is a PeftModel with learned prompts.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> from peft_lntune import LNTuningConfig
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)).eval()
        >>> tuned = get_peft_model(model, LNTuningConfig(init_weights=False), adapter_name="french")
        >>> bank = AdapterBank(model)
        >>> bank.add("french", (tuned, "french"))
        >>> bank.attach()
        >>> with torch.no_grad(), bank.route(["french", "__base__"]):
        ...     model(torch.ones(2, 5, dtype=torch.long)).last_hidden_state.shape
        torch.Size([2, 5, 8])
        >>> bank.detach()
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int = 1024,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        dtype = torch.float32 if dtype is None else dtype
        if type(capacity) is not int or capacity < 1:
            raise ConfigError(f"capacity={capacity!r} should be a number of adapters, at least 1.")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype!r} is not a floating dtype of torch. Use torch.float32, or leave it out.")
        self._base: Any = _base_of(model)
        self._reader = AdapterReader(self._base)
        places = [f"{norm}.{parameter}" for norm in self._reader.norms for parameter in PARAMETERS]
        like = {name: value for name in places if (value := self._reader.parameter(name)) is not None}
        if not like:
            raise UnsupportedError("this model has no norm with a weight, so a bank has nothing to hold.")
        self._stacks = Stacks(like, capacity + 1, dtype, None if device is None else torch.device(device))
        self._stacks.write([0], as_rows(self._stacks, [{}]))
        offsets = {name: self._reader.offset(name) for name in like}
        self._base_rows = BaseRows(self._reader.parameter, offsets, self._stacks)
        self._route = Route()
        self._heads = Heads(self._reader, self._route)
        self._lock = threading.RLock()
        self._slots: dict[str, int] = {}
        self._names: dict[int, str] = {0: BASE}
        self._free: deque[int] = deque()
        self._next = 1
        self._saved: BankFile | None = None
        self._serials: dict[str, int] = {}
        self._detours: list[Detour] = []
        self._requests = BankAdapters(self)

    # Contents.

    @property
    def model(self) -> nn.Module:
        """The base model."""
        return self._base

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order they were added."""
        with self._lock:
            return list(self._slots)

    @property
    def capacity(self) -> int:
        """Number of adapters for which there is room without growing."""
        return self._stacks.rows - 1

    @property
    def row_bytes(self) -> int:
        """Bytes of memory per adapter, without heads."""
        return self._stacks.row_bytes

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "a bank cannot be copied or pickled: it belongs to one model and its threads. Write it with "
            "bank.save(path), and open the file for the other model: AdapterBank.open(path, model)."
        )

    def __repr__(self) -> str:
        return f"AdapterBank({len(self)} adapters of {type(self._base).__name__}, {self.row_bytes:,} bytes each)"

    def add(self, name: str, source: AdapterSource) -> None:
        """Add an adapter.

        Args:
            name: its name in the bank.
            source: a directory written by `save_pretrained`, or `(peft_model, adapter_name)`.

        Raises:
            ConfigError: the name is taken or not allowed, or the source is of neither kind.
            UnsupportedError: the adapter tunes other modules than norms.
            AdapterFileError: it is damaged, incomplete, of another kind, or does not fit this model. The bank is
                unchanged.
        """
        self.add_many({name: source})

    def add_many(self, sources: Mapping[str, AdapterSource]) -> None:
        """Add several adapters: all of them or, if one is refused, none.

        Args:
            sources: for each name a directory written by `save_pretrained`, or `(peft_model, adapter_name)`.

        Raises:
            ConfigError: a name is taken or not allowed, or a source is of neither kind.
            UnsupportedError: an adapter tunes other modules than norms.
            AdapterFileError: an adapter is damaged, incomplete, of another kind, or does not fit this model.
        """
        self._check_names(sources)
        names = list(sources)
        with self._lock:
            slots = self._take(len(names))
        try:
            for start in range(0, len(names), BLOCK):
                block = names[start : start + BLOCK]
                adapters = [self._reader.read(name, sources[name]) for name in block]
                rows = self._checked(block, adapters)
                with self._lock:
                    self._stacks.write(slots[start : start + BLOCK], rows)
                    self._heads.write(slots[start : start + BLOCK], adapters)
            with self._lock:
                self._check_names(sources)
                self._name(names, slots)
        except BaseException:
            with self._lock:
                self._give_back(slots)
            raise

    def remove(self, name: str) -> None:
        """Remove an adapter; its row is reused. An open route keeps the rows it has gathered.

        Args:
            name: name of the adapter.

        Raises:
            ConfigError: the adapter is not in the bank.
        """
        with self._lock:
            self._check_known([name])
            if self._saved is not None:
                self._saved.pending.pop(name, None)
            slot = self._slots.pop(name)
            del self._names[slot], self._serials[name]
            self._give_back([slot])

    def index(self, names: Sequence[str]) -> Tensor:
        """Convert names to indices, which `route` accepts in place of names; the base model is 0.

        An index stays valid until its adapter is removed; its row is then reused.

        Args:
            names: names of adapters, or `"__base__"`.

        Returns:
            The indices, `(len(names),)` int64.

        Raises:
            RoutingError: an adapter is not in the bank.
        """
        with self._lock:
            return torch.tensor(self._slots_of(names), dtype=torch.long)

    def deltas(self, name: str) -> dict[str, Tensor]:
        """The deltas of an adapter.

        Args:
            name: name of the adapter.

        Returns:
            Dense copies, by the names of the base model's parameters.

        Raises:
            ConfigError: the adapter is not in the bank.
            AdapterFileError: its rows in the file from which the bank was opened are damaged.
        """
        with self._lock:
            self._check_known([name])
            self._load([name])
            return self._stacks.read(self._slots[name])

    def heads(self, name: str) -> dict[str, dict[str, Tensor]]:
        """The heads of an adapter.

        A route cannot run heads of another shape than the model's own. For these, run the body of the model in a route,
        and each row of its output through its own head.

        Args:
            name: name of the adapter.

        Returns:
            Copies of the tensors, by the name of the head and by their names in the head, without norms, which have
            deltas.

        Raises:
            ConfigError: the adapter is not in the bank.
            AdapterFileError: its rows in the file from which the bank was opened are damaged.
        """
        with self._lock:
            self._check_known([name])
            self._load([name])
            return self._heads.read(self._slots[name])

    # Files.

    def save(self, path: str | os.PathLike) -> None:
        """Write the bank as one safetensors file, which appears complete or not at all.

        No adapter can be added, removed or routed meanwhile.

        Args:
            path: path of the file.

        Raises:
            AdapterFileError: rows in the file from which the bank was opened are damaged.
        """
        with self._lock:
            self._load(list(self._slots))
            save_bank(path, self._slots, self._stacks, self._heads)

    @classmethod
    def open(
        cls, path: str | os.PathLike, model: nn.Module, capacity: int = 1024, device: torch.device | str | None = None
    ) -> "AdapterBank":
        """Open a file written by `save`. Rows are copied from the file and checked on first use.

        Args:
            path: path of the file.
            model: the model that the bank was made for.
            capacity: number of adapters for which there is room at first; at least the number in the file is used.
            device: device of the rows; None: that of each norm.

        Returns:
            A bank with the dtype of the file.

        Raises:
            AdapterFileError: the file is damaged, truncated, not a bank, or from another model.
        """
        with told_by_us(path, lambda: True):
            saved = BankFile(path)
            bank = cls(model, max(capacity, len(saved.names)), saved.dtype, device)
            saved.check(bank._stacks, bank._reader)
            bank._check_names(saved.names)
            bank._name(saved.names, bank._take(len(saved.names)))
        bank._saved = saved
        return bank

    def load(self, names: Sequence[str] | None = None) -> None:
        """Copy adapters from the file from which the bank was opened, before their first use.

        Args:
            names: names of the adapters; None: all.

        Raises:
            AdapterFileError: the rows of an adapter are damaged. The other adapters can be used.
            ConfigError: an adapter is not in the bank.
        """
        with self._lock:
            self._check_known(self._slots if names is None else names)
            self._load(list(self._slots if names is None else names))

    # Serving.

    def attach(self) -> None:
        """Make the norms of the model follow a route. Without a route, the model computes as before.

        Every norm gets its own forward; no parameter is renamed, and hooks and the state dict stay. A copy of the model
        is not attached. A second call has no effect.

        Raises:
            UnsupportedError: another bank is attached to this model.
        """
        with self._lock:
            if self._detours:
                return
            modules = self._reader.modules
            check_free(modules[name] for name in self._reader.norms)
            for name, norm in self._reader.norms.items():
                self._put(Detour(modules[name], self._route, NormRun(modules[name], norm, self._route)))
            entries = Entries(self._base, self._route, self._watched, refused=())
            for detour in entries.detours(called_modules(self._base), self._reader.norms):
                self._put(detour)
            for detour in self._requests.detours():
                self._put(detour)
            self._heads.attach()

    def _put(self, detour: Detour) -> None:
        detour.patch()
        self._detours.append(detour)

    def _watched(self) -> dict[str, nn.Module]:
        """Modules that follow a route, by name."""
        return {name: self._reader.modules[name] for name in (*self._reader.norms, *self._heads.layers)}

    def detach(self) -> None:
        """Restore the model as it was before `attach`.

        Raises:
            RoutingError: a route is on.
        """
        with self._lock:
            self._route.check_idle()
            self._requests.check_paused("bank.detach()", anywhere=True)
            self._requests.let_go()
            self._heads.detach()
            for detour in reversed(self._detours):
                detour.restore()
            self._detours = []

    @contextmanager
    def route(self, names: Sequence[str] | str | Tensor) -> Iterator[None]:
        """Inside this context, forward passes and `generate` of the model use one adapter per row.

        The context belongs to the thread or asyncio task that enters it; meanwhile, a forward pass in another one
        raises. The first batch with several adapters runs three times on a copy, to find out where the model has the
        rows of a sample; a model that has them elsewhere than along the first axis is refused. A cache of keys and
        values (`past_key_values`) belongs to the adapter that made it; its use under another adapter is not detected.

        Args:
            names: the adapter of each row, `"__base__"` or 0 for none; or indices from `index`, `(B,)` int64; or one
                name for all rows. In `generate`, rows are repeated with their samples, for beams and return sequences.

        Yields:
            Nothing.

        Raises:
            RoutingError: the model is not attached, was changed since, is in training mode or merged, another route is
                on, or an adapter is not in the bank. Inside the context, when the model is called: the batch has
                another number of rows, packed rows, or its samples elsewhere than along the first axis.
            AdapterFileError: the rows of an adapter in the file from which the bank was opened are damaged.
        """
        with ExitStack() as stack:
            with self._lock:
                tuners = self._check_ready()
                self._requests.check_paused("bank.route")
                self._route.check_idle()
                named, slots = self._resolve(names)
                self._load(named)
                what = "the names or index given to `route`"
                one = isinstance(names, str)
                stack.enter_context(self._route.serving(named[0] if one else named, self._gather(slots), what))
                stack.enter_context(self._heads.serving(named, slots))
            stack.enter_context(switched_off(tuners))
            yield

    def _check_ready(self) -> list[Any]:
        """The tuner layers of the model, after checking that none is merged."""
        if not self._detours:
            raise RoutingError("the bank is not attached to its model. Call bank.attach() first.")
        if self._base.training:
            raise RoutingError("cannot route when the model is in training mode. Call model.eval() first.")
        modules = set(self._base.modules())
        for detour in self._detours:
            if detour.lost(modules):
                raise RoutingError(
                    f"{detour} was replaced after bank.attach(), or its forward was, so it would not follow a route. "
                    "Call bank.detach() before the model is changed and bank.attach() afterwards; where a module was "
                    "exchanged, make a new bank."
                )
        return unmerged_layers(modules, "route")

    def _gather(self, slots: Sequence[int]) -> list[Stack]:
        """Rows of the effective parameters, as copies that do not change with the stacks."""
        with torch.inference_mode(False), torch.no_grad():
            return self._base_rows.add_to(self._stacks.gather(torch.tensor(slots, dtype=torch.long)))

    # Names and slots; the caller holds the lock.

    def _check_names(self, names: Mapping[str, Any] | Sequence[str]) -> None:
        for name in names:
            if not isinstance(name, str) or not name or name == BASE:
                raise ConfigError(
                    f"an adapter cannot be named {name!r}: a name must be a non-empty string, and {BASE!r} is the base "
                    "model."
                )
            if name in self._slots:
                raise ConfigError(f"an adapter named {name!r} is in the bank. Remove it first, or choose another name.")

    def _check_known(self, names: Mapping[str, Any] | Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._slots]
        if unknown:
            raise ConfigError(f"adapter {unknown[0]!r} is not in the bank, which has {_listed(list(self._slots))}.")

    def _slots_of(self, names: Sequence[str]) -> list[int]:
        names = [BASE if name == 0 else name for name in names]
        unknown = {str(n) for n in names if not isinstance(n, str) or (n != BASE and n not in self._slots)}
        if unknown:
            raise RoutingError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. Known adapters: "
                f"{_listed([*self._slots, BASE])}."
            )
        return [0 if name == BASE else self._slots[name] for name in names]

    def _resolve(self, names: Sequence[str] | str | Tensor) -> tuple[list[str], list[int]]:
        """Names and slots of the adapters given to `route`."""
        if isinstance(names, str):
            return [names], self._slots_of([names])
        if not isinstance(names, (Tensor, Sequence)):
            raise RoutingError(
                "route takes a name for each row, one string for all rows, or indices from bank.index, but got "
                f"{names!r}. For the base model give {BASE!r}."
            )
        if not isinstance(names, Tensor):
            slots = self._slots_of(names)
            return [self._names[slot] for slot in slots], slots
        if names.dtype != torch.long or names.dim() != 1:
            raise RoutingError(
                f"an index is int64 of shape (B,), as bank.index returns it, but got {names.dtype} of shape "
                f"{tuple(names.shape)}."
            )
        slots = names.tolist()
        unknown = [slot for slot in slots if slot not in self._names]
        if unknown:
            raise RoutingError(
                f"no adapter has the number {unknown[0]}: it was removed, or the index is not one that bank.index made."
            )
        return [self._names[slot] for slot in slots], slots

    def _take(self, count: int) -> list[int]:
        """Slots for new adapters: for one a reused slot, for several consecutive ones where there is room."""
        keep = count > 1 and self._next + count <= self._stacks.rows
        reused = [] if keep else [self._free.popleft() for _ in range(min(count, len(self._free)))]
        fresh = range(self._next, self._next + count - len(reused))
        self._stacks.grow(fresh.stop)
        self._next = fresh.stop
        return [*reused, *fresh]

    def _name(self, names: Sequence[str], slots: Sequence[int]) -> None:
        self._slots.update(zip(names, slots, strict=True))
        self._names.update(zip(slots, names, strict=True))
        self._serials.update((name, next_serial()) for name in names)

    def _give_back(self, slots: Sequence[int]) -> None:
        self._heads.forget(slots)
        self._free.extend(slots)

    def _checked(self, names: Sequence[str], adapters: Sequence[Adapter]) -> list[Tensor]:
        for adapter in adapters:
            self._heads.check(adapter)
        rows = as_rows(self._stacks, [adapter.deltas for adapter in adapters])
        for block in rows:
            finite = block.flatten(1).isfinite().all(1).tolist()
            if not all(finite):
                raise AdapterFileError(
                    f"adapter {names[finite.index(False)]!r} holds values that are not finite in {block.dtype}. Its "
                    "training diverged, or the bank needs a wider dtype."
                )
        return rows

    def _load(self, names: Sequence[str]) -> None:
        """Copy those rows from the file that have not been copied yet."""
        if self._saved is None or not self._saved.pending:
            return
        for block, rows, heads in self._saved.take(names):
            slots = [self._slots[name] for name in block]
            self._stacks.write(slots, rows)
            self._heads.write(slots, heads)
            for name in block:
                del self._saved.pending[name]


def _base_of(model: nn.Module) -> nn.Module:
    if not isinstance(model, PeftModel):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise UnsupportedError(
            "this PeftModel has learned prompts, which a route cannot switch off. Give its base model."
        )
    return model.get_base_model()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:10])} and {len(names) - 10} others"
