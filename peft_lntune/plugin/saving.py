"""Saving over an older adapter leaves the old one or the new one, whenever the process is killed.

PEFT and transformers write the weights and the config one after the other to their final places. So their savers are
given another folder, from which the files then take their places.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from peft_lntune.config import LNTuneConfig
from peft_lntune.saving import new_adapters

__all__ = ["save_whole"]

_MARK = "_lntune_saving"


def save_whole() -> None:
    """Wrap what saves adapters. Idempotent."""
    for owner in (PeftModel, PreTrainedModel):
        original = owner.save_pretrained
        if not hasattr(original, _MARK):
            wrapped = functools.wraps(original)(_wrapped(original))
            setattr(wrapped, _MARK, True)
            owner.save_pretrained = wrapped


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        target = given["save_directory"]
        # Other processes than the main one write nothing, and to the Hub goes what is in the final folder.
        elsewhere = not given["is_main_process"] or given.get("push_to_hub") or given.get("distributed_checkpoint")
        if elsewhere or not _saves_ours(self) or Path(target).is_file():
            return original(self, *args, **kwargs)
        with new_adapters(target, self.peft_config) as folder:
            given["save_directory"] = str(folder)
            return original(*bound.args, **bound.kwargs)

    return save_pretrained


def _saves_ours(model: Any) -> bool:
    """Whether an adapter of ours is what is saved: a model of transformers may have attributes of that name anyway."""
    configs = getattr(model, "peft_config", None)
    holds = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    return holds and isinstance(configs, dict) and any(isinstance(one, LNTuneConfig) for one in configs.values())
