"""Layers that stand beside the model's own modules: what adds to the graph, and has no base parameter to tune.

A parent is never wrapped: PEFT looks for no target beneath a tuner layer, so a second adapter would find none, and the
names of all parameters inside would change. So such a layer is a child of the module it works on, and the model's own
modules reach it by a hook or by the attention function; see docs/design.md, "Beside, not around".
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
    """Base of the layers that are put beside a module, not around it. They hold no base layer and cannot be merged.

    Args:
        route: which row of a batch uses which adapter; one object shared by all layers of a model.
        label: name of the module that it stands beside, for errors.
        base_dtype: dtype of the model there.
    """

    child = ""
    """Under which name it is put into its host. Not with `lntune_`: PEFT deletes no adapter from a module so named."""

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

    # What a subclass says.

    @abstractmethod
    def update_layer(self, adapter_name: str, config: Any, stored: bool = False) -> None:
        """Make the modules of an adapter, then call `settle`.

        Args:
            adapter_name: the new adapter.
            config: its config, of the kind that this layer is for.
            stored: whether the values come from a file.
        """

    @abstractmethod
    def stack(self, order: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of all adapters for a routed forward pass, each `(len(order), ...)`, in this order of names.

        A name without an adapter here, `"__base__"` among them, gets an entry that does nothing.
        """

    def attach(self, host: nn.Module) -> None:
        """Become a child of `host`; a subclass also says there how its adapters are reached."""
        host.add_module(self.child, self)

    def detach(self, host: nn.Module) -> None:
        """The inverse of `attach`: nothing of this layer is left in the model."""
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
        """`stack` for the route in force, kept while nothing that it came from is trained or has changed."""
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
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be needed in a graph later
            self._cache = order, sources, self.stack(order)
        return self._cache[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    # What torch and PEFT do to a module, after which something else may be trained.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._cache = None

    def train(self, mode: bool = True) -> "InsertedLayer":
        self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "InsertedLayer":
        self._cache = None
        return super()._apply(*args, **kwargs)

    def container(self, name: str) -> Any:
        """One of the `nn.ModuleDict`s by adapter name; torch types their items loosely."""
        return self._modules[name]

    def holds(self, adapter_name: str) -> bool:
        """Whether this adapter has a module here."""
        return adapter_name in self.container(self.adapter_layer_names[0])

    def to_base_dtype(self, adapter_name: str) -> None:
        """Give an adapter the dtype of the model it stands in, for users who ask for that."""
        for container in self.adapter_layer_names:
            held = self.container(container)
            if adapter_name in held:
                held[adapter_name].to(self.base_dtype)

    def settle(self, adapter_name: str, config: Any, device: torch.device) -> None:
        """Place the modules of a new adapter, and let it require gradients where it is active."""
        for container in self.adapter_layer_names:
            held = self.container(container)
            if adapter_name in held and not any(p.is_meta for p in held[adapter_name].parameters()):
                held[adapter_name].to(device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing is merged here: the tuner has asked whether that is meant, see `LNTuneModel.merge_adapter`."""

    def unmerge(self) -> None:
        """Nothing was merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # There is no base layer; `settle` has placed the adapter.
        if device is not None:
            for container in self.adapter_layer_names:
                held = self.container(container)
                if adapter_name in held:
                    held[adapter_name].to(device)

    def __repr__(self) -> str:
        return "lntune." + super().__repr__()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
