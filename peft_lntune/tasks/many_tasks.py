"""Many adapters of one model, trained in one pass: each row of a batch uses the adapter of its task."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_lntune.core.delta import PARAMETERS
from peft_lntune.core.detour import Detour
from peft_lntune.core.module_tree import base_modules, called_modules
from peft_lntune.errors import ConfigError, DataError, RoutingError, UnsupportedError
from peft_lntune.layers import ReplacementLayer, switched_off, unmerged_layers
from peft_lntune.layers.held import deltas_in
from peft_lntune.routing.base_rows import BaseRows
from peft_lntune.routing.entries import Entries
from peft_lntune.routing.heads import HeadRun, RowGroups, group_rows, layers_of, tensors_within
from peft_lntune.routing.packed import PackedRows, unpacked
from peft_lntune.routing.recomputed import RecomputedDetour
from peft_lntune.routing.route import Route
from peft_lntune.routing.rows import NormRun, check_free
from peft_lntune.routing.stacks import Stack, unstacked
from peft_lntune.selection.losses import IGNORED, Batch, Head
from peft_lntune.selection.own_loss import find_head
from peft_lntune.tasks.losses import RowLoss, default_losses, losses_of_rows
from peft_lntune.tasks.optimizer import TaskOptimizer
from peft_lntune.tasks.parameters import TaskParameters
from peft_lntune.tuner.read_adapter import Adapter, AdapterReader, tensors_of

__all__ = ["ManyTasks"]


@dataclass(eq=False)
class _Routed:
    """One entered route: owner, values, its batches of packed rows, and whether backward has reached the values."""

    names: list[str]
    one: bool
    gathered: Sequence[Stack]
    heads: dict[str, dict[str, Tensor]]
    groups: RowGroups | None = None
    packed: list[PackedRows] = field(default_factory=list)
    finished: bool = False


class ManyTasks:
    """Adapters of a PeftModel that train at the same time, each on its rows of every batch.

    The trained values of all tasks are in a few tensors, one row per task. A routed batch gathers its rows once, and
    each norm costs one operation more than in the base model, whatever the number of tasks. Each task has the gradient
    that it would have alone, and its own optimizer, schedule, clipping and early stopping; see docs/many_tasks.md.

    `write`, `save` and `close` write the values into the adapters, which do not change until then. Inside a route the
    model's own adapters are off; outside a route the model is unchanged.

    Attributes:
        names: names of the tasks.
        norms: names of the norms that at least one task trains.

    Args:
        peft_model: a model with one adapter per task, of LNTuningConfig or FisherLNConfig, with masks set if wanted.
        adapter_names: names of the adapters to train as tasks; None: all.

    Raises:
        ConfigError: the model is not a PeftModel, or an adapter is unknown or named twice.
        RoutingError: an adapter is merged.
        UnsupportedError: an adapter is of another kind, a head cannot be split or has buffers, or a bank is attached to
            the model. Nothing has changed.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from peft_lntune import LNTuningConfig
        >>> sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
        >>> config = LNTuningConfig(task_type="SEQ_CLS")
        >>> model = get_peft_model(BertForSequenceClassification(BertConfig(**sizes)), config, adapter_name="mail")
        >>> model.add_adapter("news", config)
        >>> batch = {"input_ids": torch.ones(3, 5, dtype=torch.long), "labels": torch.tensor([0, 1, 1])}
        >>> with ManyTasks(model) as tasks:
        ...     optimizer = tasks.optimizer(torch.optim.AdamW, lr={"mail": 1e-3, "news": 5e-3})
        ...     with tasks.route(["mail", "news", "mail"]):
        ...         losses = tasks.losses(model(**batch), batch)
        ...     sum(losses.values()).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> list(losses)
        ['mail', 'news']
    """

    def __init__(self, peft_model: PeftModel, adapter_names: Sequence[str] | None = None) -> None:
        self.names = _checked_names(peft_model, adapter_names)
        self.model = peft_model
        self._base: Any = peft_model.get_base_model()
        self._reader = AdapterReader(self._base, "training many tasks")
        self._modules = self._reader.modules
        self._tuners()
        check_free(self._modules[name] for name in self._reader.norms)
        _check_untied(self._base, self.names)
        adapters = [self._reader.read(name, (peft_model, name)) for name in self.names]
        peft_model.base_model.warn_of_missing_masks(self.names)
        self._head_layers = self._layers_in(adapters)
        self._route = Route()
        self._norms = self._make_norms(adapters)
        self._heads = self._make_heads(adapters)
        self._slots = {name: slot for slot, name in enumerate(self.names)}
        self._optimizers = 0
        self._latest: _Routed | None = None
        self._recent: _Routed | None = None  # the latest route that a backward pass may reach
        self._unclear = False
        self._head: Head | None = None
        self._detours: list[Detour] = []
        self._attach()

    def _make_norms(self, adapters: Sequence[Adapter]) -> TaskParameters:
        tuned = {name for adapter in adapters for name in adapter.deltas}
        every = {norm: [f"{norm}.{parameter}" for parameter in PARAMETERS] for norm in self._reader.norms}
        self.norms = {norm for norm, names in every.items() if not tuned.isdisjoint(names)}
        names = [name for norm in every if norm in self.norms for name in every[norm]]
        self._parameters = [name for name in names if self._reader.parameter(name) is not None]
        zeros = {name: torch.zeros_like(self._reader.parameter(name)) for name in self._parameters if name in tuned}
        masks = [_tuned_in(self.model, name, each) for name, each in zip(self.names, adapters, strict=True)]
        parameters = TaskParameters(zeros, [adapter.deltas for adapter in adapters], masks)
        offsets = {name: self._reader.offset(name) for name in self._parameters}
        self._base_rows = BaseRows(self._reader.parameter, offsets, parameters.stacks)
        return parameters

    def _make_heads(self, adapters: Sequence[Adapter]) -> dict[str, TaskParameters]:
        heads = {}
        for layer, head in self._head_layers.items():
            own = [tensors_within(each.heads[head], layer, head) if head in each.heads else {} for each in adapters]
            heads[layer] = TaskParameters(tensors_of(self._modules, layer), own)
        return heads

    def _layers_in(self, adapters: Sequence[Adapter]) -> dict[str, str]:
        """The layers of all heads, with the head that contains each."""
        found: dict[str, str] = {}
        for head in dict.fromkeys(head for adapter in adapters for head in adapter.heads):
            for layer in layers_of(self._modules, self._reader.norms, head):
                buffers = [name for name, value in self._modules[layer]._buffers.items() if value is not None]
                if buffers:
                    raise UnsupportedError(
                        f"{layer} ({type(self._modules[layer]).__name__}) is in a head and has the buffer "
                        f"{buffers[0]}, which all tasks would share. Train these adapters alone."
                    )
                if found.setdefault(layer, head) != head:
                    raise UnsupportedError(f"{found[layer]} and {head} are heads of adapters, one inside the other.")
        return found

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ManyTasks({len(self)} tasks on {type(self._base).__name__}, {self.entries:,} entries each at most)"

    @property
    def entries(self) -> int:
        """Number of entries per task in all stacks; each has a value, a gradient and optimizer state."""
        return sum(values[0].numel() for each in self._all() for _, values in each.stacks)

    # Routing.

    def index(self, names: Sequence[str]) -> Tensor:
        """Convert names of tasks to indices, which `route` accepts in place of names.

        Args:
            names: names of tasks.

        Returns:
            The indices, `(len(names),)` int64.

        Raises:
            RoutingError: a task is unknown.
        """
        return torch.tensor(self._slots_of(names), dtype=torch.long)

    @contextmanager
    def route(self, names: Sequence[str] | str | Tensor) -> Iterator[None]:
        """Inside this context, forward passes and `generate` of the model use the adapter of each row's task.

        Args:
            names: the task of each row, or of each sequence in packed rows; or indices from `index`, `(B,)` int64; or
                one name for all rows.

        Yields:
            Nothing.

        Raises:
            RoutingError: a task is unknown, the tasks are closed, an adapter is merged, or another route is on. Inside
                the context, at the first norm: the batch has another number of rows.
        """
        tuners = self._tuners()
        if not self._detours:
            raise RoutingError("these tasks were closed, and their values are in the adapters. Make a new ManyTasks.")
        self._route.check_idle()
        routed = self._take(names)
        self._latest = routed
        if torch.is_grad_enabled():
            self._begin(routed)
        with self._on(routed, tuners):
            yield

    @contextmanager
    def _on(self, routed: _Routed, tuners: Sequence[Any]) -> Iterator[None]:
        with ExitStack() as stack:
            names = routed.names[0] if routed.one else routed.names
            stack.enter_context(self._route.serving(names, routed.gathered, "the names given to `route`"))
            stack.enter_context(switched_off(tuners))
            for layer, run in self._runs.items():
                run.rows, run.groups = routed.heads[layer], routed.groups
            try:
                yield
            finally:
                for run in self._runs.values():
                    run.rows, run.groups = {}, None

    def _take(self, names: Sequence[str] | str | Tensor) -> _Routed:
        one = isinstance(names, str)
        slots = self._slots_of([names] if isinstance(names, str) else names)
        index = torch.tensor(slots, dtype=torch.long)
        self._follow()
        routed = _Routed([self.names[slot] for slot in slots], one, [], {})
        finish = partial(setattr, routed, "finished", True)
        rows = self._base_rows.add_to(self._norms.gather(slots, index, finish))
        routed.gathered = [*rows, *self._base_rows.others()]
        if not one:  # the rows of a task share the parameters of a head, which are large
            routed.groups = group_rows(slots)
            slots, index = routed.groups.owners, torch.tensor(routed.groups.owners)
        for layer, parameters in self._heads.items():
            routed.heads[layer] = unstacked(parameters.gather(slots, index, finish))
        return routed

    def _follow(self) -> None:
        """Move to the present device of the model."""
        moved = self._norms.follow({name: self._reader.parameter(name) for name in self._parameters})
        for layer, parameters in self._heads.items():
            moved |= parameters.follow(tensors_of(self._modules, layer))
        if moved and self._optimizers:
            raise RoutingError("the model was moved to another device after tasks.optimizer(...). Move it before.")

    def _slots_of(self, names: Sequence[str] | Tensor) -> list[int]:
        if isinstance(names, Tensor):
            if names.dtype != torch.long or names.dim() != 1:
                raise RoutingError(
                    f"an index is int64 of shape (B,), as tasks.index returns it, but got {names.dtype} of shape "
                    f"{tuple(names.shape)}."
                )
            slots: list[int] = names.tolist()
            unknown: list[Any] = [slot for slot in slots if not 0 <= slot < len(self.names)]
        else:
            unknown = [name for name in names if name not in self._slots]
            slots = [] if unknown else [self._slots[name] for name in names]
        if unknown:
            raise RoutingError(f"no task {unknown[0]!r}; there are {', '.join(self.names)}.")
        if not slots:
            raise RoutingError("no names: give the task of each row of the batch.")
        return slots

    # Recomputation in the backward pass.

    def _begin(self, routed: _Routed | None) -> None:
        self._unclear = self._recent is not None and not self._recent.finished
        self._recent = routed

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Inside this context, the route of a recomputed layer is on."""
        if self._unclear:
            raise RoutingError(
                "a layer is computed again in a backward pass (gradient checkpointing), and there were several forward "
                "passes before it, so the tasks of its rows are unknown. Call backward after each of them."
            )
        if self._recent is None or self._route.active:
            with self._route.lent(), self._packed_again():
                yield
            return
        with self._on(self._recent, self._tuners()), self._packed_again():
            yield

    def _packed_again(self) -> AbstractContextManager[None]:
        """A context in which a recomputed layer of packed rows has its rows by token."""
        if self._recent is None or not self._recent.packed or self._route.packed is not None:
            return nullcontext()
        if len(self._recent.packed) > 1:
            raise RoutingError(
                "a layer is computed again in a backward pass (gradient checkpointing), and several batches of packed "
                "rows ran in its route. Enter a route for each batch, and call backward after each."
            )
        return self._route.packing(self._recent.packed[0])

    def _note_packed(self, packed: PackedRows) -> None:
        if self._latest is not None:
            self._latest.packed.append(packed)

    # Training.

    def losses(self, outputs: Any, batch: Batch, loss: RowLoss | None = None) -> dict[str, Tensor]:
        """The loss of each task with rows in the batch of the latest route, equal to that of its rows alone.

        In packed rows, those are its sequences, each as a row of its own: no token predicts one of another sequence.

        Args:
            outputs: outputs of the model, called inside the route.
            batch: arguments of this call, with labels.
            loss: `(outputs, batch) -> scalar`, called once per task with its rows of the tensors in both; None: the
                loss that the model itself reports, which the first outputs must include.

        Returns:
            Scalars by task, in the order of their first rows; 0 where no token of a task counts. Call `backward` on
            their sum.

        Raises:
            RoutingError: there was no route yet.
            DataError: the batch has no labels or another number of rows, or the model's own loss is not finite.
            UnsupportedError: the model's own loss is not a known one. Pass `loss`.
        """
        if self._latest is None:
            raise RoutingError("losses are those of a routed batch. Call the model inside tasks.route(names) first.")
        order = {name: number for number, name in enumerate(dict.fromkeys(self._latest.names))}
        groups = [order[name] for name in self._latest.names]
        head = self._head
        if loss is None and head is None:  # told from packed rows as the model saw them
            head, settled = find_head(self._base, outputs, batch)
            self._head = head if settled else None
        if self._latest.packed:
            outputs, batch = self._unpacked(outputs, batch, self._latest.packed[-1])
        if loss is not None:
            return losses_of_rows(loss, outputs, batch, order, groups, self._latest.one)
        assert head is not None
        values = default_losses(head, outputs, batch, groups, self._latest.one)
        return dict(zip(order, values, strict=True))

    def _unpacked(self, outputs: Any, batch: Batch, packed: PackedRows) -> tuple[dict[str, Any], Batch]:
        """Outputs and batch with a padded row per sequence of packed rows."""
        sequences = packed.index
        assert sequences is not None
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.shape != sequences.shape:
            raise DataError(
                f"labels of packed rows should be {tuple(sequences.shape)}, one per token, but got "
                f"{tuple(labels.shape)}."
            )
        rows = unpacked(batch, sequences, {"labels": IGNORED})
        rows["attention_mask"] = unpacked(torch.ones_like(sequences), sequences, {})
        return unpacked(dict(outputs), sequences, {}), rows

    def optimizer(
        self,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        max_grad_norm: float | Mapping[str, float | None] | None = None,
        schedule: Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]] | None = None,
        decayed: Callable[[str], bool] | None = None,
        head_lr: float | Mapping[str, float] | None = None,
        **options: Any,
    ) -> TaskOptimizer:
        """Create one optimizer per task.

        Args:
            optimizer_class: a torch optimizer class, or one with the same interface, called with the task's tensors and
                the options.
            max_grad_norm: largest norm of a task's gradient, or a dict of one per task; None: no limit.
            schedule: function from a task's optimizer to its learning-rate schedule, or a dict of one per task. The
                schedule steps with its task.
            decayed: whether a tensor of the base model, given by name, has weight decay; None: all have. Tensors of one
                shape, in the norms or in a layer of a head, share the setting: if one has no weight decay, none has.
            head_lr: learning rate of the heads, or a dict of one per task; None: that of the norms.
            **options: options of the class, such as `lr`; a dict by task as a value gives each task its own.

        Returns:
            The optimizer of all tasks.

        Raises:
            ConfigError: a dict lacks a task or names an unknown one.
            RoutingError: the model was moved to another device after an earlier call.
        """
        self._follow()
        self._optimizers += 1
        groups = [("", self._norms), *((f"{layer}.", parameters) for layer, parameters in self._heads.items())]
        free = {
            (group, number)
            for group, (prefix, parameters) in enumerate(groups)
            for number, (names, _) in enumerate(parameters.stacks)
            if decayed is not None and not all(decayed(prefix + name) for name in names)
        }
        made = TaskOptimizer(self._all(), self.names, optimizer_class, max_grad_norm, options, free, head_lr)
        made.set_schedule(schedule)
        return made

    # Saving.

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the trained values, deltas and heads, by task and by the names of the base model's tensors."""
        return {name: self._read(slot) for slot, name in enumerate(self.names)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore trained values bit for bit.

        Args:
            state: a result of `state_dict`.

        Raises:
            ConfigError: the state is of other tasks or other tensors. Nothing has changed.
        """
        for slot, name in enumerate(self.names):
            own = {key: value.shape for key, value in self._read(slot).items()}
            if own != {key: value.shape for key, value in state.get(name, {}).items()}:
                raise ConfigError(
                    f"the state does not fit task {name!r}: it has {', '.join(state)}, with other tensors."
                )
        for slot, name in enumerate(self.names):
            self._norms.write(slot, state[name])
            for layer, parameters in self._heads.items():
                parameters.write(slot, tensors_within(state[name], layer, ""))

    def _read(self, slot: int) -> dict[str, Tensor]:
        found = self._norms.read(slot)
        for layer, parameters in self._heads.items():
            found |= {f"{layer}.{key}": value for key, value in parameters.read(slot).items()}
        return found

    def write(self) -> None:
        """Write the values into the adapters of the model."""
        for slot, name in enumerate(self.names):
            heads: dict[str, dict[str, Tensor]] = {}
            for layer, head in self._head_layers.items():
                prefix = f"{layer}.".removeprefix(f"{head}.")
                own = {prefix + key: value for key, value in self._heads[layer].read(slot).items()}
                if own:
                    heads.setdefault(head, {}).update(own)
            _write_adapter(self._reader, self.model, name, Adapter(self._norms.read(slot), heads))

    def save(self, directory: str | os.PathLike) -> None:
        """Write the values into the adapters, and save each with `save_pretrained` in `directory/<task>`.

        Args:
            directory: the parent directory of all tasks.
        """
        self.write()
        for name in self.names:
            # PEFT saves each adapter in a folder of its name, except the adapter "default".
            folder = Path(directory, name) if name == "default" else Path(directory)
            self.model.save_pretrained(str(folder), selected_adapters=[name])

    def close(self) -> None:
        """Write the values into the adapters, and otherwise restore the model. A second call has no effect.

        Raises:
            RoutingError: a route is on.
        """
        if not self._detours:
            return
        self._route.check_idle()
        self.write()
        for detour in reversed(self._detours):
            detour.restore()
        self._detours, self._latest, self._recent = [], None, None

    def __enter__(self) -> "ManyTasks":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # The model.

    def _all(self) -> list[TaskParameters]:
        return [self._norms, *self._heads.values()]

    def _tuners(self) -> list[Any]:
        return unmerged_layers(self._base.modules(), "train")

    def _attach(self) -> None:
        route, modules, norms = self._route, self._modules, self._reader.norms
        runs: dict[str, Any] = {
            name: NormRun(modules[name], norm, route) for name, norm in norms.items() if name in self.norms
        }
        self._runs = {layer: HeadRun(modules[layer], layer, route) for layer in self._heads}
        runs |= self._runs
        called = called_modules(self._base)
        tuners = {name for name, module in called.items() if isinstance(module, BaseTunerLayer)}
        detours: list[Detour] = [RecomputedDetour(modules[name], route, run, self._again) for name, run in runs.items()]
        for name in _above(called, {*runs, *tuners}):
            if not (name in runs and called[name] is modules[name]):
                detours.append(RecomputedDetour(called[name], route, None, self._again))
        detours.append(RecomputedDetour(self._base, route, None, self._again, partial(self._begin, None)))
        for detour in detours:
            detour.patch()
        entries = Entries(
            self._base, route, lambda: {name: modules[name] for name in runs}, on_packed=self._note_packed
        )
        for detour in entries.detours(called, runs):
            detour.patch()
            detours.append(detour)
        self._detours = detours


def _check_untied(base: nn.Module, names: Sequence[str]) -> None:
    layers = [module for module in base.modules() if isinstance(module, ReplacementLayer)]
    for layer in layers:
        for parameter in PARAMETERS:
            if any(layer.tied_to(parameter, name) for name in names):
                raise UnsupportedError(
                    f"{' and '.join(layer.names_of(parameter))} are one parameter, but here each module has its own "
                    "row. Train these adapters one by one, or leave out the norms that share (exclude_modules)."
                )


def _checked_names(peft_model: PeftModel, adapter_names: Sequence[str] | None) -> list[str]:
    if not isinstance(peft_model, PeftModel):
        raise ConfigError(f"many tasks are adapters of a PeftModel, but got {type(peft_model).__name__}.")
    known = list(peft_model.peft_config)
    names = known if adapter_names is None else list(adapter_names)
    unknown = [name for name in names if name not in known]
    twice = sorted({name for name in names if names.count(name) > 1})
    if unknown or not names:
        raise ConfigError(f"adapters {unknown or names} not found; this model has {known}. Call add_adapter first.")
    if twice:
        raise ConfigError(f"each task has an adapter of its own, but {twice[0]!r} is named twice.")
    return names


def _tuned_in(peft_model: PeftModel, name: str, adapter: Adapter) -> dict[str, Tensor]:
    """Bool masks by the base parameter's name, True for entries that an adapter trains; in a head all of them."""
    deltas = deltas_in(called_modules(peft_model.get_base_model()), name)
    return {
        key: deltas[key].tuned().cpu() if key in deltas else torch.ones_like(value, dtype=torch.bool, device="cpu")
        for key, value in adapter.deltas.items()
    }


@torch.no_grad()
def _write_adapter(reader: AdapterReader, peft_model: PeftModel, name: str, adapter: Adapter) -> None:
    """Write values into an adapter of a model: the inverse of `AdapterReader.read(name, (peft_model, name))`."""
    called = called_modules(peft_model.get_base_model())
    deltas = deltas_in(called, name)
    for key, delta in deltas.items():
        delta.fill(adapter.deltas[key].to(delta.weight.device))
    for head, tensors in adapter.heads.items():
        wrapper = called[head]
        assert isinstance(wrapper, ModulesToSaveWrapper)
        for key, place in tensors_of(base_modules(wrapper.modules_to_save[name])).items():
            its_place = reader.place(f"{head}.{key}")
            norm = adapter.deltas.get(its_place)
            value = tensors[key] if norm is None else norm + reader.parameter(its_place).to(norm)
            place.copy_(value)


def _above(modules: Mapping[str, nn.Module], places: set[str]) -> Iterator[str]:
    """The names of these modules and of all modules that contain one of them, except the model itself."""
    for name in modules:
        if name and any(f"{place}.".startswith(f"{name}.") for place in places):
            yield name
