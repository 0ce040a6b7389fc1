"""From the fields of a JSON to a config of the kind that it names."""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft_lntune.config.base import FORMAT_VERSION, LNTuneConfig, check_format
from peft_lntune.config.ln_tuning import LNTuningConfig
from peft_lntune.errors import ConfigError
from peft_lntune.version import __version__

__all__ = ["build"]


def build(stored: Mapping[str, Any], kinds: Mapping[str, type[LNTuneConfig]]) -> LNTuneConfig:
    """Make the config that was saved; fields that its kind does not have are left out, with PEFT's warning.

    Args:
        stored: the fields, as JSON has them.
        kinds: the classes it may be of, by name.

    Raises:
        ConfigError: the kind is unknown, or the format is of another version.
    """
    name = stored.get("kind", LNTuningConfig.__name__)  # as in a dict written by hand
    check_format(stored.get("format_version", FORMAT_VERSION))  # first: in a newer format all else may differ
    if not isinstance(name, str) or name not in kinds:
        raise ConfigError(
            f"this adapter is of kind {name!r}, and peft_lntune {__version__} knows {', '.join(sorted(kinds))}. "
            "Upgrade with `pip install -U peft-lntune`, or check where the file comes from."
        )
    kind = kinds[name]
    known = {field.name for field in fields(kind)}
    unknown = sorted(stored.keys() - known)
    if unknown:
        # PEFT's own fallback would filter by the fields of the registered class and so lose those of the kind.
        warnings.warn(
            f"Unexpected keyword arguments {unknown} for class {name}, these are ignored. This probably means that "
            "you're loading a configuration file that was saved using a higher version of the library and "
            "additional parameters have been introduced since. It is highly recommended to upgrade with "
            "`pip install -U peft-lntune`.",
            stacklevel=3,
        )
    return kind(**{name: value for name, value in stored.items() if name in known})
