"""A detour that is also taken when a layer is recomputed in the backward pass, as gradient checkpointing does.

Recomputation may come after the route has ended, and may start in the middle of a model. So every module that contains
a routed module has such a detour, and the first one that is called restores the route for its call.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from peft_lntune.core.detour import Detour
from peft_lntune.routing.route import Route

__all__ = ["RecomputedDetour", "in_backward"]

Again = Callable[[], AbstractContextManager[None]]


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread; `torch.utils.checkpoint` uses the same test."""
    return torch._C._current_graph_task_id() != -1


class RecomputedDetour(Detour):
    """Takes the place of a module's forward, also in recomputation.

    Args:
        module: the module; `patch` changes it, creating the detour does not.
        route: while it is on, `run` is called in place of the forward.
        run: called as `run(own, *args, **kwargs)`, with `own` the forward that was there before; None: that forward.
        again: returns a context in which the route of the recomputed layer is on.
        unrouted: called for each call with gradients, outside recomputation, while no route is on; None: nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        route: Route,
        run: Callable[..., Any] | None,
        again: Again,
        unrouted: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(module, route, _own if run is None else run)
        self._again, self._unrouted = again, unrouted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not in_backward():
            if self._unrouted is not None and not self._switch.active and torch.is_grad_enabled():
                self._unrouted()
            return super().__call__(*args, **kwargs)
        with self._again():
            return super().__call__(*args, **kwargs)


def _own(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return own(*args, **kwargs)
