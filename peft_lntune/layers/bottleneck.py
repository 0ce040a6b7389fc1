"""The layer of bottleneck adapters, sequential or parallel to a sub-layer: one adapter, several, or one per row."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_lntune.architectures.sublayers import Sublayer
from peft_lntune.core.bottleneck import (
    ACTIVATIONS,
    PARTS,
    Activation,
    Position,
    Scale,
    bottleneck,
    read_widths,
    reset,
    stack_rows,
    weighted_sum,
    widen,
)
from peft_lntune.core.delta import delta_dtype
from peft_lntune.errors import ConfigError, UnsupportedError
from peft_lntune.layers.inserted import InsertedLayer
from peft_lntune.layers.offloaded import device_of
from peft_lntune.routing.route import Route

__all__ = ["BottleneckLayer", "check_combine", "combine_bottlenecks"]


class Recipe(NamedTuple):
    """The part of an adapter's config that its forward pass needs. `scale` is 1 where the scale is learned."""

    position: Position
    activation: Activation
    scale: float
    dropout: float


class Held(threading.local):
    """The sub-layer's input, from entry to exit of one forward pass, per thread: several threads may run a model."""

    x: Tensor | None = None

    def __reduce__(self) -> tuple[type["Held"], tuple[()]]:
        return Held, ()


class BottleneckLayer(InsertedLayer):
    """The bottlenecks of one sub-layer, with its input x and its output h.

        sequential    h + s U f(D h)
        parallel      h + s U f(D x)

    The outputs of several active adapters are summed, and each adapter reads the h and x of the base. Hooks are on the
    two leaves themselves, inside any layers that other tuners put around them, so the output of LoRA at a leaf is not
    read either.

    Source: Houlsby et al. 2019 (arXiv 1902.00751); the scale and the parallel position: He et al. 2022
    (arXiv 2110.04366).

    Args:
        route: which row of a batch uses which adapter; one object shared by all layers of a model.
        label: name of the exit leaf in the model, for errors.
        entry: the leaf whose input is x, or a tuner's layer around it.
        exit: the leaf whose output is h, or a tuner's layer around it.
        role: role of the sub-layer, such as `"ffn"`; the layer's name in its host begins with it.

    Raises:
        UnsupportedError: the width of a leaf is unknown.
    """

    adapter_layer_names = ("lntune_down", "lntune_up", "lntune_scale")
    lntune_down: Any  # `nn.ModuleDict`s of `nn.Linear`, `nn.Linear` and `Scale`; torch types their items loosely
    lntune_up: Any
    lntune_scale: Any

    def __init__(self, route: Route, label: str, entry: nn.Module, exit: nn.Module, role: str) -> None:
        leaves = _innermost(entry), _innermost(exit)
        tensors = (*leaves[1].parameters(), *leaves[1].buffers())  # a quantized leaf may have no weight
        floating = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
        super().__init__(route, label, next(floating, torch.float32))
        self.role = role
        self.child = f"{role}_bottleneck"
        # In a tuple, because a module as an attribute would become a child of this layer.
        self._leaves = leaves
        self._reads = read_widths(*leaves, label)
        self._recipes: dict[str, Recipe] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._held = Held()

    @classmethod
    def of(cls, route: Route, place: Sublayer, modules: Mapping[str, nn.Module]) -> "BottleneckLayer":
        """Make the layer of a sub-layer, not yet attached.

        Args:
            route: which row of a batch uses which adapter.
            place: the sub-layer, from `find_sublayers`.
            modules: modules of the model by name.

        Returns:
            The layer.
        """
        return cls(route, place.exit, modules[place.entry], modules[place.exit], place.role)

    # Adapters.

    def update_layer(self, adapter_name: str, config: Any, stored: bool = False) -> None:
        """Create the bottleneck of an adapter.

        Args:
            adapter_name: the new adapter; an adapter of this name is replaced.
            config: its `BottleneckConfig`.
            stored: ignored; files hold the same tensors.
        """
        device = device_of(self._leaves[1]) or torch.device("cpu")
        place: dict[str, Any] = {"dtype": delta_dtype(self.base_dtype, config.torch_delta_dtype), "device": device}
        width = self._reads["sequential"]
        size = config.size_of(width)
        down, up = nn.Linear(self._reads[config.position], size, **place), nn.Linear(size, width, **place)
        reset(down, up, identity=config.init_weights)
        self._drop(adapter_name)
        self.lntune_down[adapter_name], self.lntune_up[adapter_name] = down, up
        if config.learns_scale:
            self.lntune_scale[adapter_name] = Scale(**place)
        scale = 1.0 if config.learns_scale else float(config.scale)
        self._recipes[adapter_name] = Recipe(config.position, config.activation, scale, float(config.dropout))
        self._watch()
        self.settle(adapter_name, config, device)

    def recipe(self, adapter_name: str) -> Recipe:
        """Position, activation, scale and dropout of an adapter."""
        return self._recipes[adapter_name]

    def size_of(self, adapter_name: str) -> int:
        """The size of the bottleneck of an adapter here."""
        return len(self.lntune_down[adapter_name].weight)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._drop(adapter_name)
        self._watch()

    def _drop(self, adapter_name: str) -> None:
        for container in self.adapter_layer_names:
            getattr(self, container)._modules.pop(adapter_name, None)
        self._recipes.pop(adapter_name, None)
        # New tensors may get the addresses of the old ones and so look unchanged.
        self._cache = None

    # Hooks.

    def attach(self, host: nn.Module) -> None:
        super().attach(host)
        self._hooks["exit"] = self._leaves[1].register_forward_hook(self.add)
        self._watch()

    def detach(self, host: nn.Module) -> None:
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}
        super().detach(host)

    def _watch(self) -> None:
        """Keep a hook on the entry only while some adapter reads x."""
        wanted = "exit" in self._hooks and any(recipe.position == "parallel" for recipe in self._recipes.values())
        if wanted and "entry" not in self._hooks:
            self._hooks["entry"] = self._leaves[0].register_forward_pre_hook(self.hold)
        elif not wanted and "entry" in self._hooks:
            self._hooks.pop("entry").remove()

    def hold(self, entry: nn.Module, args: tuple[Any, ...]) -> None:
        """The hook before the entry, which keeps x until the exit.

        Args:
            entry: the leaf.
            args: arguments of its call, x first.
        """
        self._held.x = None if self._disable_adapters else args[0]

    def add(self, exit: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor | None:
        """The hook after the exit, which adds the outputs of the adapters to h.

        Args:
            exit: the leaf.
            args: arguments of its call.
            h: its output.

        Returns:
            The sum; None, which leaves h as it is, where no adapter adds anything.
        """
        # Release x first, so that the next forward pass does not find it even if this one raises.
        x, self._held.x = self._held.x, None
        if self._disable_adapters:
            return None
        inputs = {"sequential": h} if x is None else {"sequential": h, "parallel": x}
        added = self._add_routed(inputs) if self._route.on() else self._add_running(inputs)
        return None if added is None else h + added.to(h.dtype)

    # One adapter, or the sum of several.

    def _add_running(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        added = None
        for name in self.running:
            one = self._run(name, self._input(inputs, self._recipes[name].position))
            added = one if added is None else added + one
        return added

    def _input(self, inputs: Mapping[str, Tensor], position: str) -> Tensor:
        if position not in inputs:
            raise UnsupportedError(
                f"{self.label} has a parallel bottleneck, which reads the input of its sub-layer, but the leaf that "
                "takes this input was not called in this forward pass: some code computes with its weight instead, "
                "such as a fused kernel. Switch that off, or use sequential bottlenecks."
            )
        return inputs[position]

    def _run(self, name: str, x: Tensor) -> Tensor:
        """The formula of `core.bottleneck`, by calling the modules: FSDP and offloading load tensors at the call."""
        recipe = self._recipes[name]
        down, up = self.lntune_down[name], self.lntune_up[name]
        inner = ACTIVATIONS[recipe.activation](down(x.to(down.weight.dtype)))
        if recipe.dropout:
            inner = F.dropout(inner, recipe.dropout, self.training)
        if name in self.lntune_scale:
            return self.lntune_scale[name](up(inner))
        return up(inner) * recipe.scale

    # One adapter per row.

    def _groups(self, order: Sequence[str]) -> list[tuple[str, str]]:
        """Position and activation of the adapters in `order`, which one batched product cannot mix."""
        return list(dict.fromkeys(self._recipes[name][:2] for name in order if name in self._recipes))

    def stack(self, order: Sequence[str]) -> dict[str, Tensor]:
        """Stack the tensors of all adapters for a routed forward pass, with scales multiplied in.

        Smaller bottlenecks are filled up with zeros to the largest of their group. A name of another group, or without
        an adapter here, gets zeros: U = 0 adds nothing.

        Args:
            order: names of the adapters.

        Returns:
            Tensors `(len(order), ...)` by `"<position>.<activation>.<part>"`; the first two name the group.
        """
        stacked: dict[str, Tensor] = {}
        for group in self._groups(order):
            rows = [self.tensors(name) if self._recipes.get(name, ())[:2] == group else None for name in order]
            for part, tensor in stack_rows(rows).items():
                stacked[".".join((*group, part))] = tensor
        return stacked

    def own_tensors(self, name: str) -> dict[str, Tensor]:
        """The trainable tensors of an adapter here, by `PARTS`."""
        down, up = self.lntune_down[name], self.lntune_up[name]
        return dict(zip(PARTS, (down.weight, down.bias, up.weight, up.bias), strict=True))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of an adapter here, by `PARTS`, with the scale multiplied into U and c."""
        scale = self.lntune_scale[name].weight if name in self.lntune_scale else self._recipes[name].scale
        own = self.own_tensors(name)
        return {part: tensor * scale if part.startswith("up") else tensor for part, tensor in own.items()}

    def _add_routed(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        stacks = self.stacks()
        added = None
        for position, activation in self._groups(self._route.order):
            parts = {part: stacks[f"{position}.{activation}.{part}"] for part in PARTS}
            one = self._add_rows(self._input(inputs, position), parts, activation)
            added = one if added is None else added + one
        return added

    def _add_rows(self, x: Tensor, parts: Mapping[str, Tensor], activation: str) -> Tensor:
        samples = self._samples(x)
        down = parts["down"]
        index = self._route.index(samples.shape, self.label, down.device)
        rows = {part: stack.index_select(0, index) for part, stack in parts.items()}
        if len(index) == 1:  # one adapter for all rows
            rows = {part: row.squeeze(0) for part, row in rows.items()}
        added = bottleneck(samples.to(down.dtype), **rows, activation=activation)
        return added.reshape(*x.shape[:-1], added.shape[-1])

    def _samples(self, x: Tensor) -> Tensor:
        """`x` with one row per sample. OPT flattens samples and tokens of an FFN's input into one axis."""
        names = len(self._route.names)
        if x.dim() != 2 or len(x) % names:
            return x
        return x.reshape(names, len(x) // names, x.shape[-1])


def check_combine(layer: BottleneckLayer, adapters: Sequence[str]) -> None:
    """Check that the weighted sum of adapters is itself a bottleneck; nothing is changed.

    Args:
        layer: the layer; adapters without a bottleneck here are ignored.
        adapters: names of the adapters.

    Raises:
        UnsupportedError: two of them differ in position or activation.
    """
    held = [name for name in adapters if name in layer._recipes]
    for name in held[1:]:
        for field in ("position", "activation"):
            first, other = getattr(layer._recipes[held[0]], field), getattr(layer._recipes[name], field)
            if first != other:
                raise UnsupportedError(
                    f"the bottlenecks of {held[0]!r} and {name!r} have no weighted sum that is a bottleneck: "
                    f"{field} {first!r} and {other!r}. Make both active with set_adapter, which sums them, or combine "
                    f"adapters of one {field}."
                )


@torch.no_grad()
def combine_bottlenecks(layer: BottleneckLayer, adapters: Sequence[str], weights: Sequence[float], into: str) -> None:
    """Write the exact weighted sum of adapters into another adapter, as one wider bottleneck.

        sum of w_i s_i (U_i f(D_i x + b_i) + c_i) = [w_1 s_1 U_1, w_2 s_2 U_2, ...] f([D_1; D_2; ...] x + ...) + ...

    Args:
        layer: the layer; adapters without a bottleneck here add nothing.
        adapters: names of the adapters.
        weights: one per adapter.
        into: an adapter of this layer with the same position and activation, at least as wide as the adapters
            together. Additional features are filled with zeros. Its learned scale, if any, becomes 1.

    Raises:
        UnsupportedError: positions or activations differ.
        ConfigError: `into` is narrower than the adapters together. Nothing has changed.
    """
    if into not in layer._recipes:
        return
    check_combine(layer, [into, *adapters])
    held = {name: weight for name, weight in zip(adapters, weights, strict=True) if name in layer._recipes}
    summed = weighted_sum([layer.tensors(name) for name in held], list(held.values())) if held else {}
    own = layer.own_tensors(into)
    size, width = len(summed["down"]) if summed else 0, len(own["down"])
    if size > width:
        raise ConfigError(
            f"the bottlenecks of {', '.join(map(repr, held))} at {layer.label} are {size} wide together, but {into!r} "
            f"is {width} wide there. Create it with bottleneck_size={size} or more."
        )
    if into in layer.lntune_scale:
        layer.lntune_scale[into].weight.fill_(1.0)
    filled = widen(summed, width) if summed else {part: torch.zeros_like(tensor) for part, tensor in own.items()}
    for part, tensor in own.items():
        # `into` multiplies by its own scale.
        tensor.copy_(filled[part] / layer._recipes[into].scale if part.startswith("up") else filled[part])


def _innermost(module: nn.Module) -> nn.Module:
    """The model's own leaf inside the layers of tuners."""
    while "base_layer" in module._modules:
        module = module._modules["base_layer"]  # type: ignore[assignment]
    return module
