"""The parameters of the base model's norms, to which the rows of adapters are added."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from peft_lntune.errors import UnsupportedError
from peft_lntune.routing.stacks import Stack, one_dtype

__all__ = ["BaseRows"]


class BaseRows:
    """The base model's parameters, widened, with the offset of zero-centred norms.

    They are read again each time, with one operation per stack: fused optimizers and averages of weights write to
    parameters without a trace, so a cached copy could be out of date.

    Args:
        parameter: returns the present parameter of the model for a name.
        offsets: the number added to each parameter, by name: 1 for the weight of a zero-centred norm, 0 for others.
        stacks: stacks of deltas, for some or all of these parameters.

    Example:
        >>> model, offsets = nn.Sequential(nn.LayerNorm(2)), {"0.weight": 0.0, "0.bias": 0.0}
        >>> rows = BaseRows(model.get_parameter, offsets, [Stack(("0.weight",), torch.zeros(3, 1, 2))])
        >>> rows.add_to([Stack(("0.weight",), torch.full((1, 1, 2), 0.5))])
        [Stack(names=('0.weight',), values=tensor([[[1.5000, 1.5000]]]))]
        >>> rows.others()
        [Stack(names=('0.bias',), values=tensor([[[0., 0.]]]))]
    """

    def __init__(
        self, parameter: Callable[[str], Tensor], offsets: Mapping[str, float], stacks: Iterable[Stack]
    ) -> None:
        self._parameter, self._offsets = parameter, offsets
        self._groups = [names for names, _ in stacks]
        self._rest = offsets.keys() - {name for names in self._groups for name in names}

    def add_to(self, gathered: Sequence[Stack]) -> list[Stack]:
        """Add the parameters to rows of deltas.

        Args:
            gathered: rows of the stacks, `(B, k, *shape)` each; where they need no gradient, they are overwritten.

        Returns:
            Rows of effective parameters, `(B, k, *shape)` each.

        Raises:
            UnsupportedError: a norm is on the meta device.
        """
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
            bases = [self._wide(names, torch.stack(one_dtype(self._parameters(names)))) for names in self._groups]
        return [
            Stack(names, _sum(own.to(base.device), base)) for (names, own), base in zip(gathered, bases, strict=True)
        ]

    def others(self) -> list[Stack]:
        """The parameters that are in no stack.

        Returns:
            One stack per parameter, with one row `(1, 1, *shape)` for all samples.

        Raises:
            UnsupportedError: a norm is on the meta device.
        """
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
            rest = sorted(self._rest)
            return [
                Stack((name,), self._wide([name], tensor.detach()[None])[None])
                for name, tensor in zip(rest, self._parameters(rest), strict=True)
            ]

    def _parameters(self, names: Sequence[str]) -> list[Tensor]:
        found = [self._parameter(name) for name in names]
        if any(parameter.is_meta for parameter in found):
            raise UnsupportedError(
                "norms of this model are on the meta device, as accelerate leaves them between the calls of a "
                "model that it offloads. Keep the norms on a device, they are small."
            )
        return found

    def _wide(self, names: Sequence[str], stacked: Tensor) -> Tensor:
        wide = stacked.dtype if stacked.dtype.itemsize > 2 else torch.float32
        stacked = stacked if stacked.dtype == wide else stacked.to(wide)
        offsets = [self._offsets[name] for name in names]
        if not any(offsets):
            return stacked
        if len(set(offsets)) == 1:
            return stacked + offsets[0]
        return stacked + torch.tensor(offsets, dtype=wide, device=stacked.device).reshape(
            -1, *(1,) * (stacked.dim() - 1)
        )


def _sum(own: Tensor, base: Tensor) -> Tensor:
    """The sum; in place where possible, since rows of many adapters are large and new memory costs more than adding."""
    if own.requires_grad or own.is_inference() or torch.result_type(own, base) != own.dtype:
        return own + base
    return own.add_(base)
