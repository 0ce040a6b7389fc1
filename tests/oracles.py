"""Slow and obviously right answers, to hold the package's fast ones against."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


def written(model: nn.Module, deltas: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a plain model whose parameters simply *are* base plus delta, rounded to their dtype."""
    copy = deepcopy(model)
    for name, delta in deltas.items():
        parameter = copy.get_parameter(name)
        parameter.data = (parameter.data + delta).to(parameter.dtype)
    return copy


def each_alone(model: PeftModel, batch: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Row i of the result is row i of a run of the whole batch with adapter `names[i]` alone, in a copy."""
    rows = [alone(model, batch, name)[i] for i, name in enumerate(names)]
    return torch.stack(rows)


def alone(model: PeftModel, batch: Mapping[str, Tensor], adapter: str) -> Tensor:
    """A run with one adapter, or with none for `"__base__"`, in a copy of the model."""
    copy = deepcopy(model)
    if adapter == "__base__":
        with copy.disable_adapter(), torch.no_grad():
            return _first(copy(**batch))
    copy.set_adapter(adapter)
    with torch.no_grad():
        return _first(copy(**batch))


def generated_alone(model: PeftModel, batch: Mapping[str, Tensor], adapter: str, **options: Any) -> Tensor:
    """Tokens generated with one adapter, or with none for `"__base__"`, in a copy of the model."""
    copy = deepcopy(model)
    if adapter == "__base__":
        with copy.disable_adapter():
            return copy.generate(**batch, **options)
    copy.set_adapter(adapter)
    return copy.generate(**batch, **options)


def weighted_sum(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """sum of weight * tensor, from left to right."""
    total = None
    for tensor, weight in zip(tensors, weights, strict=True):
        total = weight * tensor if total is None else total + weight * tensor
    return total


def bytes_of_bits(bits: Sequence[bool]) -> list[int]:
    """Bits as bytes, lowest bit first, one at a time."""
    packed = [0] * -(-len(bits) // 8)
    for position, bit in enumerate(bits):
        packed[position // 8] += int(bit) * 2 ** (position % 8)
    return packed


def _first(output: Mapping[str, Tensor]) -> Tensor:
    return next(iter(output.values()))
