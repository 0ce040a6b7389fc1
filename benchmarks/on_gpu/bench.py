"""What every part of `benchmarks/gpu.py` is given: device, sizes, the time left, and models kept between cells."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.on_gpu.shapes import make_model


class SkippedError(Exception):
    """A cell that cannot be measured here; the message says why."""


@dataclass
class Bench:
    """The machine, and the sizes of the protocol.

    Attributes:
        device: where everything runs.
        small: tiny models and few rounds, to test the script on a CPU.
        minilm: folder of all-MiniLM-L6-v2; None: random weights of its shape.
        box: seconds that the cell may take.
        kept: what the cells of one part share, such as a model with 256 adapters.
    """

    device: torch.device
    small: bool
    minilm: str | None = None
    box: float = 60.0
    kept: dict[Any, Any] = field(default_factory=dict)

    def size(self, full: Any, small: Any) -> Any:
        """Return one of two sizes."""
        return small if self.small else full

    @property
    def rounds(self) -> int:
        """The most rounds of a measurement; the time left usually allows fewer."""
        return int(self.size(30, 3))

    @property
    def compiler(self) -> dict[str, Any]:
        """Arguments of `torch.compile`: CUDA graphs on a GPU, which serve the many small operations of norms."""
        if self.device.type == "cuda":
            return {"mode": "reduce-overhead", "dynamic": False}
        return {"backend": "aot_eager", "dynamic": False}

    def model(self, name: str, dtype: str, **options: Any) -> Any:
        """Make a model, see `shapes.make_model`."""
        checkpoint = self.minilm if name == "minilm" and not self.small else None
        return make_model(name, self.device, dtype, small=self.small, checkpoint=checkpoint, **options)

    def weights(self, name: str) -> str:
        """Return where the weights of a model come from, for its row."""
        return "all-MiniLM-L6-v2" if name == "minilm" and self.minilm and not self.small else "random"

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made under this key in an earlier cell of the part, or make it."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def clear(self) -> None:
        """Free what the cells before have left on the device."""
        self.kept.clear()
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, of quantized ones as they are stored."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's tensors hold others
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    size: int = tensor.numel() * tensor.element_size()
    state = getattr(tensor, "quant_state", None)  # of bitsandbytes' 4-bit weights: absmax and the table of values
    return size if state is None else size + sum(t.numel() * t.element_size() for t in _state_tensors(state))


def _state_tensors(state: Any) -> list[torch.Tensor]:
    nested = getattr(state, "state2", None)
    own = [value for value in (state.absmax, state.code, state.offset) if isinstance(value, torch.Tensor)]
    return own + ([] if nested is None else _state_tensors(nested))
