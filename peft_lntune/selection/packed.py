"""Packed rows: several samples in one row of a batch, separated by restarting positions or by offsets."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_lntune.core.packed_positions import begins_again

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
    again = begins_again(tensors.get("position_ids"), attended)
    if again is not None and bool(again.any()):
        return "position_ids"
    return None
