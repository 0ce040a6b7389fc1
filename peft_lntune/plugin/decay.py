"""Trainer's weight decay leaves deltas and scores of masks alone, whatever their module is called.

Trainer decays all parameters but those of an `nn.LayerNorm` and those whose names say "bias" or "norm". Decay draws a
delta to the pretrained value, and a score to the threshold where its entry is switched; neither is what decay is for.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import trainer_pt_utils

from peft_lntune.core.delta_module import Delta
from peft_lntune.core.supermask import Supermask
from peft_lntune.plugin.wrapping import wrap_once

__all__ = ["leave_out_deltas"]

_USERS = ("transformers.trainer", "peft.optimizers.loraplus")  # they import the function by its name


def leave_out_deltas() -> None:
    """Let transformers' `get_parameter_names` pass over deltas and masks. Idempotent."""
    users = [sys.modules[name] for name in _USERS if hasattr(sys.modules.get(name), "get_parameter_names")]
    wrap_once([(module, "get_parameter_names", _wrapped) for module in (trainer_pt_utils, *users)])


def _wrapped(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def get_parameter_names(model: Any, forbidden_layer_types: Sequence[type], *args: Any, **kwargs: Any) -> list[str]:
        ours = [kind for kind in (Delta, Supermask) if kind not in forbidden_layer_types]
        return original(model, [*forbidden_layer_types, *ours], *args, **kwargs)

    return get_parameter_names
