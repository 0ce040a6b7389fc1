"""Fast paths: fused functions that compute a norm of one class with other parameters.

A fast path is a record of three functions, registered here or from outside with `register_fast_path`. `call_with`,
`with_rows` and `normalize` use it, and through them all layers, mixed batches and scores. A norm with hooks, or with
another forward, does not use it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["FAST_PATHS", "FastPath", "fast_path_of", "layer_norm_rows", "register_fast_path"]


class FastPath(NamedTuple):
    """Functions that compute a norm of one class.

    Attributes:
        forward: `(norm, x, weight, bias) -> y` in the dtype of `norm(x)`. Bit-equal to `norm(x)` in every dtype where
            the parameters are the norm's own, in float32 or wider; a test must show that.
        rows: `(norm, x, weight, bias) -> y` in the dtype of `weight`, with parameters per sample:
            `(B, 1, ..., *shape)`, or whatever broadcasts over `x`.
        normalize: `(norm, x) -> xhat` in float32 or wider: the output before weight and bias. Per-sample gradients are
            computed from it.
        of: the forward of the class that the functions were written for. Where another forward replaces it, such as a
            kernel, the fast path is not used.
    """

    forward: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    rows: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]
    normalize: Callable[[Any, Tensor], Tensor]
    of: Callable[..., Any]


FAST_PATHS: dict[type[nn.Module], FastPath] = {}


def register_fast_path(
    cls: type[nn.Module],
    forward: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor],
    rows: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor],
    normalize: Callable[[Any, Tensor], Tensor],
) -> None:
    """Register the fast path of the norms of exactly this class.

    Args:
        cls: the class; subclasses do not inherit the fast path.
        forward: `(norm, x, weight, bias) -> y` in the dtype of `norm(x)`, bit-equal for the norm's own parameters.
        rows: `(norm, x, weight, bias) -> y` in the dtype of `weight`, with parameters per sample.
        normalize: `(norm, x) -> xhat` in float32 or wider: the output before weight and bias.

    Raises:
        KeyError: the class already has a fast path.

    Example:
        >>> register_fast_path(nn.LayerNorm, None, None, None)
        Traceback (most recent call last):
        KeyError: 'LayerNorm already has a fast path'
    """
    if cls in FAST_PATHS:
        raise KeyError(f"{cls.__name__} already has a fast path")
    FAST_PATHS[cls] = FastPath(forward, rows, normalize, cls.forward)


def fast_path_of(norm: nn.Module) -> FastPath | None:
    """The fast path of a norm.

    Args:
        norm: any module.

    Returns:
        The fast path; None where the class has none, or where its forward was replaced.

    Example:
        >>> fast_path_of(nn.LayerNorm(2)) is FAST_PATHS[nn.LayerNorm], fast_path_of(nn.RMSNorm(2))
        (True, None)
    """
    path = FAST_PATHS.get(type(norm))
    return path if path is not None and type(norm).forward is path.of else None


# LayerNorm


def layer_norm_rows(x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm with a weight and a bias per sample, at the memory of the norm itself: `xhat * weight + bias`.

    As two autograd operations this would keep xhat beside `x` for the backward pass. Here xhat is recomputed, as
    in torch's own fused norm. The backward pass cannot be differentiated again.

    Args:
        x: `(B, ..., *shape)`, in the dtype of `weight`.
        shape: the shape that is normalized over, `norm.normalized_shape`.
        weight: `(B, 1, ..., *shape)`, or another shape that broadcasts over `x`.
        bias: of the shape of `weight`, or None.
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
    if torch.compiler.is_compiling():  # the compiler decides what to recompute
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
        # xhat is not used elsewhere, so the output may overwrite it.
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


def _layer_norm(norm: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One fused call: torch takes float32 parameters with an input in half precision, and rounds once."""
    if weight.dtype != x.dtype and weight.dtype != torch.float32:  # the kernel takes no other pair of dtypes
        return F.layer_norm(x.to(weight.dtype), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _layer_norm_rows(norm: nn.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layer_norm_rows(x.to(weight.dtype), norm.normalized_shape, weight, bias, norm.eps)


def _layer_normalize(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, norm.weight.dtype), torch.float32)
    return F.layer_norm(x.to(wide), norm.normalized_shape, None, None, norm.eps).to(wide)


register_fast_path(nn.LayerNorm, _layer_norm, _layer_norm_rows, _layer_normalize)
