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
from peft_lntune.storage.saving import new_adapters

__all__ = ["save_whole"]

_MARK = "_lntune_saving"


def save_whole() -> None:
    """Wrap what saves adapters. Idempotent."""
    owners: list[Any] = [PeftModel, PreTrainedModel]
    originals = [vars(owner).get("save_pretrained") for owner in owners]
    if None in originals:  # all are looked up before the first is changed
        raise AttributeError("a save_pretrained of PeftModel or PreTrainedModel is gone")
    for owner, original in zip(owners, originals, strict=True):
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
        if elsewhere or not _holds_ours(self) or Path(target).is_file():
            return original(self, *args, **kwargs)
        with new_adapters(target, self.peft_config) as folder:
            given["save_directory"] = str(folder)
            return original(*bound.args, **bound.kwargs)

    return save_pretrained


def _holds_ours(model: Any) -> bool:
    configs = getattr(model, "peft_config", None)
    return isinstance(configs, dict) and any(isinstance(config, LNTuneConfig) for config in configs.values())
