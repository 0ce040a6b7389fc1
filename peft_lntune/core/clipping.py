"""Gradients of many tasks clipped at once, each task by the norm of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["clip_rows_"]


@torch.no_grad()
def clip_rows_(grads: Sequence[Tensor], limits: Tensor) -> Tensor:
    """Scale the rows of gradients down to a largest norm, as `torch.nn.utils.clip_grad_norm_` does for each task alone.

    Args:
        grads: `(tasks, ...)` each, changed in place.
        limits: `(tasks,)`, the largest norm of all rows of a task together; infinite for no limit.

    Returns:
        The norms before, `(tasks,)`.

    Example:
        >>> grads = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
        >>> clip_rows_([grads], torch.tensor([1.0, 10.0]))
        tensor([5., 5.])
        >>> grads
        tensor([[0.6000, 0.8000],
                [3.0000, 4.0000]])
    """
    each = [torch.linalg.vector_norm(grad.flatten(1), dim=1).to(limits.device) for grad in grads]
    norms = torch.linalg.vector_norm(torch.stack([norm.to(limits.dtype) for norm in each]), dim=0)
    scale = (limits / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.device, grad.dtype).view(-1, *(1,) * (grad.dim() - 1)))
    return norms
