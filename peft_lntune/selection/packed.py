"""Packed rows: several samples in one row of a batch, separated by restarting positions or by offsets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["find_packed"]

_OFFSETS = ("cu_seq_lens", "cu_seqlens")
_NUMBERS = ("seq_idx", "sequence_ids")


def find_packed(batch: Mapping[str, Any], size: int) -> str | None:
    """Find the entry of a batch that shows that a row holds several samples.

    Collators pack rows to avoid padding: `DataCollatorWithFlattening`, TRL with `packing=True` or `padding_free=True`.

    Args:
        batch: the batch as it is passed to the model.
        size: number of rows in the batch.

    Returns:
        The name of the entry; None where no row is packed.

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
        return "attention_mask"  # some packing collators number the samples in it
    positions = tensors.get("position_ids")
    if positions is not None and _begins_again(positions, attended):
        return "position_ids"
    return None


def _begins_again(positions: Tensor, attended: Tensor | None) -> bool:
    if positions.dim() == 3:  # one plane per axis of images and videos; the first is time
        positions = positions[0]
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    if positions.dim() != 2 or positions.is_floating_point():
        return False
    back = positions[:, 1:] < positions[:, :-1]
    if attended is not None and attended.shape == positions.shape:  # positions of padding are arbitrary
        real = attended.to(device=positions.device, dtype=torch.bool)
        back = back & real[:, 1:] & real[:, :-1]
    return bool(back.any())
