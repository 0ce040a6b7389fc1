"""Model cards that name this package, also where PEFT and transformers write the card after, or without, our config.

`PeftModel.save_pretrained` puts one card into the directory that holds the directories of named adapters, Trainer
writes its own card over PEFT's, and `push_to_hub` uploads a card that it makes last.
"""

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from transformers.utils.hub import PushToHubMixin

from peft_lntune.plugin.wrapping import wrap_once
from peft_lntune.storage.model_card import name_import
from peft_lntune.tuner.restoring import configs_of

__all__ = ["name_import_in_cards"]


def name_import_in_cards() -> None:
    """Wrap what writes the top card, and what uploads one. Idempotent."""
    wrap_once(
        [
            (PeftModel, "create_or_update_model_card", _wrapped_write),
            (PushToHubMixin, "_upload_modified_files", _wrapped_upload),
        ]
    )


def _wrapped_write(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_or_update_model_card(self: Any, output_dir: str, *args: Any, **kwargs: Any) -> Any:
        result = original(self, output_dir, *args, **kwargs)
        if configs_of(self):
            name_import(output_dir)
        return result

    return create_or_update_model_card


def _wrapped_upload(original: Callable[..., Any]) -> Callable[..., Any]:
    def _upload_modified_files(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if configs_of(self):
            name_import(working_dir)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files
