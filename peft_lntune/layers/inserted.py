"""Layers beside the model's own modules, for methods that add to the graph and tune no base parameter.

Such a layer does not wrap its module, because PEFT looks for no targets beneath a tuner layer: a second adapter would
find none, and the names of all parameters inside would change. Instead it becomes a child of the module, which calls it
through a hook or the attention function; see docs/design.md, "Beside, not around".
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_lntune.core.cache import TensorState, is_traced, is_valid, states_of
from peft_lntune.layers.offloaded import check_trainable
from peft_lntune.routing.route import Route

__all__ = ["InsertedLayer"]


class InsertedLayer(nn.Module, BaseTunerLayer):
    """Base of the layers that are beside a module, not around it. They hold no base layer and cannot be merged.

    Args:
        route: which row of a batch uses which adapter; one object shared by all layers of a model.
        label: name of the module beside which the layer is, for errors.
        base_dtype: dtype of the model there.
    """

    child = ""
    """Name of the layer in its host. It must not contain `lntune_`: PEFT deletes no adapter from such a module."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    merged_adapters: tuple[str, ...] = ()
    active_adapters: list[str]  # PEFT's, whose types are not known here

    def __init__(self, route: Route, label: str, base_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for container in self.adapter_layer_names:
            self.add_module(container, nn.ModuleDict())
        self.label = label
        self.base_dtype = base_dtype
        self._route = route
        self._cache: tuple[object, list[TensorState], dict[str, Tensor]] | None = None

    # Implemented by subclasses.

    @abstractmethod
    def update_layer(self, adapter_name: str, config: Any, stored: bool = False) -> None:
        """Create the modules of an adapter, then call `settle`.

        Args:
            adapter_name: the new adapter.
            config: its config, of this layer's method.
            stored: whether the values come from a file.
        """

    @abstractmethod
    def stack(self, order: Sequence[str]) -> dict[str, Tensor]:
        """Stack the tensors of all adapters for a routed forward pass.

        Args:
            order: names of the adapters. A name without an adapter here, such as `"__base__"`, gets an entry that
                changes nothing.

        Returns:
            Tensors `(len(order), ...)` by name.
        """

    def attach(self, host: nn.Module) -> None:
        """Become a child of `host`; subclasses also make `host` call the adapters."""
        host.add_module(self.child, self)

    def detach(self, host: nn.Module) -> None:
        """Remove this layer from `host`; the inverse of `attach`."""
        del host._modules[self.child]

    # The state machine.

    @property
    def running(self) -> list[str]:
        """The adapters that take part in a forward pass which is not routed."""
        held = self.container(self.adapter_layer_names[0])._modules
        names = [] if self._disable_adapters else [name for name in self.active_adapters if name in held]
        if names and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_trainable(self.label, (held[name] for name in names))
        return names

    def stacks(self) -> dict[str, Tensor]:
        """`stack` for the present route, cached while its sources are frozen and unchanged."""
        order = self._route.order
        if is_traced():
            with torch.no_grad():
                return self.stack(order)
        if self._cache is not None and self._cache[0] == order and is_valid(*self._cache[1]):
            return self._cache[2]
        sources = [source for module in self.modules() for source in states_of(module)]
        if any(source.tensor is None for source in sources):
            self._cache = None
            with torch.no_grad():
                return self.stack(order)
        with torch.inference_mode(False), torch.no_grad():  # the cached tensors may be needed in a graph later
            self._cache = order, sources, self.stack(order)
        return self._cache[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    # Methods of torch and PEFT after which other tensors may be trained.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """See `peft.tuners.tuners_utils.BaseTunerLayer.set_adapter`; the cache is dropped.

        Args:
            adapter_names: the adapters to make active.
            inference_mode: whether they stay frozen.
        """
        super().set_adapter(adapter_names, inference_mode)
        self._cache = None

    def train(self, mode: bool = True) -> "InsertedLayer":
        self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "InsertedLayer":
        self._cache = None
        return super()._apply(*args, **kwargs)

    def container(self, name: str) -> Any:
        """One of the module dicts by adapter name; torch types the items of `nn.ModuleDict` loosely."""
        return self._modules[name]

    def holds(self, adapter_name: str) -> bool:
        """Whether this adapter has a module here."""
        return adapter_name in self.container(self.adapter_layer_names[0])

    def _held_by(self, adapter_name: str) -> list[nn.Module]:
        """The modules of an adapter here."""
        held = map(self.container, self.adapter_layer_names)
        return [modules[adapter_name] for modules in held if adapter_name in modules]

    def to_base_dtype(self, adapter_name: str) -> None:
        """Cast an adapter to the dtype of the base model, on request of the user."""
        for module in self._held_by(adapter_name):
            module.to(self.base_dtype)

    def settle(self, adapter_name: str, config: Any, device: torch.device) -> None:
        """Move the modules of a new adapter to their device, and let it require gradients where it is active.

        Args:
            adapter_name: the new adapter.
            config: its config.
            device: where the layer computes.
        """
        for module in self._held_by(adapter_name):
            if not any(p.is_meta for p in module.parameters()):
                module.to(device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: there is no base layer to merge into. `LNTuneModel.merge_adapter` refuses unless told to keep it.

        Args:
            safe_merge: ignored.
            adapter_names: ignored.
        """

    def unmerge(self) -> None:
        """Nothing was merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # There is no base layer; `settle` has moved the adapter.
        for module in self._held_by(adapter_name) if device is not None else ():
            module.to(device)

    def __repr__(self) -> str:
        return "lntune." + super().__repr__()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
