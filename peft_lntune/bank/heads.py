"""Heads of the adapters in a bank, stacked per layer; `routing/heads.py` runs them row by row."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_lntune.core.detour import Detour
from peft_lntune.errors import UnsupportedError
from peft_lntune.routing.heads import HeadRun, layers_of, tensors_within
from peft_lntune.routing.route import Route
from peft_lntune.routing.stacks import Stacks, as_rows, unstacked
from peft_lntune.tuner.read_adapter import Adapter, AdapterReader, tensors_of

__all__ = ["Heads"]


@dataclass(eq=False)
class _Layer:
    """A layer of a head: the parameters of all adapters for it, and its replacement.

    Attributes:
        stacks: rows by slot; row 0 is the base model's.
        owners: slots with their own parameters; other slots use row 0.
        run: runs the layer with one set of parameters per row.
        detour: while the bank is attached, the detour from the layer to `run`.
    """

    stacks: Stacks
    run: HeadRun
    owners: set[int] = field(default_factory=set)
    detour: Detour | None = None

    def patch(self) -> None:
        self.detour = Detour(self.run.call.head, self.run.route, self.run)
        self.detour.patch()

    def restore(self) -> None:
        if self.detour is not None:
            self.detour.restore()
        self.detour = None


class Heads:
    """The heads of all adapters, by slot. Not for two threads at once; the bank has a lock.

    Attributes:
        layers: layers of all heads, by name.

    Args:
        reader: reader for the model.
        route: the route, shared with the norms.
    """

    def __init__(self, reader: AdapterReader, route: Route) -> None:
        self._reader, self._route = reader, route
        self.layers: dict[str, _Layer] = {}
        self.held: dict[int, dict[str, Mapping[str, Tensor] | None]] = {}
        """For each slot its heads: None where they are in stacks, their tensors where their shape differs."""
        self._attached = False

    def check(self, adapter: Adapter) -> None:
        """Check that the heads of an adapter can be split into layers.

        Args:
            adapter: the adapter.

        Raises:
            UnsupportedError: a head has parameters of its own beside a norm in it.
        """
        for head in adapter.heads:
            self._layers_of(head)

    def write(self, slots: Sequence[int], adapters: Sequence[Adapter]) -> None:
        """Store the heads of adapters.

        Args:
            slots: one per adapter.
            adapters: the adapters, after `check`.

        Raises:
            UnsupportedError: one head is inside another.
        """
        for slot, adapter in zip(slots, adapters, strict=True):
            for head, tensors in adapter.heads.items():
                fits = self._shapes(head) == {name: tensor.shape for name, tensor in tensors.items()}
                self.held.setdefault(slot, {})[head] = None if fits else tensors
                for name in self._layers_of(head):
                    layer = self._layer(name)
                    layer.stacks.grow(slot + 1)
                    if fits:
                        layer.stacks.write([slot], as_rows(layer.stacks, [tensors_within(tensors, name, head)]))
                        layer.owners.add(slot)

    def read(self, slot: int) -> dict[str, dict[str, Tensor]]:
        """Copy the heads in a slot.

        Args:
            slot: slot of an adapter.

        Returns:
            The tensors of each head, by their names in the head.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for head, tensors in self.held.get(slot, {}).items():
            if tensors is not None:
                found[head] = {name: tensor.clone() for name, tensor in tensors.items()}
                continue
            prefixes = {layer: f"{layer}.".removeprefix(f"{head}.") for layer in self._layers_of(head)}
            found[head] = {
                prefix + name: tensor
                for layer, prefix in prefixes.items()
                for name, tensor in self.layers[layer].stacks.read(slot).items()
            }
        return found

    def forget(self, slots: Sequence[int]) -> None:
        """Remove the heads of slots, and restore the layers that no head uses any more.

        Args:
            slots: the freed slots.
        """
        for slot in slots:
            self.held.pop(slot, None)
            for layer in self.layers.values():
                layer.owners.discard(slot)
        if self._route.active:  # the detours are in use
            return
        heads = {head for heads in self.held.values() for head in heads}  # few, of any number of adapters
        used = {name for head in heads for name in self._layers_of(head)}
        for name in self.layers.keys() - used:
            self.layers.pop(name).restore()

    def attach(self) -> None:
        """Make the layers follow the route, also layers added later."""
        self._attached = True
        for layer in self.layers.values():
            layer.patch()

    def detach(self) -> None:
        """Restore the layers."""
        self._attached = False
        for layer in self.layers.values():
            layer.restore()

    @contextmanager
    def serving(self, names: Sequence[str], slots: Sequence[int]) -> Iterator[None]:
        """Inside this context, the layers have the rows of a batch, which are gathered on entry.

        Args:
            names: the adapter of each row, for errors.
            slots: the slot of each row.

        Yields:
            Nothing.
        """
        layers = dict(self.layers)
        for name, layer in layers.items():
            layer.run.rows = self._gather(name, slots)
        try:
            self._refuse(names, slots)
            yield
        finally:
            for layer in layers.values():
                layer.run.rows, layer.run.refused = {}, ""

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
                    self.layers[layer].run.refused = self.layers[layer].run.refused or message

    def _gather(self, name: str, slots: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of a layer for each row, even if all are the base model's, so that compiled graphs stay valid."""
        stacks, owners = self.layers[name].stacks, self.layers[name].owners
        rows = [slot if slot in owners else 0 for slot in slots]
        own = tensors_of(self._reader.modules, name)
        with torch.inference_mode(False), torch.no_grad():
            if 0 in rows:  # read again each time, since training leaves no trace
                stacks.write([0], [torch.stack([own[key] for key in names])[None] for names, _ in stacks])
            gathered = stacks.gather(torch.tensor(rows, dtype=torch.long))
        # The model may have been moved or cast since the head was added.
        return {key: rows.to(own[key].device, own[key].dtype) for key, rows in unstacked(gathered).items()}

    def _layer(self, name: str) -> _Layer:
        """The layer of this name, created on first use."""
        if name in self.layers:
            return self.layers[name]
        nested = [other for other in self.layers if f"{other}.".startswith(f"{name}.") or name.startswith(f"{other}.")]
        if nested:
            raise UnsupportedError(f"{name} and {nested[0]} are heads of adapters in one bank, one inside the other.")
        run = HeadRun(self._reader.modules[name], name, self._route)
        self.layers[name] = layer = _Layer(Stacks(tensors_of(self._reader.modules, name), 2), run)
        if self._attached:
            layer.patch()
        return layer

    def _layers_of(self, head: str) -> list[str]:
        return layers_of(self._reader.modules, self._reader.norms, head)

    def _shapes(self, head: str) -> dict[str, torch.Size]:
        """The shapes of the model's own head, without norms."""
        modules = self._reader.modules
        return {
            f"{layer}.{name}".removeprefix(f"{head}."): tensor.shape
            for layer in self._layers_of(head)
            for name, tensor in tensors_of(modules, layer).items()
        }


_NONE = torch.empty(0)
