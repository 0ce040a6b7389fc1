"""The samples of a batch: how many there are, some of them, and whether its entries can be divided among them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peft_lntune.errors import DataError, PeftLNTuneError
from peft_lntune.selection.losses import LOSS_HEADS, Batch

__all__ = ["check_divisible", "has_attachments", "lengths_of", "parts_of", "rows_of", "shapes_of", "size_of"]


def size_of(batch: Batch) -> int:
    """Count the samples of a batch: the length of its labels or, without labels, of its first tensor.

    Args:
        batch: tensors by name.

    Returns:
        The number of samples.

    Raises:
        DataError: no tensor has a batch axis.
    """
    names = [name for head in LOSS_HEADS.values() for name in head.labels if name in batch]
    for value in (*(batch[name] for name in names), *batch.values()):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise DataError(f"a batch holds no tensor with a batch axis; it has {', '.join(map(str, batch)) or 'nothing'}.")


def _axis(key: str, value: Any, size: int) -> int | None:
    """The axis of a batch's entry that has the samples; None: all samples share the entry."""
    if not isinstance(value, Tensor) or not value.dim():
        return None
    if key == "position_ids" and value.dim() == 3:  # one plane per axis of images and videos
        return 1 if value.shape[1] == size else None
    return 0 if len(value) == size else None


def rows_of(batch: Batch, size: int, begin: int, end: int) -> dict[str, Any]:
    """Take some samples of a batch; values without a batch axis are kept.

    Args:
        batch: tensors by name.
        size: number of samples in the batch.
        begin: the first sample.
        end: the one after the last.

    Returns:
        A new dict of views.

    Example:
        >>> rows_of({"input_ids": torch.tensor([[1], [2]]), "mask": torch.ones(1, 3)}, 2, 1, 2)["input_ids"]
        tensor([[2]])
    """
    axes = {key: _axis(key, value, size) for key, value in batch.items()}
    return {
        key: value if axes[key] is None else value.narrow(axes[key], begin, end - begin) for key, value in batch.items()
    }


def check_divisible(batch: Batch, size: int) -> None:
    """Check that each entry of a batch has one element per sample, or one for all.

    Args:
        batch: tensors by name.
        size: number of samples in the batch.

    Raises:
        DataError: one cannot be divided.
    """
    for key, value in batch.items():
        if size > 1 and isinstance(value, Tensor) and value.dim() and _axis(key, value, size) is None:
            length = value.shape[1] if key == "position_ids" and value.dim() == 3 else len(value)
            if length != 1:
                raise DataError(
                    f"{key} of shape {tuple(value.shape)} cannot be divided into the {size} samples of its batch, so "
                    "their gradients cannot be computed one by one. Give batches of one sample, which may have any "
                    "number of images or clips."
                )


def has_attachments(batch: Batch) -> bool:
    """Whether a batch has images or the like beside tokens, which then decide to which sample these belong.

    Args:
        batch: tensors by name.

    Returns:
        True for floating-point entries beside integer ones, labels and masks aside.
    """
    labels = {name for head in LOSS_HEADS.values() for name in head.labels}
    given = [
        value.is_floating_point()
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.dim() > 1 and key not in labels and "mask" not in key
    ]
    return any(given) and not all(given)


def shapes_of(batch: Batch) -> str:
    """Say what a batch holds, for a message.

    Args:
        batch: tensors by name.

    Returns:
        Names and shapes.
    """
    return ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items() if isinstance(value, Tensor))


@contextmanager
def parts_of(batch: Batch, divided: bool) -> Iterator[None]:
    """Inside this context, the model is called with samples of a batch; it may refuse them where images do not fit.

    Args:
        batch: the whole batch.
        divided: whether the model gets only some of its samples.

    Raises:
        DataError: the model raised, and the batch has images or the like.
    """
    try:
        yield
    except (PeftLNTuneError, torch.OutOfMemoryError):
        raise
    except (ValueError, IndexError, RuntimeError) as error:
        if not divided or not has_attachments(batch):
            raise
        raise DataError(
            f"the model cannot be called with some of the samples of a batch ({shapes_of(batch)}): {error} Where "
            "samples have different numbers of images or clips, give batches of one sample."
        ) from error


def lengths_of(batch: Batch, size: int) -> set[int]:
    """List the numbers of rows per sample there may be where a model flattens batch and tokens into one axis.

    Args:
        batch: tensors by name.
        size: number of samples in the batch.

    Returns:
        The numbers.
    """
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    return {value.shape[1] for value in tensors if value.dim() > 1 and value.shape[0] == size}
