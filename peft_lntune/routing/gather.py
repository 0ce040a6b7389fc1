"""Rows of a stack with a gradient, like `index_select`, but for any number of backward passes.

Gradient checkpointing may run one backward pass per layer, and each of them reaches the same rows. autograd frees the
saved tensors of `index_select` after the first; here no tensor is saved that could be freed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["gather_rows"]


def gather_rows(
    values: Tensor, index: Tensor | None, outside: Tensor | None = None, reached: Callable[[], None] | None = None
) -> Tensor:
    """Gather rows of a stack, with gradients.

    Args:
        values: the stack, `(tasks, *shape)`.
        index: which rows, `(B,)` int64; None: each row once, in order.
        outside: bool, `(tasks, *shape)`, True for entries that are not trained and get no gradient; None: all are
            trained.
        reached: called in each backward pass that reaches these rows.

    Returns:
        The rows, `(B, *shape)`.

    Example:
        >>> stack = torch.zeros(3, 2, requires_grad=True)
        >>> gather_rows(stack, torch.tensor([0, 2, 0])).sum().backward()
        >>> stack.grad
        tensor([[2., 2.],
                [0., 0.],
                [1., 1.]])
    """
    return _Take.apply(values, index, outside, reached)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor | None, outside: Tensor | None, reached: Any) -> Tensor:
        # Not with `save_for_backward`: they must outlive the first backward pass.
        ctx.index, ctx.outside, ctx.reached, ctx.shape = index, outside, reached, values.shape
        return values.clone() if index is None else values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # Not a product with a matrix of ones and zeros: NaN of a task that diverges must not reach the others.
        total = grad if ctx.index is None else grad.new_zeros(ctx.shape).index_add_(0, ctx.index, grad)
        if ctx.outside is not None:
            total = total.masked_fill(ctx.outside, 0)
        if ctx.reached is not None:
            ctx.reached()
        return total, None, None, None
