"""Packed rows: several samples in one row of a batch, told apart by positions that begin again or by offsets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["find_packed"]

_OFFSETS = ("cu_seq_lens", "cu_seqlens")
_NUMBERS = ("seq_idx", "sequence_ids")


def find_packed(batch: Mapping[str, Any], size: int) -> str | None:
    """The entry of a batch that says that a row holds several samples; None where none does.

    Collators pack rows so that no token is padding: `DataCollatorWithFlattening`, TRL with `packing=True` or
    `padding_free=True`.

    Args:
        batch: as it is passed to the model.
        size: rows of the batch.

    Example:
        >>> find_packed({"input_ids": torch.ones(1, 5), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, 1)
        'position_ids'
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if name.startswith(_OFFSETS) and value.numel() > size + 1:
            return name
        if name in _NUMBERS and value.dim() == 2 and bool((value[:, 1:] > value[:, :-1]).any()):
            return name
    attended = tensors.get("attention_mask")
    if attended is not None and attended.dim() != 2:
        attended = None
    if attended is not None and not attended.is_floating_point() and attended.numel() and int(attended.max()) > 1:
        return "attention_mask"  # a number per sample, as some packing collators have it
    positions = tensors.get("position_ids")
    if positions is not None and _begins_again(positions, attended):
        return "position_ids"
    return None


def _begins_again(positions: Tensor, attended: Tensor | None) -> bool:
    if positions.dim() == 3:  # a plane per axis of images and videos; the first one is time
        positions = positions[0]
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    if positions.dim() != 2 or positions.is_floating_point():
        return False
    back = positions[:, 1:] < positions[:, :-1]
    if attended is not None and attended.shape == positions.shape:  # the positions of padding mean nothing
        real = attended.to(device=positions.device, dtype=torch.bool)
        back = back & real[:, 1:] & real[:, :-1]
    return bool(back.any())
