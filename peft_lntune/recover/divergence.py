"""How far the answers of a damaged model are from those of the undamaged one."""

import torch
from torch import Tensor

from peft_lntune.errors import DataError

__all__ = ["divergence"]


def divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of two answers, KL(teacher || student), as a mean over positions.

    It is computed in float32, or in the wider of the two dtypes. No label is needed, so every position counts, the last
    one of a row included.

    Source: Hinton et al. 2015 (arXiv 1503.02531), at temperature 1.

    Args:
        student: logits `(..., C)` of the damaged model, for C classes or tokens of the vocabulary.
        teacher: logits of the undamaged model, of the same shape.
        mask: of the shape without the last dimension; positions where it is 0, such as padding, are left out. None:
            every position counts.

    Returns:
        A scalar, in nats per position; at least 0, up to rounding.

    Raises:
        DataError: the mask leaves out every position.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        >>> float(divergence(logits, logits)), round(float(divergence(torch.zeros(2, 2), logits)), 3)
        (0.0, 0.219)
    """
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    kept = None if mask is None else mask.bool()
    if kept is not None and not bool(kept.any()):
        raise DataError("no position counts: the mask of this batch is all zeros. Leave out rows of padding alone.")
    if kept is not None and not bool(kept.all()):
        student, teacher = student[kept], teacher[kept]
    known, found = teacher.to(wide).log_softmax(-1), student.to(wide).log_softmax(-1)
    return (known.exp() * (known - found)).sum(-1).mean()
