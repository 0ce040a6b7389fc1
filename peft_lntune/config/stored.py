"""From saved JSON back to the config class that was saved.

PEFT calls the class registered for a PEFT type with the fields of the JSON. Here one type stands for several config
classes, so the registered class only builds the class that the JSON names.
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
"""All config classes by name, as `kind` in the JSON gives it."""


class StoredConfig(LNTuneConfig):
    """The class registered with PEFT. It has no instances: calling it returns an instance of one of `KINDS`.

    Args:
        **stored: the fields of the JSON; `kind` names the class.

    Raises:
        ConfigError: the kind is unknown, or the format is of another version.
        AdapterFileError: a field was changed after saving.
    """

    def __new__(cls, **stored: Any) -> LNTuneConfig:
        try:
            config = build(stored, KINDS)
        except PeftLNTuneError:
            raise
        except Exception as error:  # PEFT's own checks, or a value of the wrong type, may raise anything
            raise AdapterFileError(f"this adapter_config.json is damaged: {error}. Get a good copy of it.") from error
        changed = changes(stored, [field.name for field in fields(config)])
        if changed:
            raise AdapterFileError(
                f"this adapter_config.json was changed since it was saved: {'; '.join(changed[:3])}"
                f"{' ...' if changed[3:] else ''}. Undo the change to load it. To change a field on purpose, undo it "
                "too, then: config = PeftConfig.from_pretrained(directory), set the field, "
                "config.save_pretrained(directory)."
            )
        config.take_sizes(config)
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load the config of a saved adapter, and check its weight file before PEFT changes any model.

        Args:
            pretrained_model_name_or_path: the folder of the adapter, or its repository on the Hub.
            subfolder: folder inside that folder or repository.
            **kwargs: where to look on the Hub: `revision`, `token`, ...

        Returns:
            The config, of the class that was saved.

        Raises:
            AdapterFileError: the adapter is of another PEFT type, or its weights are missing, damaged, not finite, or
                were not saved with this config.
            ConfigError: the config is damaged, or of another format.
        """
        saved = SavedAdapter(pretrained_model_name_or_path, {"subfolder": subfolder, **kwargs})
        config = cls(**saved.own_fields)
        if saved.weights is not None:
            config.take_shapes(saved.check(config.manifest).shapes)
            _ = config.stored_counts  # lets `renaming` record the name in the file of each new name
        return config
