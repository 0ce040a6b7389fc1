"""What stands in place of the forward of a norm, and of a layer of a head, while a bank routes a batch."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from peft_lntune.core.detour import Detour
from peft_lntune.errors import MixedHeadError, UnsupportedError
from peft_lntune.norms.affine import split_call, with_rows
from peft_lntune.norms.find import Norm
from peft_lntune.routing.heads import HeadForward, run_head
from peft_lntune.routing.route import Route, fit_rows

__all__ = ["HeadRun", "NormRun", "check_free"]


def check_free(norms: Iterable[nn.Module]) -> None:
    """Raise an `UnsupportedError` where something else routes these norms."""
    if any(isinstance(norm.__dict__.get("forward"), Detour) for norm in norms):
        raise UnsupportedError(
            "another bank is attached to this model. Call its detach() first; or close(), if it is a ManyTasks."
        )


class NormRun:
    """A norm of the base model with the rows that the route has for it.

    Args:
        module: the norm.
        norm: what `find_norms` found out about it.
        number: under which the route has its rows.
        route: shared by all norms of the model.
    """

    def __init__(self, module: nn.Module, norm: Norm, number: int, route: Route) -> None:
        self.module, self.label, self.axis, self.number = module, norm.name, norm.axis, number
        self.route = route

    def __call__(self, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x, args, kwargs = split_call(args, kwargs)
        rows = self.route.rows(self.number, x.shape, self.label)
        assert rows is not None
        assert rows.weight is not None
        weight = fit_rows(rows.weight, x, self.axis)
        bias = None if rows.bias is None else fit_rows(rows.bias, x, self.axis)
        return with_rows(self.module, own, x, weight, bias, *args, **kwargs)


class HeadRun:
    """A layer of a head with the parameters of each row's adapter.

    Attributes:
        rows: while a route is on, its tensors by name, `(B, *shape)`.
        refused: while a route is on with an adapter whose head has another shape, what to say of it.

    Args:
        module: the layer.
        label: its name in the model.
        route: shared with the norms.
    """

    def __init__(self, module: nn.Module, label: str, route: Route) -> None:
        self.label, self.route = label, route
        self.call = HeadForward(module)
        self.rows: dict[str, Tensor] = {}
        self.refused = ""

    def __call__(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.refused:
            raise MixedHeadError(self.refused)
        x, others, named = split_call(args, kwargs)
        factor = self.route.factor(x.shape, self.label)
        rows = self.rows
        if factor > 1:
            rows = {name: tensor.repeat_interleave(factor, 0) for name, tensor in rows.items()}
        return run_head(self.call, rows, self.label, x, *others, **named)
