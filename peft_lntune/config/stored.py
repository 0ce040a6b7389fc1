"""From saved JSON back to the config class that was saved.

PEFT calls the class registered for a PEFT type with the fields of the JSON. One type stands for a family of configs
here, so what is registered is a door: calling it builds the kind that the JSON names.
"""

import warnings
from dataclasses import fields
from typing import Any

from peft_lntune.config.base import FORMAT_VERSION, LNTuneConfig, check_format
from peft_lntune.config.fisher_ln import FisherLNConfig
from peft_lntune.config.ln_tuning import LNTuningConfig
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.storage import check_directory, hub_options
from peft_lntune.version import __version__

__all__ = ["KINDS", "StoredConfig"]

KINDS: dict[str, type[LNTuneConfig]] = {kind.__name__: kind for kind in (LNTuningConfig, FisherLNConfig)}
"""The kinds of the family by name, as `kind` in the JSON has it."""


class StoredConfig(LNTuneConfig):
    """The class registered with PEFT. It has no instances: a call returns one of `KINDS`.

    Raises:
        ConfigError: the kind is unknown, or the format is of another version.
    """

    def __new__(cls, **stored: Any) -> LNTuneConfig:
        name = stored.get("kind", LNTuningConfig.__name__)  # as in a dict written by hand
        check_format(stored.get("format_version", FORMAT_VERSION))  # first: in a newer format all else may differ
        if not isinstance(name, str) or name not in KINDS:
            raise ConfigError(
                f"this adapter is of kind {name!r}, and peft_lntune {__version__} knows {', '.join(sorted(KINDS))}. "
                "Upgrade with `pip install -U peft-lntune`, or check where the file comes from."
            )
        kind = KINDS[name]
        known = {field.name for field in fields(kind)}
        unknown = sorted(stored.keys() - known)
        if unknown:
            # PEFT's own fallback would filter by the fields of the registered class and so lose those of the kind.
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {name}, these are ignored. This probably means that "
                "you're loading a configuration file that was saved using a higher version of the library and "
                "additional parameters have been introduced since. It is highly recommended to upgrade with "
                "`pip install -U peft-lntune`.",
                stacklevel=2,
            )
        config = kind(**{name: value for name, value in stored.items() if name in known})
        config.take_sizes(config)
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load the config, and check the weight file beside it before PEFT changes any model.

        Raises:
            AdapterFileError: the adapter is of another PEFT type, or its weights are missing, damaged, torn from this
                config, foreign or not finite.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, LNTuneConfig):
            raise AdapterFileError(
                f"{pretrained_model_name_or_path} holds an adapter of PEFT type {config.peft_type}, not one of "
                "peft_lntune. Load it under a name of its own, into a model with adapters of that type."
            )
        check_directory(config.manifest, pretrained_model_name_or_path, subfolder, **hub_options(kwargs))
        return config
