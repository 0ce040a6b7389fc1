"""The layer around a norm: one call for one adapter, one gather for many."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.layers.replacing import PARAMETERS, ReplacementLayer
from peft_lntune.norms.affine import NormCall, call_with, call_with_rows, split_call
from peft_lntune.norms.find import Norm
from peft_lntune.routing.route import BASE, Route
from peft_lntune.routing.rows import fitted_rows
from peft_lntune.routing.stacks import LayerTensor

__all__ = ["NormLayer"]


class NormLayer(ReplacementLayer):
    """A norm and its deltas.

        y = f(x; w + dw, b + db)                one adapter: the norm's own forward with other parameters
        y = xhat * (w + dw[r]) + (b + db[r])    a mixed batch: row i of the batch uses adapter r[i]

    Args:
        base_layer: the norm.
        route: which row of a batch uses which adapter; one object shared by all layers of a model.
        norm: facts about the norm from `find_norms`.
    """

    def __init__(self, base_layer: nn.Module, route: Route, norm: Norm) -> None:
        super().__init__(base_layer, route, norm.name)
        self._offset = norm.offset
        self._axis = norm.axis
        self._own_names = dict(norm.parameters)
        self._norm_call: NormCall | None = None

    def own_name(self, parameter: str) -> str:
        return self._own_names[parameter]

    def __getattr__(self, name: str) -> Any:
        for parameter, own in self.__dict__.get("_own_names", {}).items():
            if name == own:
                return self._read(parameter)
        return super().__getattr__(name)

    def run(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        x, args, kwargs = split_call(args, kwargs)
        return call_with(self.base_layer, x, parameters.get("weight"), parameters.get("bias"), *args, **kwargs)

    def bind(self, parameters: dict[str, Tensor]) -> Callable[..., Tensor]:
        norm: Any = self._modules["base_layer"]
        if self._norm_call is None or self._norm_call.norm is not norm:
            self._norm_call = NormCall(norm)
        return self._norm_call.bind(parameters.get("weight"), parameters.get("bias"))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_norm_call": None}

    def run_routed(self, *args: Any, **kwargs: Any) -> Tensor:
        x, args, kwargs = split_call(args, kwargs)
        weight, bias = fitted_rows(self._route, str(id(self)), self.label, x, self._axis)
        if weight is None:
            return self.base_layer(x, *args, **kwargs)
        return call_with_rows(self.base_layer, x, weight, bias, *args, **kwargs)

    def entries(self) -> Iterator[LayerTensor]:
        """The tensors of this layer for the stacks of a route: both parameters, where one of them is tuned."""
        if not (self.lntune_weight or self.lntune_bias):
            return
        for parameter in PARAMETERS:
            base: Any = getattr(self.get_base_layer(), self.own_name(parameter), None)
            if base is None:
                continue
            deltas = dict(self.deltas(parameter).items())
            # Labels are not unique: the copy of a head in `modules_to_save` holds layers with the same labels.
            name = f"{id(self)}.{parameter}"
            yield LayerTensor(name, partial(self._value, parameter), partial(_sources, base, deltas))

    @torch.no_grad()
    def _value(self, parameter: str, adapter: str) -> Tensor:
        value = self.effective(parameter, () if adapter == BASE else (adapter,))
        value = value.float() if value.dtype.itemsize < 4 else value  # torch.promote_types would cost an operation
        return value + self._offset if parameter == "weight" and self._offset else value


def _sources(base: Tensor, deltas: Mapping[str, Any], adapter: str) -> list[Tensor]:
    delta = deltas.get(adapter)
    return [base] if delta is None else [base, *delta.parameters(), *delta.buffers()]
