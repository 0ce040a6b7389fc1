"""Errors, classed by what the user can do next. Each is also a `ValueError`, as PEFT's own are.

Every message says what was expected, what came, and what to do; every error is raised before anything has changed.
"""

__all__ = [
    "AdapterFileError",
    "ConfigError",
    "DataError",
    "HeadFileError",
    "MixedHeadError",
    "NoMatchError",
    "PeftLNTuneError",
    "RegistrationError",
    "RoutingError",
    "UnsupportedError",
]


class PeftLNTuneError(ValueError):
    """Base of every error of this package."""


class ConfigError(PeftLNTuneError):
    """A field of a config has a value that is not allowed. Next: change the config."""


class DataError(PeftLNTuneError):
    """Batches are empty, lack labels, or give no finite loss. Next: look at the data, or pass the loss."""


class NoMatchError(PeftLNTuneError):
    """A config selects nothing in this model. Next: look at the listed norms, change the selection."""


class AdapterFileError(PeftLNTuneError):
    """A saved adapter is damaged, incomplete, foreign or too new. Next: get a good copy, or upgrade this package."""


class HeadFileError(AdapterFileError, RuntimeError):
    """A head in a file is of another size than the model's; a `RuntimeError` too, as torch's. Next: the right model."""


class RoutingError(PeftLNTuneError):
    """Rows of a batch cannot be matched with adapters. Next: correct the names, or the place of the call."""


class MixedHeadError(RoutingError, TypeError):
    """A head in `modules_to_save` cannot be mixed by row. Also a `TypeError`, as PEFT raises it. Next: a plain head."""


class UnsupportedError(PeftLNTuneError):
    """The operation has no exact meaning for this layer or adapter. Next: use the way the message names."""


class RegistrationError(PeftLNTuneError):
    """Another package holds the PEFT type this one registers. Next: uninstall one of the two."""
