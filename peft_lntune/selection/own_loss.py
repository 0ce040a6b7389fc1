"""Which of the known losses a model reports itself: told by its value and gradients, not by the name of a class."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lntune.errors import DataError, UnsupportedError
from peft_lntune.selection.losses import IGNORED, LOSS_HEADS, Batch, Head, field_of, whole_loss, widened

__all__ = ["FoundHead", "find_head"]

_ROUNDINGS = 8
"""How many roundings two computations of one loss may lie apart. Cross entropies of up to 200,000 tokens differ from
float64 by less than one, of 49,152 classes by less than three; kernels that subtract large logarithms, by some more."""

_LOGITS = ("logits", "start_logits", "end_logits")
_ROUTER_LOSSES = ("aux_loss", "z_loss")  # endings of names in the outputs of transformers' mixtures of experts


class FoundHead(NamedTuple):
    """The head that computes a model's own loss.

    Attributes:
        head: the head.
        settled: whether it is the only one. Otherwise others have the same loss and gradient for this batch, as the
            mean and the sum over a single token have, and the next batch may tell them apart.
    """

    head: Head
    settled: bool


def find_head(model: nn.Module, outputs: Any, batch: Batch) -> FoundHead:
    """Find the head whose loss equals the loss that the model itself reports, but for rounding.

    Where the losses of several heads equal it, or the model's loss is in half precision, whose rounding may hide
    another loss, the gradients with respect to the logits decide as well.

    Args:
        model: the model, for the message.
        outputs: outputs of the model, called with `batch`; their `loss` is the model's own.
        batch: a batch of one or more samples, with labels.

    Returns:
        The head, and whether it is the only one.

    Raises:
        DataError: the batch has no labels, or the model's loss is not finite.
        UnsupportedError: the model reports no loss, one that no known head computes, or one that several compute whose
            gradients differ.
    """
    own = field_of(outputs, "loss")
    if not any(name in batch for head in LOSS_HEADS.values() for name in head.labels):
        raise DataError(
            f"no labels: a batch has {', '.join(batch)}, but a loss needs `labels` (or `start_positions` and "
            "`end_positions`). Keep that column in the data, or pass loss=, a function (outputs, batch) -> (B,)."
        )
    if own is None:
        raise UnsupportedError(
            f"{type(model).__name__} reports no loss, so the meaning of its outputs is unknown. Pass loss=, one of "
            f"{', '.join(LOSS_HEADS)}, or a function (outputs, batch) -> (B,)."
        )
    if not bool(torch.isfinite(own)):
        raise DataError(f"the model's own loss is {own.item()}. Look at the labels and inputs.")
    fitting = [
        head for head in LOSS_HEADS.values() if all(n in batch for n in head.labels) and head.fits(outputs, batch)
    ]
    close = [head for head in fitting if _equals(own, head, outputs, batch)]
    routers = _router_losses(outputs)
    coarse = torch.finfo(own.dtype).eps > torch.finfo(torch.float32).eps
    if coarse and routers:
        close = []  # the rounding of the loss may hide theirs
    if len(close) > 1 or (close and coarse):
        close = _by_gradient(own, close, outputs, batch)
    if not close:
        raise UnsupportedError(f"{type(model).__name__} reports a loss of {own.item():.6g}, {_unknown(routers)}")
    return FoundHead(close[0], len(close) == 1)


def _unknown(routers: Sequence[str]) -> str:
    """Why no head computes a loss, and what to do."""
    if routers:
        return (
            f"which includes a loss of its routers ({', '.join(routers)}). It depends on all tokens of a batch "
            "together, so it cannot be divided among samples or tasks. Set output_router_logits=False in the model's "
            "config (or router_aux_loss_coef=0 in a float32 model), or pass loss=, a function (outputs, batch) -> (B,)."
        )
    return (
        f"which equals none of the losses known here ({', '.join(LOSS_HEADS)}). Pass loss=, a function "
        "(outputs, batch) -> (B,)."
    )


def _router_losses(outputs: Any) -> list[str]:
    """The names of the losses of routers among a model's outputs."""
    named = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    return [
        name
        for name, value in named.items()
        if name.endswith(_ROUTER_LOSSES) and isinstance(value, Tensor) and bool(value.ne(0).any())
    ]


def _equals(own: Tensor, head: Head, outputs: Any, batch: Batch) -> bool:
    """Whether a head's loss equals the model's own but for rounding.

    A cross entropy is a difference of logarithms as large as the largest logit, computed in float32 or wider; a model
    may round each term and the mean to a narrower dtype, which moves the mean by less than its last digit.
    """
    found = whole_loss(head, outputs, batch).item()
    tops = [widened(logits).detach().amax(-1).abs() for logits in _tensors(outputs).values()]
    largest = max(top[top.isfinite()].max().item() if top.isfinite().any() else 0.0 for top in tops)
    summed = any(part.counts is None for part in head.parts(outputs, batch))
    terms = int(batch[head.labels[0]].ne(IGNORED).sum()) if summed else 1
    unit = torch.finfo(torch.float32).eps
    bound = _ROUNDINGS * unit * (abs(own.item()) + terms * (1 + largest))
    last_digit = torch.finfo(own.dtype).eps * abs(own.item())
    return bool(abs(found - own.item()) <= bound + last_digit)


def _by_gradient(own: Tensor, heads: Sequence[Head], outputs: Any, batch: Batch) -> list[Head]:
    """Those of some heads that have the same gradient as the model's own loss, as far as autograd can tell.

    Where it cannot (no gradients, a compiled model), heads with the same gradient as the first are interchangeable.

    Raises:
        UnsupportedError: several heads are left, and their gradients differ.
    """
    tensors = _tensors(outputs)
    gradients = [_head_gradient(head, tensors, batch) for head in heads]
    theirs = _own_gradient(own, tensors)
    if theirs is not None:
        same = [number for number, ours in enumerate(gradients) if _agree(ours, theirs, own.dtype)]
        heads, gradients = [heads[number] for number in same], [gradients[number] for number in same]
    if not all(_agree(gradient, gradients[0], own.dtype) for gradient in gradients[1:]):
        raise UnsupportedError(
            f"the model's loss of {own.item():.6g} equals several of the losses known here for this batch "
            f"({', '.join(head.name for head in heads)}), so its meaning is unknown. Pass loss=, or give first a batch "
            "for which they differ."
        )
    return list(heads)


def _own_gradient(own: Tensor, tensors: Mapping[str, Tensor]) -> list[Tensor] | None:
    """The gradient of a loss with respect to the logits that a model reports; None where autograd has none."""
    if not own.requires_grad or not all(tensor.requires_grad for tensor in tensors.values()):
        return None
    found = torch.autograd.grad(own, list(tensors.values()), retain_graph=True, allow_unused=True)
    return None if any(gradient is None for gradient in found) else list(found)


def _head_gradient(head: Head, tensors: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        free = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
        value = whole_loss(head, free, {name: batch[name].clone() for name in head.labels})
        return list(torch.autograd.grad(value, list(free.values())))


def _agree(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether gradients are equal but for the roundings of a dtype, or of their own where that is coarser."""
    for our, their in zip(ours, theirs, strict=True):
        unit = max(torch.finfo(each).eps for each in (torch.float32, our.dtype, their.dtype, dtype))
        if (our.double() - their.double()).norm() > _ROUNDINGS * unit * their.double().norm():
            return False
    return True


def _tensors(outputs: Any) -> dict[str, Tensor]:
    """The logits among a model's outputs, by name."""
    return {name: value for name in _LOGITS if isinstance(value := field_of(outputs, name), Tensor)}
