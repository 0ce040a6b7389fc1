"""Heads with different parameters per row of a batch: split into layers, each vectorized over rows.

The forward of a head with several layers runs as it is, and each layer in it uses the parameters of each row.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lntune.core.detour import forward_of
from peft_lntune.errors import MixedHeadError, UnsupportedError
from peft_lntune.norms.affine import split_call
from peft_lntune.norms.find import Norm
from peft_lntune.routing.route import Route

__all__ = ["HeadForward", "HeadRun", "RowGroups", "group_rows", "layers_of", "run_head", "tensors_within"]


def layers_of(modules: Mapping[str, nn.Module], norms: Mapping[str, Norm], head: str) -> list[str]:
    """The modules with parameters in a head, or the head itself; without its norms, which have deltas like all norms.

    Args:
        modules: modules of the model by name, from `base_modules`.
        norms: norms of the model by name.
        head: name of the head.

    Returns:
        The names of its layers.

    Raises:
        UnsupportedError: a module has parameters of its own beside a norm inside it.

    Example:
        >>> head = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3))
        >>> layers_of(dict(head.named_modules(prefix="head")), {}, "head")
        ['head.0', 'head.2']
    """
    if head in norms:
        return []
    tensors = (*modules[head]._parameters.values(), *modules[head]._buffers.values())
    inside = [name for name in modules if name.startswith(f"{head}.")]
    if any(tensor is not None for tensor in tensors):
        if any(name in norms for name in inside):
            raise UnsupportedError(
                f"{head} ({type(modules[head]).__name__}) is a head with parameters of its own beside a norm in it, "
                "which a bank cannot split. Load the adapter into a PeftModel, and run one batch per adapter."
            )
        return [head]
    children = [name for name in inside if "." not in name.removeprefix(f"{head}.")]
    return [layer for child in children for layer in layers_of(modules, norms, child)]


def tensors_within(tensors: Mapping[str, Tensor], layer: str, head: str) -> dict[str, Tensor]:
    """The tensors of one layer of a head, by their names in the layer.

    Args:
        tensors: tensors of the head, by their names in the head.
        layer: name of the layer in the model, one of `layers_of(..., head)`.
        head: name of the head in the model.

    Returns:
        The tensors of the layer, by their names in the layer.

    Example:
        >>> tensors_within({"dense.bias": torch.ones(1), "out.bias": torch.zeros(1)}, "head.dense", "head")
        {'bias': tensor([1.])}
    """
    prefix = f"{layer}.".removeprefix(f"{head}.")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class RowGroups(NamedTuple):
    """Rows of a batch in groups of equal size that share their parameters.

    Attributes:
        owners: the owner of each group's rows; an owner of many rows has several groups.
        rows: number of the row at each place of a group, `(groups, size)` int64. Groups are filled up with rows of the
            same owner, so that an owner that diverges does not affect the others.
        places: place of each row of the batch among all places, `(B,)` int64.
    """

    owners: list[Any]
    rows: Tensor
    places: Tensor

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `F.linear` with the parameters of each row's group.

        Args:
            x: the input, `(B, ..., i)`.
            weight: one weight per group, `(groups, o, i)`.
            bias: one bias per group, `(groups, o)`, or None.

        Returns:
            The output, `(B, ..., o)`.
        """
        grouped = x.index_select(0, self.rows.flatten().to(x.device)).unflatten(0, self.rows.shape)
        return _linear(grouped, weight, bias).flatten(0, 1).index_select(0, self.places.to(x.device))

    def spread(self, tensor: Tensor) -> Tensor:
        """Expand a tensor with one entry per group, `(groups, *shape)`, to one entry per row, `(B, *shape)`."""
        return tensor.index_select(0, (self.places // self.rows.shape[1]).to(tensor.device))


def group_rows(owners: Sequence[Any]) -> RowGroups:
    """Group the rows of a batch by owner, in groups of equal size, at most twice as many as there are owners.

    Args:
        owners: the owner of each row: the name or number of an adapter.

    Returns:
        The groups, in the order of the owners' first rows.

    Example:
        >>> groups = group_rows([7, 5, 7, 7])
        >>> groups.owners, groups.rows.tolist(), groups.places.tolist()
        ([7, 7, 5], [[0, 2], [3, 3], [1, 1]], [0, 4, 1, 2])
    """
    of_owner: dict[Any, list[int]] = {}
    for row, owner in enumerate(owners):
        of_owner.setdefault(owner, []).append(row)
    size = len(owners) // len(of_owner)
    groups = [(owner, rows[i : i + size]) for owner, rows in of_owner.items() for i in range(0, len(rows), size)]
    filled = [rows + rows[:1] * (size - len(rows)) for _, rows in groups]
    places = [0] * len(owners)
    for number, (_, rows) in enumerate(groups):
        for place, row in enumerate(rows):
            places[row] = number * size + place
    return RowGroups([owner for owner, _ in groups], torch.tensor(filled), torch.tensor(places))


class HeadRun:
    """Runs a layer of a head with the parameters of each row's adapter.

    Attributes:
        rows: while a route is on, its tensors by name, `(B, *shape)` or `(groups, *shape)`.
        groups: while a route is on, the groups of rows that share tensors; None: each row has its own.
        refused: while a route is on with an adapter whose head has another shape, the error message.

    Args:
        module: the layer.
        label: its name in the model.
        route: the route, shared with the norms.
    """

    def __init__(self, module: nn.Module, label: str, route: Route) -> None:
        self.label, self.route = label, route
        self.call = HeadForward(module)
        self.rows: dict[str, Tensor] = {}
        self.groups: RowGroups | None = None
        self.refused = ""

    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.refused:
            raise MixedHeadError(self.refused)
        x, others, named = split_call(args, kwargs)
        factor = self.route.factor(x.shape, self.label)
        rows = self.rows
        if self.groups is not None:
            if _is_linear(self.call.head, rows) and not others and not named:
                y = self.groups.linear(x.unflatten(0, (-1, factor)), **rows)
                return y.flatten(0, 1)
            rows = {name: self.groups.spread(tensor) for name, tensor in rows.items()}
        if factor > 1 and any(len(tensor) > 1 for tensor in rows.values()):
            rows = {name: tensor.repeat_interleave(factor, 0) for name, tensor in rows.items()}
        return run_head(self.call, rows, self.label, x, *others, **named)


class HeadForward(nn.Module):
    """The forward of a head without its hooks, which run around the function that replaces the forward.

    Args:
        head: a module of one or several layers.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.own = head, forward_of(head)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


def run_head(call: HeadForward, tensors: Mapping[str, Tensor], label: str, *args: Any, **kwargs: Any) -> Any:
    """Run a head with different tensors per sample, or with one set for all.

    Args:
        call: forward of the head, which is unchanged afterwards. Hooks on modules inside the head run.
        tensors: its parameters and buffers by name, one row per sample, `(B, *shape)`, or `(1, *shape)` for all.
        label: name of the head, for errors.
        *args: the input `(B, ...)` alone; with tensors for all samples, any arguments.
        **kwargs: the input, where it is passed by name; with tensors for all samples, any arguments.

    Returns:
        The output of the head, row by row.

    Raises:
        MixedHeadError: the head takes more than one input, or its forward cannot be vectorized.

    Example:
        >>> head, weight = nn.Linear(2, 1, bias=False), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> run_head(HeadForward(head), {"weight": weight}, "head", torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [[1.0], [4.0]]
    """
    if all(len(rows) == 1 for rows in tensors.values()):
        return _with(call, {name: rows[0] for name, rows in tensors.items()}, *args, **kwargs)
    inputs = [*args, *kwargs.values()]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise MixedHeadError(
            f"{label} ({type(call.head).__name__}) takes {len(inputs)} inputs, and a head is run row by row on one "
            "tensor. Run one batch per adapter."
        )
    if _is_linear(call.head, tensors):
        return _linear(inputs[0], tensors["weight"], tensors.get("bias"))

    def one(own: dict[str, Tensor], row: Tensor) -> Tensor:
        return _with(call, own, row.unsqueeze(0)).squeeze(0)

    try:
        return torch.func.vmap(one)(dict(tensors), inputs[0])
    except RuntimeError as error:
        raise MixedHeadError(
            f"{label} ({type(call.head).__name__}) cannot be run with different parameters per row: {error}. Run one "
            "batch per adapter. PEFT's own words for such a layer: Mixed batching is only supported for the following "
            "modules: Linear, Embedding, Conv1d, Conv2d, Conv3d."
        ) from error


def _is_linear(head: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    return type(head) is nn.Linear and tensors.keys() <= {"weight", "bias"}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` per sample, in fewer operations than with vmap."""
    rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
    y = rows @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return y.squeeze(1) if x.dim() == 2 else y.unflatten(1, x.shape[1:-1])


def _with(call: HeadForward, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    named = {f"head.{name}": tensor for name, tensor in tensors.items()}
    return torch.func.functional_call(call, named, args, kwargs)
