"""Per-sample losses `(B,)` and labels drawn from the model, for each kind of head.

Each loss equals the loss that a transformers model reports for a batch of that single sample. Over tokens this is a
mean; `reduction="sum"` gives the negative log-likelihood of the whole sequence instead.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lntune.errors import UnsupportedError

__all__ = [
    "IGNORED",
    "LOSS_HEADS",
    "Head",
    "LossTerm",
    "causal_lm_loss",
    "classification_loss",
    "field_of",
    "grouped_losses",
    "multi_label_loss",
    "question_answering_loss",
    "regression_loss",
    "token_loss",
    "whole_loss",
    "widened",
]

Batch = Mapping[str, Any]
Loss = Callable[[Any, Batch], Tensor]
"""`(outputs, batch) -> (B,)`: one loss per sample; users may pass their own."""

IGNORED = -100


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy per sample.

    Args:
        logits: `(B, C)`, for C classes.
        labels: `(B,)` int64.

    Returns:
        The losses, `(B,)`.
    """
    return F.cross_entropy(widened(logits), labels.long(), reduction="none")


def regression_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error per sample, mean over outputs.

    Args:
        logits: `(B, K)`, for K outputs.
        labels: `(B,)` or `(B, K)`, floating-point.

    Returns:
        The losses, `(B,)`.
    """
    return (logits - labels.reshape(logits.shape)).square().flatten(1).mean(1)


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy per sample, mean over classes.

    Args:
        logits: `(B, C)`, for C classes.
        labels: `(B, C)`, from 0 to 1.

    Returns:
        The losses, `(B,)`.
    """
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1)


def token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of tokens per sample: token classification, masked language models, sequence to sequence.

    Args:
        logits: `(B, T, C)`.
        labels: `(B, T)` int64; -100 is ignored, and a sample with no other label has loss 0.
        reduction: `"mean"` or `"sum"` over each sample's tokens.

    Returns:
        The losses, `(B,)`.

    Raises:
        UnsupportedError: the reduction is unknown.

    Example:
        >>> token_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, -100]]), reduction="sum")
        tensor([1.3863])
    """
    if reduction not in ("mean", "sum"):
        raise UnsupportedError(f'reduction={reduction!r}: choose "mean" or "sum".')
    # Classes along the last axis: along another one, torch adds up their exponentials one after the other, and loses
    # digits where there are many.
    rows = widened(logits).flatten(0, 1)
    each = F.cross_entropy(rows, labels.flatten(), reduction="none", ignore_index=IGNORED).view(labels.shape)
    total = each.sum(1)
    return total if reduction == "sum" else total / (labels != IGNORED).sum(1).clamp(min=1)


def causal_lm_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of the next token per sample: logits of position t with the label of position t + 1.

    Args:
        logits: `(B, T, C)`.
        labels: `(B, T)` int64; -100 is ignored, and a sample with no other label has loss 0.
        reduction: `"mean"` or `"sum"` over the tokens of a sample.

    Returns:
        The losses, `(B,)`.
    """
    # Labels are moved, not logits, which would be copied.
    return token_loss(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED), reduction)


def question_answering_loss(starts: Tensor, ends: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Mean of the cross entropies of the answer's first and last position, per sample.

    Args:
        starts: logits of the first position, `(B, T)`.
        ends: logits of the last position, `(B, T)`.
        start: first positions, `(B,)` int64; positions outside the sequence are ignored.
        end: last positions, `(B,)` int64; positions outside the sequence are ignored.

    Returns:
        The losses, `(B,)`.
    """
    return (_position_loss(starts, start) + _position_loss(ends, end)) / 2


def _position_loss(logits: Tensor, place: Tensor) -> Tensor:
    length = logits.shape[1]
    return F.cross_entropy(widened(logits), place.clamp(0, length), reduction="none", ignore_index=length)


class LossTerm(NamedTuple):
    """A part of a head's loss over some rows: `weight * sum of sums / sum of counts`.

    Attributes:
        weight: weight of this part in the loss.
        sums: sum of each sample, `(B,)`.
        counts: number of terms in each sum, `(B,)`; None: the loss is a sum, not a mean.
    """

    weight: float
    sums: Tensor
    counts: Tensor | None


@dataclass(frozen=True)
class Head:
    """The meaning of the outputs of one kind of head.

    Attributes:
        name: name of the head, for `fisher_scores(loss=name)`.
        labels: names of the labels in a batch.
        fits: `(outputs, batch) -> bool`, whether they have the shapes of this head.
        loss: `(outputs, batch) -> (B,)`.
        parts: `(outputs, batch) -> parts`, from which the loss of any rows of the batch follows.
        draw: `(outputs, batch, generators) -> labels by name`, drawn from the model's own distribution, with one
            generator per sample.
        expected: `outputs -> [(weights (B,), losses (B,))]`, such that the exact Fisher diagonal is the sum over the
            list of weight times squared gradient of the loss; None where this needs too many terms.
    """

    name: str
    labels: tuple[str, ...]
    fits: Callable[[Any, Batch], bool]
    loss: Loss
    parts: Callable[[Any, Batch], list[LossTerm]]
    draw: Callable[[Any, Batch, Sequence[torch.Generator]], dict[str, Tensor]]
    expected: Callable[[Any], list[tuple[Tensor, Tensor]]] | None = None


def whole_loss(head: Head, outputs: Any, batch: Batch) -> Tensor:
    """The loss of all rows of a batch together, as the model itself would report it.

    Args:
        head: the meaning of the outputs.
        outputs: outputs of the model.
        batch: the batch, with labels.

    Returns:
        A scalar.
    """
    parts = head.parts(outputs, batch)
    return _grouped(parts, torch.zeros_like(parts[0].sums, dtype=torch.long), 1)[0]


def grouped_losses(head: Head, outputs: Any, batch: Batch, groups: Tensor, count: int) -> Tensor:
    """The losses that groups of rows would have as separate batches.

    A loss over tokens is a mean over all tokens of its rows, which differs from the mean of the rows' losses.

    Args:
        head: the meaning of the outputs.
        outputs: outputs of the model.
        batch: the batch, with labels.
        groups: number of the group of each row, `(B,)` int64.
        count: number of groups.

    Returns:
        The losses, `(count,)`; 0 for a group without counted terms, which as a separate batch would have no loss.

    Example:
        >>> outputs, batch = {"logits": torch.zeros(3, 2)}, {"labels": torch.tensor([0, 1, 0])}
        >>> grouped_losses(LOSS_HEADS["classification"], outputs, batch, torch.tensor([0, 1, 0]), 2)
        tensor([0.6931, 0.6931])
    """
    return _grouped(head.parts(outputs, batch), groups, count)


def _grouped(parts: Sequence[LossTerm], groups: Tensor, count: int) -> Tensor:
    total = parts[0].sums.new_zeros(count)
    for weight, sums, counts in parts:
        groups = groups.to(sums.device)
        own = sums.new_zeros(count).index_add(0, groups, sums)
        if counts is not None:
            terms = sums.new_zeros(count).index_add(0, groups, counts.to(sums.dtype))
            own = own / terms.clamp(min=1)
        total = total + weight * own
    return total


def field_of(outputs: Any, name: str) -> Any:
    """A named output of a model, whose outputs may be a mapping, an object, or a bare tensor of logits.

    Args:
        outputs: the outputs.
        name: such as `"logits"`.

    Returns:
        The output of that name, or None.
    """
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    if isinstance(outputs, Tensor):
        return outputs if name == "logits" else None
    return getattr(outputs, name, None)


def widened(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they are.

    Args:
        logits: of any floating dtype.

    Returns:
        Tensor of the same shape.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logits(outputs: Any) -> Tensor:
    logits = field_of(outputs, "logits")
    if not isinstance(logits, Tensor):
        raise UnsupportedError(
            f"expected outputs with `logits`, got {type(outputs).__name__}. Pass loss=, a function (outputs, batch) "
            "-> (B,)."
        )
    return logits


def _on_labels(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda outputs, batch: loss(_logits(outputs), batch["labels"])


def _has_dims(outputs: Any, dims: int) -> bool:
    logits = field_of(outputs, "logits")
    return isinstance(logits, Tensor) and logits.dim() == dims


def _fits_tokens(outputs: Any, batch: Batch) -> bool:
    return _has_dims(outputs, 3) and field_of(outputs, "logits").shape[:2] == batch["labels"].shape


# Parts of losses.


def _mean_of_rows(loss: Loss) -> Callable[[Any, Batch], list[LossTerm]]:
    """Parts of a loss that is a mean over samples; samples of class -100 are ignored."""

    def parts(outputs: Any, batch: Batch) -> list[LossTerm]:
        losses, labels = loss(outputs, batch), batch["labels"]
        left_out = not labels.is_floating_point() and labels.dim() == 1
        return [LossTerm(1.0, losses, labels.ne(IGNORED) if left_out else torch.ones_like(losses))]

    return parts


def _token_parts(next_token: bool, mean: bool) -> Callable[[Any, Batch], list[LossTerm]]:
    loss = causal_lm_loss if next_token else token_loss

    def parts(outputs: Any, batch: Batch) -> list[LossTerm]:
        labels = batch["labels"]
        counted = labels[:, 1:] if next_token else labels
        sums = loss(_logits(outputs), labels, reduction="sum")
        return [LossTerm(1.0, sums, counted.ne(IGNORED).sum(1) if mean else None)]

    return parts


def _span_parts(outputs: Any, batch: Batch) -> list[LossTerm]:
    parts = []
    for side in ("start", "end"):
        logits, place = field_of(outputs, f"{side}_logits"), batch[f"{side}_positions"]
        parts.append(LossTerm(0.5, _position_loss(logits, place), place.clamp(min=0) < logits.shape[1]))
    return parts


# Labels drawn from the model.


def _draw_classes(logits: Tensor, generators: Sequence[torch.Generator], keep: Tensor | None = None) -> Tensor:
    """Draw one class for each row of logits `(B, ..., C)`, or -100 where `keep` `(B, ...)` is False.

    Classes are drawn on the CPU and for kept rows only, so they depend neither on the device nor on padding.
    """
    drawn = []
    for number, generator in enumerate(generators):
        rows = logits[number] if keep is None else logits[number][keep[number]]
        chances = rows.detach().double().softmax(-1).cpu().cumsum(-1)
        uniform = torch.rand(chances.shape[:-1], generator=generator, dtype=torch.float64).unsqueeze(-1)
        classes = torch.searchsorted(chances, uniform * chances[..., -1:], right=True).squeeze(-1)
        classes = classes.clamp(max=logits.shape[-1] - 1).to(logits.device)
        if keep is not None:
            classes = torch.full_like(keep[number], IGNORED, dtype=torch.long).masked_scatter(keep[number], classes)
        drawn.append(classes)
    return torch.stack(drawn)


def _draw_labels(outputs: Any, batch: Batch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    return {"labels": _draw_classes(_logits(outputs), generators)}


def _draw_tokens(outputs: Any, batch: Batch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    return {"labels": _draw_classes(_logits(outputs), generators, _kept(outputs, batch))}


def _draw_next_tokens(outputs: Any, batch: Batch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    logits = _logits(outputs)
    drawn = _draw_classes(logits[:, :-1], generators, _kept(outputs, batch)[:, 1:])
    return {"labels": F.pad(drawn, (1, 0), value=IGNORED)}


def _kept(outputs: Any, batch: Batch) -> Tensor:
    """Which tokens count, `(B, T)`: those with a label or, without labels, those that are not padding."""
    if "labels" in batch:
        return batch["labels"] != IGNORED
    logits = _logits(outputs)
    mask = batch.get("attention_mask")
    return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask.bool()


def _draw_multi_label(outputs: Any, batch: Batch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    chances = _logits(outputs).detach().double().sigmoid().cpu()
    uniform = torch.stack([torch.rand(chances.shape[1:], generator=g, dtype=torch.float64) for g in generators])
    return {"labels": (uniform < chances).to(_logits(outputs))}


def _draw_values(outputs: Any, batch: Batch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    # The squared error, a mean over K outputs, is the negative log-likelihood of a normal of variance K / 2.
    logits = _logits(outputs).detach()
    noise = torch.stack([torch.randn(logits.shape[1:], generator=g, dtype=torch.float64) for g in generators])
    return {"labels": logits + noise.to(logits) * math.sqrt(logits[0].numel() / 2)}


def _draw_spans(outputs: Any, batch: Batch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    starts, ends = (field_of(outputs, f"{side}_logits") for side in ("start", "end"))
    return {
        "start_positions": _draw_classes(starts, generators),
        "end_positions": _draw_classes(ends, generators),
    }


# Expectations over labels.


def _expected_classes(outputs: Any) -> list[tuple[Tensor, Tensor]]:
    surprises = -widened(_logits(outputs)).log_softmax(-1)
    return [((-column.detach()).exp(), column) for column in surprises.unbind(1)]


def _expected_values(outputs: Any) -> list[tuple[Tensor, Tensor]]:
    # With y drawn from the normal above, E[(d loss / d w)^2] = (2 / K) * sum over outputs of (d output / d w)^2.
    logits = _logits(outputs).flatten(1)
    share = torch.full_like(logits[:, 0].detach(), 2 / logits.shape[1])
    return [(share, column) for column in logits.unbind(1)]


LOSS_HEADS: dict[str, Head] = {
    head.name: head
    for head in (
        Head(
            "classification",
            ("labels",),
            lambda outputs, batch: (
                _has_dims(outputs, 2) and batch["labels"].dim() == 1 and not batch["labels"].is_floating_point()
            ),
            _on_labels(classification_loss),
            _mean_of_rows(_on_labels(classification_loss)),
            _draw_labels,
            _expected_classes,
        ),
        Head(
            "multi_label",
            ("labels",),
            lambda outputs, batch: _has_dims(outputs, 2) and _logits(outputs).shape == batch["labels"].shape,
            _on_labels(multi_label_loss),
            _mean_of_rows(_on_labels(multi_label_loss)),
            _draw_multi_label,
        ),
        Head(
            "regression",
            ("labels",),
            lambda outputs, batch: (
                _has_dims(outputs, 2)
                and _logits(outputs).numel() == batch["labels"].numel()
                and batch["labels"].is_floating_point()
            ),
            _on_labels(regression_loss),
            _mean_of_rows(_on_labels(regression_loss)),
            _draw_values,
            _expected_values,
        ),
        *(
            Head(
                name if mean else f"{name}_sum",
                ("labels",),
                _fits_tokens,
                _on_labels(loss if mean else partial(loss, reduction="sum")),
                _token_parts(next_token, mean),
                draw,
            )
            for name, loss, next_token, draw in (
                ("token", token_loss, False, _draw_tokens),
                ("causal_lm", causal_lm_loss, True, _draw_next_tokens),
            )
            for mean in (True, False)
        ),
        Head(
            "question_answering",
            ("start_positions", "end_positions"),
            lambda outputs, batch: field_of(outputs, "start_logits") is not None,
            lambda outputs, batch: question_answering_loss(
                field_of(outputs, "start_logits"),
                field_of(outputs, "end_logits"),
                batch["start_positions"],
                batch["end_positions"],
            ),
            _span_parts,
            _draw_spans,
        ),
    )
}
"""The heads by name, in the order in which `find_head` tries them."""
