"""From saved JSON back to the config class that was saved.

PEFT calls the class registered for a PEFT type with the fields of the JSON. One type stands for a family of configs
here, so what is registered is a door: calling it builds the kind that the JSON names.
"""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft_lntune.config.base import PART_KINDS, LNTuneConfig
from peft_lntune.config.parts import build
from peft_lntune.config.unified import UnifiedConfig
from peft_lntune.errors import AdapterFileError, PeftLNTuneError
from peft_lntune.storage.manifest import changes
from peft_lntune.storage.saved_adapter import SavedAdapter

__all__ = ["KINDS", "StoredConfig"]

KINDS: Mapping[str, type[LNTuneConfig]] = ChainMap(PART_KINDS, {UnifiedConfig.__name__: UnifiedConfig})
"""The kinds of the family by name, as `kind` in the JSON has it."""


class StoredConfig(LNTuneConfig):
    """The class registered with PEFT. It has no instances: a call returns one of `KINDS`.

    Raises:
        ConfigError: the kind is unknown, or the format is of another version.
        AdapterFileError: a field is not as it was saved.
    """

    def __new__(cls, **stored: Any) -> LNTuneConfig:
        try:
            config = build(stored, KINDS)
        except PeftLNTuneError:
            raise
        except Exception as error:  # of PEFT's own checks, or of values of any other type than was saved
            raise AdapterFileError(f"this adapter_config.json is damaged: {error}. Get a good copy of it.") from error
        changed = changes(stored, [field.name for field in fields(config)])
        if changed:
            raise AdapterFileError(
                f"this adapter_config.json was changed since it was saved: {'; '.join(changed[:3])}"
                f"{' ...' if changed[3:] else ''}. To load it as it was, undo that. To change a field on purpose, "
                "undo it too, then: config = PeftConfig.from_pretrained(directory), set the field, "
                "config.save_pretrained(directory)."
            )
        config.take_sizes(config)
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load the config, and check the weight file beside it before PEFT changes any model.

        Args:
            pretrained_model_name_or_path: the directory of the adapter, or its repository on the Hub.
            subfolder: in it.
            kwargs: where else on the Hub to look: `revision`, `token`, ...

        Returns:
            The config, of the kind that was saved.

        Raises:
            AdapterFileError: the adapter is of another PEFT type, or its weights are missing, damaged, torn from this
                config, foreign or not finite.
            ConfigError: the config is damaged, or of another format.
        """
        saved = SavedAdapter(pretrained_model_name_or_path, {"subfolder": subfolder, **kwargs})
        config = cls(**saved.own_fields)
        if saved.weights is not None:
            config.take_shapes(saved.check(config.manifest).shapes)
            _ = config.stored_counts  # from here on `renaming` knows which name of the file each new name was
        return config
