"""Heads in `modules_to_save`: mixed by row as PEFT does it, a loop over adapters, plain layers only; and copied."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from peft_lntune.core.route import Route
from peft_lntune.errors import RoutingError

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
        RoutingError: a head is a module of several layers, which PEFT cannot mix; the message names it.
    """
    heads = {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    several = not isinstance(names, str) and len(set(names)) > 1
    for name, head in heads.items():
        if several and not isinstance(head.original_module, PLAIN):
            raise RoutingError(
                f"{name} ({type(head.original_module).__name__}) is in modules_to_save and cannot be mixed by row: "
                f"Mixed batching is only supported for the following modules: {', '.join(c.__name__ for c in PLAIN)}. "
                "Save a plain layer inside it instead, or run one batch an adapter."
            )
    handles = []
    try:
        for name, head in heads.items():

            def put_names(_: nn.Module, args: tuple, kwargs: dict[str, Any], label: str = name) -> tuple[tuple, dict]:
                return args, {**kwargs, "adapter_names": route.names_for(len(args[0]), label)}

            handles.append(head.register_forward_pre_hook(put_names, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def copy_heads(model: nn.Module, source: str, target: str) -> None:
    """Give adapter `target` the heads that adapter `source` has trained."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and {source, target} <= module.modules_to_save.keys():
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())
