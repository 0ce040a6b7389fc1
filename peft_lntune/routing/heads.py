"""A head with other parameters for each sample: its own forward, vectorized over the samples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.detour import forward_of
from peft_lntune.errors import MixedHeadError

__all__ = ["HeadForward", "run_head"]


class HeadForward(nn.Module):
    """The forward of a head and nothing around it: a head's hooks run around what stands in its forward's place.

    Args:
        head: a module of one layer or several.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.own = head, forward_of(head)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


def run_head(call: HeadForward, tensors: Mapping[str, Tensor], label: str, *args: Any, **kwargs: Any) -> Any:
    """Run a head with other tensors for each sample, or with one set for all.

    Args:
        call: of the head, which is afterwards as it was. Hooks on modules inside the head run.
        tensors: its parameters and buffers by name, a row a sample, `(B, *shape)`, or `(1, *shape)` for all samples.
        label: name of the head, for errors.
        *args: of its forward: the input `(B, ...)`, nothing else.
        **kwargs: likewise.

    Returns:
        What the head says, row by row.

    Raises:
        MixedHeadError: the head takes more than one input, or does what cannot be vectorized.

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
            "tensor. Run one batch an adapter."
        )
    if type(call.head) is nn.Linear and tensors.keys() <= {"weight", "bias"}:
        return _linear(inputs[0], tensors["weight"], tensors.get("bias"))

    def one(own: dict[str, Tensor], row: Tensor) -> Tensor:
        return _with(call, own, row.unsqueeze(0)).squeeze(0)

    try:
        return torch.func.vmap(one)(dict(tensors), inputs[0])
    except RuntimeError as error:
        raise MixedHeadError(
            f"{label} ({type(call.head).__name__}) cannot be run with other parameters for each row: {error}. Run one "
            "batch an adapter."
        ) from error


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As the vectorized `F.linear`, in fewer operations."""
    rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
    y = rows @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return y.squeeze(1) if x.dim() == 2 else y.unflatten(1, x.shape[1:-1])


def _with(call: HeadForward, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    named = {f"head.{name}": tensor for name, tensor in tensors.items()}
    return torch.func.functional_call(call, named, args, kwargs)
