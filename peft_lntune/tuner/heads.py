"""Heads in `modules_to_save`: mixed by row as PEFT does it, a loop over adapters, plain layers only; and copied."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_lntune.errors import MixedHeadError
from peft_lntune.routing.route import Route

__all__ = ["copy_heads", "routed_heads"]

PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The classes that PEFT's `modules_to_save` mixes by row."""


@contextmanager
def routed_heads(model: nn.Module, route: Route, names: Sequence[str] | str) -> Iterator[None]:
    """Inside this context every head uses the adapter of its row.

    Args:
        model: a model with or without heads in `modules_to_save`.
        route: the route in force; it knows about beams.
        names: the adapter of each sample, or one for all.

    Raises:
        MixedHeadError: a head is a module of several layers, which PEFT cannot mix; the message names it.
    """
    heads = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    several = not isinstance(names, str) and len(set(names)) > 1
    for name, head in heads.items():
        if several and not isinstance(head.original_module, PLAIN):
            raise MixedHeadError(
                f"{name} ({type(head.original_module).__name__}) is in modules_to_save and cannot be mixed by row: "
                f"Mixed batching is only supported for the following modules: {', '.join(c.__name__ for c in PLAIN)}. "
                "Save a plain layer inside it instead, or run one batch an adapter."
            )
    before = {head: head.__dict__.get("forward") for head in heads.values()}
    try:
        for name, head in heads.items():
            # PEFT's own mixing takes the base model's head for every row where the *active* adapter has none.
            head.__dict__["forward"] = partial(_by_row, head, route, name)
        yield
    finally:
        for head, forward in before.items():
            del head.__dict__["forward"]
            if forward is not None:
                head.__dict__["forward"] = forward


def _by_row(head: ModulesToSaveWrapper, route: Route, label: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not route.on():  # a copy that was made meanwhile
        return type(head).forward(head, x, *args, **kwargs)
    own = dict(head.modules_to_save.items())
    return route.by_adapter(x, label, lambda name, rows: own.get(name, head.original_module)(rows, *args, **kwargs))


def copy_heads(model: nn.Module, source: str, target: str) -> None:
    """Give adapter `target` the heads that adapter `source` has trained."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and {source, target} <= module.modules_to_save.keys():
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())
