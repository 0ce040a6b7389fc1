"""Bottleneck adapters: which sub-layers, how narrow, and whether sequential or parallel."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peft_lntune.architectures.sublayers import SUBLAYER_ROLES, SublayerRole
from peft_lntune.config.base import LNTuneConfig, check_choice, check_roles, check_type, part_kind
from peft_lntune.core.bottleneck import ACTIVATIONS, Activation, Position
from peft_lntune.errors import ConfigError

__all__ = ["BottleneckConfig"]

REDUCTION_FACTORS: dict[Position, float] = {"sequential": 16.0, "parallel": 2.0}
"""The positions, each with its default reduction factor: how many times narrower than the model a bottleneck is."""

_LEARNED: Literal["learned"] = "learned"


@part_kind
@dataclass(kw_only=True)
class BottleneckConfig(LNTuneConfig):
    """Put a bottleneck on the attention, the FFN, or both. `BottleneckConfig()` alone is complete: Houlsby's adapters.

    For x the input of a sub-layer and h its output, in a block that closes with a norm (a block whose norm comes first
    adds the same to its residual, and x is then the normalized input):

        sequential    LN(x + h + s U f(D h))
        parallel      LN(x + h + s U f(D x))

    U starts at zero, so the model starts unchanged. Nothing of a bottleneck can be merged into the model.

    Source: Houlsby et al. 2019 (arXiv 1902.00751); parallel and scaled: He et al. 2022 (arXiv 2110.04366).

    Args:
        position: `"sequential"`, which reads the output of the sub-layer, or `"parallel"`, which reads its input.
        roles: one or more of `"attention"`, `"cross_attention"`, `"ffn"`: the sub-layers that get a bottleneck.
        reduction_factor: how many times narrower than the model the bottleneck is. If this and `bottleneck_size` are
            None: 16 for sequential bottlenecks, 2 for parallel ones.
        bottleneck_size: width of the bottleneck, instead of a factor.
        activation: f: `"relu"`, `"gelu"`, `"gelu_new"` or `"gelu_tanh"`, `"silu"` or `"swish"`, `"tanh"`, `"identity"`.
        scale: s, a number other than 0, or `"learned"`: one scalar per sub-layer, which starts at 1.
        dropout: probability to drop a feature of the bottleneck in training, after the activation.
        target_modules: must be None. `roles`, `layers_to_transform` and `exclude_modules` say where.

    Further arguments: see `LNTuneConfig`. `layers_to_transform` and `exclude_modules` refer to the module whose output
    the bottleneck is added to.

    Raises:
        ConfigError: a field has a value that is not allowed.

    Example:
        >>> config = BottleneckConfig(position="parallel", roles=["ffn"], scale=4.0)
        >>> config.size_of(768)
        384
    """

    position: Position = "sequential"
    roles: Sequence[SublayerRole] = field(default_factory=lambda: ["attention", "ffn"])
    reduction_factor: float | None = None
    bottleneck_size: int | None = None
    activation: Activation = "relu"
    scale: float | Literal["learned"] = 1.0
    dropout: float = 0.0

    def _check(self) -> None:
        super()._check()
        if self.target_modules is not None:
            raise ConfigError(
                f"target_modules={self.target_modules!r}: a bottleneck works on a sub-layer, not on one module. Leave "
                "target_modules out, and say where with roles, layers_to_transform and exclude_modules."
            )
        check_choice(self, "position", tuple(REDUCTION_FACTORS))
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_roles(self, SUBLAYER_ROLES, "sub-layers")
        self._check_size()
        if self.scale != _LEARNED and not (_is_number(self.scale) and self.scale != 0):
            raise ConfigError(f"scale={self.scale!r} should be a number other than 0, or {_LEARNED!r}.")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout={self.dropout!r} should be a probability, at least 0 and below 1.")

    def _check_size(self) -> None:
        if self.bottleneck_size is not None:
            check_type(self, "bottleneck_size", int)
            if self.bottleneck_size < 1:
                raise ConfigError(f"bottleneck_size={self.bottleneck_size} should be at least 1.")
            if self.reduction_factor is not None:
                raise ConfigError(
                    f"reduction_factor={self.reduction_factor!r} and bottleneck_size={self.bottleneck_size!r} both say "
                    "how wide the bottleneck is. Give one of the two, or neither."
                )
        if self.reduction_factor is not None and not (_is_number(self.reduction_factor) and self.reduction_factor > 0):
            raise ConfigError(
                f"reduction_factor={self.reduction_factor!r} should be a number above 0: how many times narrower than "
                "the model the bottleneck is."
            )

    @property
    def learns_scale(self) -> bool:
        """Whether s is trained, one scalar per sub-layer."""
        return self.scale == _LEARNED

    def size_of(self, width: int) -> int:
        """Compute the width of a bottleneck.

        Args:
            width: number of features of the sub-layer's output.

        Returns:
            The number of features of the bottleneck, at least 1.
        """
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        factor = REDUCTION_FACTORS[self.position] if self.reduction_factor is None else self.reduction_factor
        return max(1, int(width // factor))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
