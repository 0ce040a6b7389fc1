"""The parameters of the base model's norms, as rows of adapters are added to them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peft_lntune.bank.sources import Sources
from peft_lntune.core.bank import Stacks
from peft_lntune.core.route import one_dtype
from peft_lntune.errors import UnsupportedError

__all__ = ["BaseRows"]


class BaseRows:
    """The base model's parameters, widened, with the offset of zero-centred norms.

    They are read anew each time, one operation a stack: fused optimizers and averages of weights write to parameters
    without a trace, and a copy that is kept would not follow.

    Args:
        sources: of the model.
        owners: by the name of a parameter, the number of its norm and which of the norm's parameters it is.
        stacks: of deltas, for some of these parameters or all.

    Example:
        >>> owners = {"0.weight": (0, "weight"), "0.bias": (0, "bias")}
        >>> sources = Sources(nn.Sequential(nn.LayerNorm(2)))
        >>> rows = BaseRows(sources, owners, Stacks({"0.weight": torch.zeros(2)}, rows=3))
        >>> rows.stacked(), rows.others()
        ([tensor([[1., 1.]])], {'0.bias': tensor([0., 0.])})
    """

    def __init__(self, sources: Sources, owners: Mapping[str, tuple[int, str]], stacks: Stacks) -> None:
        self._sources = sources
        self._groups = [names for names, _ in stacks]
        self._rest = owners.keys() - {name for names in self._groups for name in names}
        self._offsets = {
            name: sources.norms[name.rpartition(".")[0]].offset if which == "weight" else 0.0
            for name, (_, which) in owners.items()
        }

    def stacked(self) -> list[Tensor]:
        """For each stack its parameters, `(k, *shape)`.

        Raises:
            UnsupportedError: a norm is on the meta device.
        """
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
            return [self._wide(names, torch.stack(one_dtype(self._parameters(names)))) for names in self._groups]

    def others(self) -> dict[str, Tensor]:
        """The parameters that are in no stack, by name.

        Raises:
            UnsupportedError: a norm is on the meta device.
        """
        with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
            rest = sorted(self._rest)
            return {
                name: self._wide([name], tensor.detach()[None])[0]
                for name, tensor in zip(rest, self._parameters(rest), strict=True)
            }

    def _parameters(self, names: Sequence[str]) -> list[Tensor]:
        found = [self._sources.parameter(name) for name in names]
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
