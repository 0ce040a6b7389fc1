"""LayerNorm with a gain and a bias for each sample, at the memory of the norm itself."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["layer_norm_rows"]


def layer_norm_rows(x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`xhat * weight + bias`, with xhat the layer norm of `x`.

    As two operations of autograd this would keep xhat beside `x` for the backward pass; here xhat is computed again, as
    torch's own fused norm does it. The backward pass itself has no gradient.

    Args:
        x: `(B, ..., *shape)`, in the dtype of `weight`.
        shape: what is normalized over, `norm.normalized_shape`.
        weight: `(B, 1, ..., *shape)` or whatever broadcasts over `x`.
        bias: likewise, or None.
        eps: `norm.eps`.

    Returns:
        Of the shape and dtype of `x`.

    Example:
        >>> x, gains = torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        >>> layer_norm_rows(x, (2,), gains, None, 0.0)
        tensor([[-1.,  1.],
                [-2.,  2.]])
    """
    y: Tensor
    if torch.compiler.is_compiling():  # a compiler chooses itself what it computes again
        y = torch.native_layer_norm(x, shape, None, None, eps)[0]
        return y * weight if bias is None else torch.addcmul(bias, y, weight)
    y = _LayerNormRows.apply(x, weight, bias, shape, eps)
    return y


class _LayerNormRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], eps: float) -> Tensor:
        xhat, mean, scale = torch.native_layer_norm(x, shape, None, None, eps)
        ctx.save_for_backward(x, mean, scale, weight)
        ctx.normalized, ctx.of_bias = shape, None if bias is None else bias.shape
        # Nobody else has seen xhat, so the output may take its place.
        return xhat.mul_(weight) if bias is None else torch.addcmul(bias, xhat, weight, out=xhat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, mean, scale, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum_to_size(ctx.of_bias)
        if ctx.needs_input_grad[1]:
            of_weight = (x - mean).mul_(scale).mul_(gradient).sum_to_size(weight.shape)
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            backward = torch.ops.aten.native_layer_norm_backward
            of_x = backward(gradient * weight, x, ctx.normalized, mean, scale, None, None, mask)[0]
        return of_x, of_weight, of_bias, None, None
