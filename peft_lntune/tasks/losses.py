"""The loss of each task in a mixed batch: the one that its rows would have as a batch of their own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.errors import DataError, UnsupportedError
from peft_lntune.selection.losses import Batch, Head, find_head, grouped_losses

__all__ = ["RowLoss", "default_losses", "losses_of_rows", "rows_of"]

RowLoss = Callable[[Any, Batch], Tensor]
"""`(outputs, batch) -> scalar`, of the rows of one task."""


def default_losses(
    model: nn.Module, head: Head | None, outputs: Any, batch: Batch, groups: Sequence[int], one: bool
) -> tuple[list[Tensor], Head]:
    """The losses of all tasks by the loss that the model itself reports.

    Args:
        model: for messages.
        head: what the outputs mean, if that is known already.
        outputs: of the model.
        batch: with labels.
        groups: of each row the number of its task; of all rows together where `one`.
        one: whether all rows are of one task.

    Returns:
        The losses in the order of the numbers, and the head.

    Raises:
        DataError: the batch has no labels, or another number of rows than the route.
        UnsupportedError: the model's own loss is none that is known.
    """
    head = find_head(model, outputs, batch) if head is None else head
    labels = batch.get(head.labels[0])
    if not isinstance(labels, Tensor):
        raise DataError(f"no {head.labels[0]}: a batch has {', '.join(batch)}. Keep that column in the data.")
    _check_rows(len(labels), groups, one)
    index = torch.tensor(list(groups) * len(labels) if one else groups, device=labels.device)
    return list(grouped_losses(head, outputs, batch, index, max(groups) + 1).unbind()), head


def losses_of_rows(
    loss: RowLoss, outputs: Any, batch: Batch, order: Mapping[str, int], groups: Sequence[int], one: bool
) -> dict[str, Tensor]:
    """The losses of all tasks by a function of a user's.

    Args:
        loss: called once for each task.
        outputs: of the model.
        batch: what the model was called with.
        order: the number of each task.
        groups: of each row the number of its task.
        one: whether all rows are of one task.

    Returns:
        Scalars by task.

    Raises:
        DataError: the batch has another number of rows than the route.
        UnsupportedError: the function does not return a scalar.
    """
    size = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)
    _check_rows(size, groups, one)
    found = {}
    for name, number in order.items():
        rows = range(size) if one else [row for row, group in enumerate(groups) if group == number]
        index = torch.tensor(list(rows))
        found[name] = loss(rows_of(outputs, index, size), rows_of(batch, index, size))
        if not isinstance(found[name], Tensor) or found[name].dim():
            raise UnsupportedError(
                f"the loss of a task's rows should be a scalar tensor, but got {found[name]!r} for {name!r}. Return "
                "the mean, or the sum, of the rows it is given."
            )
    return found


def rows_of(value: Any, index: Tensor, size: int) -> Any:
    """Some rows of every tensor in a model's outputs or a batch that has a row a sample; the rest as it is.

    The loss among a model's outputs is left out: it is that of all rows.

    Args:
        value: a tensor, or a mapping, list or tuple of such.
        index: which rows, int64.
        size: how many rows a batch has.

    Returns:
        The same, with those rows alone.

    Example:
        >>> rows_of({"logits": torch.arange(3), "loss": torch.tensor(1.0)}, torch.tensor([0, 2]), 3)
        {'logits': tensor([0, 2])}
    """
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device)) if value.dim() and len(value) == size else value
    if isinstance(value, Mapping):
        kept = {name: each for name, each in value.items() if not (name == "loss" and isinstance(each, Tensor))}
        rows = {name: rows_of(each, index, size) for name, each in kept.items()}
        return rows if isinstance(value, dict) and type(value) is dict else _alike(value, rows)
    if type(value) in (list, tuple):
        return type(value)(rows_of(each, index, size) for each in value)
    return value


def _alike(value: Mapping[str, Any], rows: dict[str, Any]) -> Any:
    try:
        return type(value)(**rows)
    except TypeError:  # a mapping that is not made from its entries, as tokenizers' batches
        return rows


def _check_rows(size: int, groups: Sequence[int], one: bool) -> None:
    if not one and size != len(groups):
        raise DataError(
            f"the batch has {size} rows, but the latest route had {len(groups)}. Give losses the batch that the model "
            "was called with in that route."
        )
