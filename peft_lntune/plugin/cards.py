"""Model cards that name this package, also where PEFT and transformers write the card after, or without, our config.

`PeftModel.save_pretrained` puts one card into the directory that holds the directories of named adapters, Trainer
writes its own card over PEFT's, and `push_to_hub` uploads a card that it makes last.
"""

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from transformers.utils.hub import PushToHubMixin

from peft_lntune.config import LNTuneConfig
from peft_lntune.storage.model_card import name_import

__all__ = ["name_import_in_cards"]

_MARK = "_lntune_card"


def name_import_in_cards() -> None:
    """Wrap what writes the top card, and what uploads one. Idempotent."""
    write, upload = PeftModel.create_or_update_model_card, PushToHubMixin._upload_modified_files
    if not hasattr(write, _MARK):
        PeftModel.create_or_update_model_card = _marked(write, _wrapped_write)
    if not hasattr(upload, _MARK):
        PushToHubMixin._upload_modified_files = _marked(upload, _wrapped_upload)


def _marked(original: Callable[..., Any], wrap: Callable[..., Any]) -> Callable[..., Any]:
    wrapped = functools.wraps(original)(wrap(original))
    setattr(wrapped, _MARK, True)
    return wrapped


def _wrapped_write(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_or_update_model_card(self: Any, output_dir: str, *args: Any, **kwargs: Any) -> Any:
        result = original(self, output_dir, *args, **kwargs)
        if _has_ours(self):
            name_import(output_dir)
        return result

    return create_or_update_model_card


def _wrapped_upload(original: Callable[..., Any]) -> Callable[..., Any]:
    def _upload_modified_files(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if _has_ours(self):
            name_import(working_dir)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files


def _has_ours(model: Any) -> bool:
    configs = getattr(model, "peft_config", None)
    return isinstance(configs, dict) and any(isinstance(config, LNTuneConfig) for config in configs.values())
