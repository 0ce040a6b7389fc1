"""The layer around any other module with a floating weight: the full delta of its weight and bias."""

from typing import Any

from torch import Tensor

from peft_lntune.core.route import BASE
from peft_lntune.core.shadow import forward_with, is_plain, shadowed
from peft_lntune.layers.base import LNTuneLayer

__all__ = ["ModuleLayer"]


class ModuleLayer(LNTuneLayer):
    """A module that a config names explicitly (Linear, Embedding, Conv, ...) and its deltas.

        y = f(x; round(w + dw), round(b + db))

    The sum is rounded to the base dtype, as in mixed-precision training: a matrix product in float32 would cost
    more than all else. The delta itself stays in float32, so that small steps add up.
    """

    def run(self, parameters: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        inner = self.get_base_layer()
        rounded = {name: value.to(getattr(inner, name).dtype) for name, value in parameters.items()}
        if self.base_layer is inner and is_plain(inner):
            return forward_with(inner, rounded, inner.forward, *args, **kwargs)
        # Hooks run; and so do other tuners' layers in between (LoRA in a mixed model), and find these parameters.
        return shadowed(inner, rounded, self.base_layer, *args, **kwargs)

    def run_routed(self, *args: Any, **kwargs: Any) -> Tensor:
        """One pass for each adapter in the batch, as PEFT's LoRA does it: a full delta a row would not fit."""
        x, *others = args
        return self._route.by_adapter(x, self.label, lambda name, rows: self._run_one(name, rows, *others, **kwargs))

    def _run_one(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        call = self._call([] if adapter == BASE else [adapter]) or self.base_layer
        return call(*args, **kwargs)
