"""Where the positions of packed rows begin again: one rule for routing and for scores."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["begins_again", "of_text"]


def begins_again(positions: Any, mask: Any = None) -> Tensor | None:
    """Find the tokens at which another sequence of a packed row begins.

    A position that does not grow begins a sequence, so sequences of one token are found too. Positions with three
    planes (time, height and width of images) stay at one time within an image: there, a sequence begins where time
    goes back or all planes repeat. If there are four planes, the first is that of the text, as in transformers.

    Args:
        positions: position ids, `(T,)`, `(B, T)` or `(planes, B, T)`.
        mask: attention mask, `(B, T)` or longer (cached tokens first). Positions of padding may be any.

    Returns:
        Bool, `(B, T)`; None if these are no positions of tokens.

    Example:
        >>> begins_again(torch.tensor([[0, 0, 1, 0, 1]])).long()
        tensor([[0, 1, 0, 1, 0]])
    """
    if not isinstance(positions, Tensor) or positions.is_floating_point() or not 1 <= positions.dim() <= 3:
        return None
    positions = of_text(positions)
    planes = positions.reshape((1,) * (3 - positions.dim()) + positions.shape)
    steps = planes.diff(dim=-1)
    again = (steps[0] < 0) | (steps == 0).all(0)
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == again.shape[0] and mask.shape[1] > again.shape[1]:
        real = mask[:, -planes.shape[-1] :].to(again.device).bool()
        again = again & real[:, 1:] & real[:, :-1]
    return torch.cat([again.new_zeros(len(again), min(planes.shape[-1], 1)), again], dim=1)


def of_text(positions: Tensor) -> Tensor:
    """Take the plane of the text, where positions have more planes than the three of images.

    Args:
        positions: position ids, `(T,)`, `(B, T)` or `(planes, B, T)`.

    Returns:
        The first of four planes, `(B, T)`, which is that of the text in transformers; others as they are.

    Example:
        >>> of_text(torch.zeros(4, 2, 5)).shape, of_text(torch.zeros(3, 2, 5)).shape
        (torch.Size([2, 5]), torch.Size([3, 2, 5]))
    """
    return positions[0] if positions.dim() == 3 and len(positions) > 3 else positions
