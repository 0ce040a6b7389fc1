"""Trainer's weight decay leaves deltas and scores of masks alone, whatever their module is called.

Trainer decays all parameters but those of an `nn.LayerNorm` and those whose names say "bias" or "norm". Decay draws a
delta to the pretrained value, and a score to the threshold where its entry is switched; neither is what decay is for.
"""

import sys
from collections.abc import Sequence
from functools import wraps
from typing import Any

from transformers import trainer_pt_utils

from peft_lntune.core.delta_module import Delta
from peft_lntune.core.supermask import Supermask

__all__ = ["leave_out_deltas"]

_USERS = ("transformers.trainer", "peft.optimizers.loraplus")  # they import the function by its name


def leave_out_deltas() -> None:
    """Let transformers' `get_parameter_names` pass over deltas and masks. Idempotent."""
    original = trainer_pt_utils.get_parameter_names
    if hasattr(original, "_lntune_decay"):
        return

    @wraps(original)
    def get_parameter_names(model: Any, forbidden_layer_types: Sequence[type], *args: Any, **kwargs: Any) -> list[str]:
        ours = [kind for kind in (Delta, Supermask) if kind not in forbidden_layer_types]
        return original(model, [*forbidden_layer_types, *ours], *args, **kwargs)

    get_parameter_names._lntune_decay = True  # type: ignore[attr-defined]
    trainer_pt_utils.get_parameter_names = get_parameter_names
    for name in _USERS:
        user = sys.modules.get(name)
        if user is not None and getattr(user, "get_parameter_names", None) is original:
            user.get_parameter_names = get_parameter_names  # type: ignore[attr-defined]
