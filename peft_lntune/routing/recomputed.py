"""A detour that is also taken when a layer is computed again in the backward pass, as gradient checkpointing does.

That may happen after the route has ended, in the middle of a model: so every module that holds something routed, not
only the routed module itself, has one of these, and whichever is called first puts the route back for its call.
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
    """Whether autograd is running a backward pass in this thread; `torch.utils.checkpoint` asks in this way too."""
    return torch._C._current_graph_task_id() != -1


class RecomputedDetour(Detour):
    """Stands in place of a module's forward.

    Args:
        module: the module; `patch` changes it, making a detour alone does not.
        route: `run` is called in place of the forward while it is on.
        run: `(own, *args, **kwargs)` with the forward that was there before; None: that forward itself.
        again: a context in which the route of what is computed again is on.
        unrouted: called where the module is called with gradients, not again, and no route is on; None: nothing.
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
