"""The loss of each task in a mixed batch, equal to that of its rows as a separate batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_lntune.errors import DataError, UnsupportedError
from peft_lntune.selection.losses import Batch, Head, grouped_losses

__all__ = ["RowLoss", "default_losses", "losses_of_rows", "rows_of"]

RowLoss = Callable[[Any, Batch], Tensor]
"""`(outputs, batch) -> scalar`, for the rows of one task."""


def default_losses(head: Head, outputs: Any, batch: Batch, groups: Sequence[int], one: bool) -> list[Tensor]:
    """The losses of all tasks, computed like the loss that the model itself reports.

    Args:
        head: the meaning of the outputs.
        outputs: outputs of the model.
        batch: the batch, with labels.
        groups: the number of the task of each row; with `one`, a single number.
        one: whether all rows belong to one task.

    Returns:
        The losses in the order of the numbers.

    Raises:
        DataError: the batch has no labels, or another number of rows than the route.
    """
    labels = batch.get(head.labels[0])
    if not isinstance(labels, Tensor):
        raise DataError(f"no {head.labels[0]}: a batch has {', '.join(batch)}. Keep that column in the data.")
    _check_rows(len(labels), groups, one)
    index = torch.tensor(list(groups) * len(labels) if one else groups, device=labels.device)
    return list(grouped_losses(head, outputs, batch, index, max(groups) + 1).unbind())


def losses_of_rows(
    loss: RowLoss, outputs: Any, batch: Batch, order: Mapping[str, int], groups: Sequence[int], one: bool
) -> dict[str, Tensor]:
    """The losses of all tasks, computed by a function of the user.

    Args:
        loss: called once per task.
        outputs: outputs of the model.
        batch: arguments of the model's call.
        order: the number of each task.
        groups: the number of the task of each row; with `one`, a single number.
        one: whether all rows belong to one task.

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
    """Select rows of every tensor in a model's outputs or in a batch that has one row per sample.

    Other values are kept. The loss among a model's outputs is left out, since it is that of all rows.

    Args:
        value: a tensor, or a mapping, list or tuple of tensors.
        index: numbers of the rows, int64.
        size: number of rows in the batch.

    Returns:
        The value with only these rows.

    Example:
        >>> rows_of({"logits": torch.arange(3), "loss": torch.tensor(1.0)}, torch.tensor([0, 2]), 3)
        {'logits': tensor([0, 2])}
    """
    if isinstance(value, Tensor):
        return value.index_select(0, index.to(value.device)) if value.dim() and len(value) == size else value
    if isinstance(value, Mapping):
        kept = {name: each for name, each in value.items() if not (name == "loss" and isinstance(each, Tensor))}
        rows = {name: rows_of(each, index, size) for name, each in kept.items()}
        return rows if type(value) is dict else _alike(value, rows)
    if type(value) in (list, tuple):
        return type(value)(rows_of(each, index, size) for each in value)
    return value


def _alike(value: Mapping[str, Any], rows: dict[str, Any]) -> Any:
    try:
        return type(value)(**rows)
    except TypeError:  # a mapping that cannot be built from its entries, such as tokenizers' batches
        return rows


def _check_rows(size: int, groups: Sequence[int], one: bool) -> None:
    if not one and size != len(groups):
        raise DataError(
            f"the batch has {size} rows, but the latest route had {len(groups)}. Give losses the batch that the model "
            "was called with in that route."
        )
