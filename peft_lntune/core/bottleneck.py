"""The bottleneck of an adapter: down to a few features, an activation, up again.

    s (U f(D x + b) + c)

Source: Houlsby et al. 2019 (arXiv 1902.00751); the scale and the parallel position: He et al. 2022 (arXiv 2110.04366).
`peft_lntune.layers.bottleneck` decides what x is and what the result is added to.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lntune.errors import UnsupportedError

__all__ = [
    "ACTIVATIONS",
    "PARTS",
    "Activation",
    "Position",
    "Scale",
    "bottleneck",
    "project",
    "read_widths",
    "reset",
    "stack_rows",
    "weighted_sum",
    "widen",
]

PARTS = ("down", "down_bias", "up", "up_bias")
"""The tensors of a bottleneck by the names that `bottleneck` gives them: D, b, U, c."""


def _identity(x: Tensor) -> Tensor:
    return x


_gelu_tanh = partial(F.gelu, approximate="tanh")

Position = Literal["sequential", "parallel"]
"""Whether a bottleneck reads the output of its sub-layer, or the input."""

Activation = Literal["relu", "gelu", "gelu_new", "gelu_tanh", "silu", "swish", "tanh", "identity"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "identity": _identity,
}
"""The activations by the names that transformers and the field use; each maps 0 to 0."""


def bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Compute one bottleneck for all rows, or one per sample.

    Source: Houlsby et al. 2019 (arXiv 1902.00751); the scale: He et al. 2022 (arXiv 2110.04366).

    Args:
        x: input, `(..., d_in)`; with one bottleneck per sample `(B, ..., d_in)`.
        down: D, `(r, d_in)` or `(B, r, d_in)`.
        down_bias: b, `(r,)` or `(B, r)`.
        up: U, `(d_out, r)` or `(B, d_out, r)`.
        up_bias: c, `(d_out,)` or `(B, d_out)`.
        activation: f, a key of `ACTIVATIONS`.
        scale: s, a number or `()`.

    Returns:
        `(..., d_out)`, what is added to a sub-layer's output.

    Example:
        >>> x, down, up = torch.ones(1, 3, 2), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [0.0]])
        >>> bottleneck(x, down, torch.zeros(1), up, torch.zeros(2), scale=0.5)[0, 0]
        tensor([2., 0.])
    """
    inner = ACTIVATIONS[activation](project(x, down, down_bias))
    return project(inner, up, up_bias) * scale


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `W x + b`, with one weight and bias for all rows, or one per sample.

    Args:
        x: input, `(..., i)`; with one weight per sample `(B, ..., i)`.
        weight: W, `(o, i)` or `(B, o, i)`.
        bias: b, `(o,)` or `(B, o)`.

    Returns:
        The output, `(..., o)`.

    Example:
        >>> weight = torch.stack([torch.eye(2), 3 * torch.eye(2)])
        >>> project(torch.ones(2, 2), weight, torch.zeros(2, 2)).tolist()
        [[1.0, 1.0], [3.0, 3.0]]
    """
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    # All tokens of a sample form one matrix, so one batched product suffices.
    tokens = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    answer = torch.baddbmm(bias.unsqueeze(1), tokens, weight.transpose(1, 2))
    return answer.reshape(*x.shape[:-1], weight.shape[1])


def widen(tensors: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Widen a bottleneck with zero features, so that it computes the same.

    Args:
        tensors: tensors of the bottleneck by `PARTS`.
        size: number of features r afterwards, at least that of the bottleneck.

    Returns:
        The tensors by `PARTS`; the new features are zero in D, b and U.

    Example:
        >>> down, up = nn.Linear(4, 1), nn.Linear(1, 4)
        >>> narrow = {"down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
        >>> {part: tuple(tensor.shape) for part, tensor in widen(narrow, 3).items()}
        {'down': (3, 4), 'down_bias': (3,), 'up': (4, 3), 'up_bias': (4,)}
    """
    more = size - len(tensors["down"])
    return {
        "down": F.pad(tensors["down"], (0, 0, 0, more)),
        "down_bias": F.pad(tensors["down_bias"], (0, more)),
        "up": F.pad(tensors["up"], (0, more)),
        "up_bias": tensors["up_bias"],
    }


def stack_rows(rows: Sequence[Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
    """Stack bottlenecks of any sizes, one tensor per part, in the widest of their dtypes.

    Args:
        rows: tensors of each bottleneck by `PARTS`; None for one that adds nothing. At least one is not None.

    Returns:
        Tensors `(len(rows), ...)` by `PARTS`; smaller bottlenecks are widened with zeros.
    """
    given = [tensors for tensors in rows if tensors is not None]
    size = max(len(tensors["down"]) for tensors in given)
    dtype = given[0]["down"].dtype
    for tensors in given:
        dtype = torch.promote_types(dtype, tensors["down"].dtype)
    nothing = {part: torch.zeros_like(tensor) for part, tensor in given[0].items()}
    filled = [widen(nothing if tensors is None else tensors, size) for tensors in rows]
    return {part: torch.stack([tensors[part].to(dtype) for tensors in filled]) for part in PARTS}


def weighted_sum(members: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The exact weighted sum of bottlenecks with the same activation, as one bottleneck with all their features.

        sum of w_i (U_i f(D_i x + b_i) + c_i)
            = [w_1 U_1, w_2 U_2, ...] f([D_1; D_2; ...] x + [b_1; b_2; ...]) + sum of w_i c_i

    Args:
        members: tensors of each bottleneck by `PARTS`, with scales multiplied into `up` and `up_bias`.
        weights: one per bottleneck.

    Returns:
        Tensors of the sum by `PARTS`.

    Example:
        >>> one = {"down": torch.eye(2), "down_bias": torch.zeros(2), "up": torch.eye(2), "up_bias": torch.ones(2)}
        >>> bottleneck(torch.ones(2), **weighted_sum([one, one], [3.0, -1.0]))
        tensor([4., 4.])
    """
    return {
        "down": torch.cat([tensors["down"] for tensors in members]),
        "down_bias": torch.cat([tensors["down_bias"] for tensors in members]),
        "up": torch.cat([tensors["up"] * weight for tensors, weight in zip(members, weights, strict=True)], dim=1),
        "up_bias": torch.stack([t["up_bias"] * weight for t, weight in zip(members, weights, strict=True)]).sum(0),
    }


class Scale(nn.Module):
    """A learned scale s, a scalar that starts at 1.

    Example:
        >>> Scale(torch.float32)(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@torch.no_grad()
def reset(down: nn.Linear, up: nn.Linear, identity: bool = True) -> None:
    """Write initial values: D as in torch's `nn.Linear`, U zero (the model does not change), both biases zero.

    Args:
        down: D and b, written in place.
        up: U and c, written in place.
        identity: False: draw U at random, so that the adapter changes the model at once; for tests.
    """
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(down.bias)
    if identity:
        nn.init.zeros_(up.weight)
    else:
        nn.init.normal_(up.weight, std=0.1)
    nn.init.zeros_(up.bias)


def read_widths(entry: nn.Module, exit: nn.Module, label: str) -> dict[str, int]:
    """How many features a bottleneck reads, for each position.

    Args:
        entry: the leaf whose input is x, the sub-layer's input.
        exit: the leaf whose output is h, the sub-layer's output.
        label: name of the exit in the model, for the error.

    Returns:
        The number of features by position. The output of a bottleneck is as wide as `"sequential"`.

    Raises:
        UnsupportedError: the width of a leaf is unknown.

    Example:
        >>> read_widths(nn.Linear(2, 8), nn.Linear(8, 3), "mlp.fc2")
        {'parallel': 2, 'sequential': 3}
    """
    return {"parallel": _widths(entry, label)[0], "sequential": _widths(exit, label)[1]}


def _widths(leaf: nn.Module, label: str) -> tuple[int, int]:
    """Number of input and output features of a leaf."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # nn.Linear and its like; GPT-2's Conv1D
        found = [getattr(leaf, name, None) for name in names]
        if all(isinstance(width, int) for width in found):
            return found[0], found[1]  # type: ignore[return-value]
    raise UnsupportedError(
        f"a bottleneck at {label} needs to know how wide the model is there, but {type(leaf).__name__} has neither "
        "in_features and out_features nor nx and nf. Leave it out with exclude_modules, or tune its norms instead."
    )
