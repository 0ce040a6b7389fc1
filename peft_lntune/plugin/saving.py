"""Saving over an older adapter leaves the old one or the new one, whenever the process is killed.

PEFT and transformers write the weights and the config one after the other to their final places. So their savers are
given another folder, from which the files then take their places.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from peft_lntune.plugin.wrapping import wrap_once
from peft_lntune.storage.saving import new_adapters
from peft_lntune.tuner.restoring import configs_of

__all__ = ["save_whole"]


def save_whole() -> None:
    """Wrap what saves adapters. Idempotent."""
    wrap_once([(owner, "save_pretrained", _wrapped) for owner in (PeftModel, PreTrainedModel)])


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        target = given["save_directory"]
        # Other processes than the main one write nothing, and to the Hub goes what is in the final folder.
        elsewhere = not given["is_main_process"] or given.get("push_to_hub") or given.get("distributed_checkpoint")
        if elsewhere or not configs_of(self) or Path(target).is_file():
            return original(self, *args, **kwargs)
        with new_adapters(target, self.peft_config) as folder:
            given["save_directory"] = str(folder)
            return original(*bound.args, **bound.kwargs)

    return save_pretrained
