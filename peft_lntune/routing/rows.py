"""Run norms with different parameters per row of a batch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.detour import Detour
from peft_lntune.errors import UnsupportedError
from peft_lntune.norms.affine import split_call, with_rows
from peft_lntune.norms.find import Norm
from peft_lntune.routing.route import Route
from peft_lntune.routing.stacks import NormRows

__all__ = ["NormRun", "check_free", "fitted_rows"]


def fitted_rows(route: Route, owner: str, label: str, x: Tensor, axis: int = -1) -> NormRows:
    """The rows of a norm, shaped to broadcast over its input.

    Args:
        route: the present route.
        owner: name under which the route has the rows.
        label: name of the norm, for errors.
        x: the norm's input, `(B, ..., *shape)`, or `(B, *shape, ...)` for `axis=1`.
        axis: -1 where the parameters match the input's last dimensions, 1 where they match its channels.

    Returns:
        Rows of weight and bias; None for a parameter that no adapter tunes.

    Raises:
        RoutingError: the rows of the input are not those of the names, or its tokens are not those of packed rows.

    Example:
        >>> from peft_lntune.routing.stacks import Stack
        >>> route, x = Route(), torch.randn(2, 3, 5, 4)
        >>> with route.serving(["a", "b"], [Stack(("norm.weight",), torch.ones(2, 1, 4))]):
        ...     fitted_rows(route, "norm", "norm", x).weight.shape
        torch.Size([2, 1, 1, 4])
    """
    if route.packed is not None:
        return route.packed.rows(owner, x, label, axis)
    if torch.compiler.is_compiling() and isinstance(x, nn.Parameter):
        route.refuse_shared(x.shape, label)  # a compiled model is not measured
    weight, bias = route.rows(owner, x.shape, label)
    return NormRows(
        None if weight is None else _fitted(weight, x, axis), None if bias is None else _fitted(bias, x, axis)
    )


def _fitted(rows: Tensor, x: Tensor, axis: int) -> Tensor:
    """Rows `(B, 1, *shape)`, or one row for all samples; no operation in the usual case."""
    shape = rows.shape[2 + max(0, rows.dim() - 1 - x.dim()) :]  # `(1, C, 1, 1)` begins with the axis of samples
    middle = x.dim() - 1 - len(shape)
    if axis == 1:
        return rows.reshape(rows.shape[0], *shape, *(1,) * middle)
    return rows if middle == 1 else rows.reshape(rows.shape[0], *(1,) * middle, *shape)


class NormRun:
    """Replaces the forward of a norm of the base model, to run it with its rows of the route.

    Args:
        module: the norm.
        norm: facts about the norm from `find_norms`; its name is that of the rows.
        route: the route, shared by all norms of the model.
    """

    def __init__(self, module: nn.Module, norm: Norm, route: Route) -> None:
        self.module, self.label, self.axis, self.route = module, norm.name, norm.axis, route

    def __call__(self, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x, args, kwargs = split_call(args, kwargs)
        weight, bias = fitted_rows(self.route, self.label, self.label, x, self.axis)
        assert weight is not None
        return with_rows(self.module, own, x, weight, bias, *args, **kwargs)


def check_free(norms: Iterable[nn.Module]) -> None:
    """Check that no bank and no `ManyTasks` routes these norms already.

    Args:
        norms: norms of a base model.

    Raises:
        UnsupportedError: one of them is routed.
    """
    if any(isinstance(norm.__dict__.get("forward"), Detour) for norm in norms):
        raise UnsupportedError(
            "another bank is attached to this model. Call its detach() first; or close(), if it is a ManyTasks."
        )
