"""Damage to the linear maps of a model, as quantizers and pruning do it: rounded or zeroed, and kept in float32.

What is computed is what a kernel for the packed format would compute; only memory and time differ.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

GROUP = 64  # weights of one output that share a scale and a zero point
Damage = Callable[[Tensor], Tensor]


def round_to_bits(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Round to the nearest of `2 ** bits` equal steps between the smallest and the largest weight of each group.

    Args:
        weight: `(out, in)`; `in` is a multiple of `group`.
        bits: of a weight.
        group: weights of one output that share a scale and a zero point.

    Returns:
        The rounded weights, of the same shape and dtype.

    Example:
        >>> round_to_bits(torch.tensor([[0.0, 0.4, 0.6, 1.0]]), bits=1, group=4)
        tensor([[0., 0., 1., 1.]])
    """
    rows = weight.float().reshape(-1, group)
    low, high = rows.aminmax(dim=1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return (low + ((rows - low) / step).round() * step).reshape(weight.shape).to(weight.dtype)


def quantize_by_hqq(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Quantize by HQQ as torchao has it: the zero point of each group is searched for a robust error.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization"; torchao's `_choose_qparams_and_quantize_affine_hqq`.

    Args:
        weight: `(out, in)`; `in` is a multiple of `group`.
        bits: of a weight.
        group: weights of one output that share a scale and a zero point.

    Returns:
        The dequantized weights, of the same shape and dtype.
    """
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as hqq

    codes, scale, zero, shape = hqq(
        weight.float(), bits, group, compute_dtype=torch.float32, device=str(weight.device), raw_output=True
    )
    rows = codes.reshape(-1, group).float()
    found: Tensor = ((rows - zero.reshape(-1, 1)) * scale.reshape(-1, 1)).reshape(shape)
    return found.to(weight.dtype)


def prune_smallest(weight: Tensor, sparsity: float) -> Tensor:
    """Set the smallest weights of a matrix to zero.

    Args:
        weight: the matrix.
        sparsity: share of the weights that become zero.

    Returns:
        A copy with zeros.

    Example:
        >>> prune_smallest(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), 0.5)
        tensor([[ 0., -3.],
                [ 2.,  0.]])
    """
    smallest = weight.abs().flatten().argsort(stable=True)[: round(sparsity * weight.numel())]
    return weight.flatten().index_fill(0, smallest, 0).reshape(weight.shape)


DAMAGES: dict[str, Damage] = {
    **{f"round-{bits}": partial(round_to_bits, bits=bits) for bits in (4, 3, 2)},
    **{f"hqq-{bits}": partial(quantize_by_hqq, bits=bits) for bits in (4, 3, 2)},
    "prune-50": partial(prune_smallest, sparsity=0.5),
}


@torch.no_grad()
def damage(model: nn.Module, name: str) -> nn.Module:
    """Damage every linear map of a model but its head, in place.

    Args:
        model: a language model.
        name: one of `DAMAGES`.

    Returns:
        The model.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(DAMAGES[name](module.weight))
    return model
