"""What stands in place of the forward of a norm while a bank, or many tasks, route a batch."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from peft_lntune.core.detour import Detour
from peft_lntune.errors import UnsupportedError
from peft_lntune.norms.affine import split_call, with_rows
from peft_lntune.norms.find import Norm
from peft_lntune.routing.route import Route, fit_rows

__all__ = ["NormRun", "check_free"]


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
