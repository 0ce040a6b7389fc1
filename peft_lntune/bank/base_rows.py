"""The parameters of the base model's norms, as rows of adapters are added to them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_lntune.bank.sources import Sources
from peft_lntune.core.bank import Stacks
from peft_lntune.core.delta import stamp
from peft_lntune.core.route import one_dtype
from peft_lntune.errors import UnsupportedError

__all__ = ["BaseRows"]


class BaseRows:
    """The base model's parameters, widened, with the offset of zero-centred norms; kept until one of them changes.

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
        self._sources, self._owners = sources, owners
        self._groups = [names for names, _ in stacks]
        self._rest = owners.keys() - {name for names in self._groups for name in names}
        self._kept: tuple[object, list[Tensor], dict[str, Tensor]] | None = None

    def stacked(self) -> list[Tensor]:
        """For each stack its parameters, `(k, *shape)`.

        Raises:
            UnsupportedError: a norm is on the meta device.
        """
        return self._current()[1]

    def others(self) -> dict[str, Tensor]:
        """The parameters that are in no stack, by name.

        Raises:
            UnsupportedError: a norm is on the meta device.
        """
        return self._current()[2]

    def _current(self) -> tuple[object, list[Tensor], dict[str, Tensor]]:
        parameters = {name: self._sources.parameter(name) for name in self._owners}
        key = [stamp(parameter) for parameter in parameters.values()]
        if self._kept is None or self._kept[0] != key:
            if any(parameter.is_meta for parameter in parameters.values()):
                raise UnsupportedError(
                    "norms of this model are on the meta device, as accelerate leaves them between the calls of a "
                    "model that it offloads. Keep the norms on a device, they are small."
                )
            with torch.inference_mode(False), torch.no_grad():
                wide = {name: self._wide(name, parameter) for name, parameter in parameters.items()}
                groups = [torch.stack(one_dtype([wide[name] for name in names])) for names in self._groups]
            self._kept = key, groups, {name: wide[name] for name in wide if name in self._rest}
        return self._kept

    def _wide(self, name: str, parameter: Tensor) -> Tensor:
        place, which = name.rpartition(".")[0], self._owners[name][1]
        wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        offset = self._sources.norms[place].offset
        return wide + offset if which == "weight" and offset else wide
