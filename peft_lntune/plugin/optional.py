"""Optional patches: if a new version of PEFT or transformers has moved a name, one warning, and the rest works."""

import warnings
from importlib import import_module

__all__ = ["PluginWarning", "apply_optional"]


class PluginWarning(UserWarning):
    """A patch of PEFT or transformers could not be applied, so one feature is missing."""


def apply_optional(feature: str, patch: str) -> bool:
    """Apply a patch; warn if a name that it needs no longer exists.

    Args:
        feature: the feature that users lose without the patch, for the warning.
        patch: full name of a function that looks up all its names before it changes anything. Its module is imported
            here, because the imports of the module itself may fail.

    Returns:
        True if the patch was applied.
    """
    module, _, function = patch.rpartition(".")
    try:
        getattr(import_module(module), function)()
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"peft_lntune does not know this version of PEFT or transformers ({error}). Everything works except: "
            f"{feature}. Upgrade peft_lntune to have it back.",
            PluginWarning,
            stacklevel=3,
        )
        return False
    return True
