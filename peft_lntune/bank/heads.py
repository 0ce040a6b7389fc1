"""Heads of the adapters in a bank, stacked layer by layer; `routing/heads.py` runs them row by row."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from peft_lntune.core.detour import Detour
from peft_lntune.errors import UnsupportedError
from peft_lntune.routing.heads import HeadRun, layers_of, tensors_within
from peft_lntune.routing.route import Route
from peft_lntune.routing.stacks import Stacks, as_rows
from peft_lntune.tuner.read_adapter import Adapter, Sources, tensors_of

__all__ = ["Heads"]


class Heads:
    """The heads of all adapters, by slot. Not for two threads at once; the bank has a lock.

    Args:
        sources: of the model.
        route: shared with the norms.
    """

    def __init__(self, sources: Sources, route: Route) -> None:
        self._sources, self._route = sources, route
        self.layers: dict[str, Stacks] = {}
        self.owners: dict[str, set[int]] = {}
        """For each layer the slots that have parameters of their own for it; the others use row 0, the base model's."""
        self.held: dict[int, dict[str, Mapping[str, Tensor] | None]] = {}
        """For each slot its heads, with their tensors where they are of another shape and so in no stack."""
        self._runs: dict[str, HeadRun] = {}
        self._detours: dict[str, Detour] = {}
        self._attached = False

    def check(self, adapter: Adapter) -> None:
        """Raise an `UnsupportedError` where a head cannot be taken apart."""
        for head in adapter.heads:
            self._layers_of(head)

    def write(self, slots: Sequence[int], adapters: Sequence[Adapter]) -> None:
        """Take in the heads of adapters."""
        for slot, adapter in zip(slots, adapters, strict=True):
            for head, tensors in adapter.heads.items():
                fits = self._shapes(head) == {name: tensor.shape for name, tensor in tensors.items()}
                self.held.setdefault(slot, {})[head] = None if fits else tensors
                for layer in self._layers_of(head):
                    self._make(layer, slot + 1)
                    if fits:
                        own = tensors_within(tensors, layer, head)
                        self.layers[layer].write([slot], as_rows(self.layers[layer], [own]))
                        self.owners[layer].add(slot)

    def read(self, slot: int) -> dict[str, dict[str, Tensor]]:
        """Copies of the heads in a slot."""
        found: dict[str, dict[str, Tensor]] = {}
        for head, tensors in self.held.get(slot, {}).items():
            if tensors is not None:
                found[head] = {name: tensor.clone() for name, tensor in tensors.items()}
                continue
            prefixes = {layer: f"{layer}.".removeprefix(f"{head}.") for layer in self._layers_of(head)}
            found[head] = {
                prefix + name: tensor
                for layer, prefix in prefixes.items()
                for name, tensor in self.layers[layer].read(slot).items()
            }
        return found

    def forget(self, slots: Sequence[int]) -> None:
        """Slots that are free again have no heads, and a layer that nobody has is as it was."""
        for slot in slots:
            self.held.pop(slot, None)
            for owners in self.owners.values():
                owners.discard(slot)
        self._clear()

    def _clear(self) -> None:
        """Take the detours away from layers of which no slot has a head; while a route is on they are in use."""
        if self._route.active:
            return
        used = {layer for heads in self.held.values() for head in heads for layer in self._layers_of(head)}
        for layer in self.layers.keys() - used:
            if layer in self._detours:
                self._detours.pop(layer).restore()
            del self.layers[layer], self.owners[layer], self._runs[layer]

    def attach(self) -> None:
        """Let the layers follow the route, those there are and those to come."""
        self._attached = True
        for layer in self.layers:
            self._put(layer)

    def detach(self) -> None:
        """Leave the layers as they were."""
        self._attached = False
        for detour in self._detours.values():
            detour.restore()
        self._detours = {}

    @contextmanager
    def serving(self, names: Sequence[str], slots: Sequence[int]) -> Iterator[None]:
        """Inside this context the layers have the rows of these slots; they are gathered on entering."""
        for layer, run in self._runs.items():
            run.rows = self._gather(layer, slots)
        try:
            self._refuse(names, slots)
            yield
        finally:
            for run in self._runs.values():
                run.rows, run.refused = {}, ""

    def _refuse(self, names: Sequence[str], slots: Sequence[int]) -> None:
        for name, slot in zip(names, slots, strict=True):
            for head, tensors in self.held.get(slot, {}).items():
                if tensors is None:
                    continue
                own = self._shapes(head)
                other = next(key for key in (*tensors, *own) if tensors.get(key, _NONE).shape != own.get(key))
                message = (
                    f"adapter {name!r} has a {head} of another shape than this model: {other} is "
                    f"{tuple(tensors.get(other, _NONE).shape)} there and {tuple(own.get(other, ()))} here, so its rows "
                    "cannot be answered together with others. Inside the route call the body of the model alone, "
                    "such as model.base_model(**batch), which gives features row by row, and run each row through its "
                    f"own head, of which bank.heads({name!r}) has the tensors."
                )
                for layer in self._layers_of(head):
                    self._runs[layer].refused = self._runs[layer].refused or message

    def _gather(self, layer: str, slots: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of a layer for each row, also where all are the base model's: a compiled graph stays the same."""
        stacks, owners = self.layers[layer], self.owners[layer]
        rows = [slot if slot in owners else 0 for slot in slots]
        own = tensors_of(self._sources.modules, layer)
        with torch.inference_mode(False), torch.no_grad():
            if 0 in rows:  # read anew each time, as the base's norms are: what was trained tells nothing
                stacks.write([0], [torch.stack([own[name] for name in names])[None] for names, _ in stacks])
            gathered = stacks.gather(torch.tensor(rows, dtype=torch.long))
        return {
            # The model may have been moved or cast since the head was added.
            name: values.to(own[name].device, own[name].dtype)
            for names, block in gathered
            for name, values in zip(names, block.unbind(1), strict=True)
        }

    def _make(self, layer: str, rows: int) -> None:
        if layer in self.layers:
            self.layers[layer].grow(rows)
            return
        nested = [
            other for other in self.layers if f"{other}.".startswith(f"{layer}.") or layer.startswith(f"{other}.")
        ]
        if nested:
            raise UnsupportedError(f"{layer} and {nested[0]} are heads of adapters in one bank, one inside the other.")
        self.layers[layer] = Stacks(tensors_of(self._sources.modules, layer), max(rows, 2))
        self.owners[layer] = set()
        self._runs[layer] = HeadRun(self._sources.modules[layer], layer, self._route)
        if self._attached:
            self._put(layer)

    def _put(self, layer: str) -> None:
        self._detours[layer] = Detour(self._sources.modules[layer], self._route, self._runs[layer])
        self._detours[layer].patch()

    def _layers_of(self, head: str) -> list[str]:
        return layers_of(self._sources.modules, self._sources.norms, head)

    def _shapes(self, head: str) -> dict[str, torch.Size]:
        """The shapes of the model's own head, norms aside."""
        modules = self._sources.modules
        return {
            f"{layer}.{name}".removeprefix(f"{head}."): tensor.shape
            for layer in self._layers_of(head)
            for name, tensor in tensors_of(modules, layer).items()
        }


_NONE = torch.empty(0)
