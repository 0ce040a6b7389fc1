"""Optional patches: where a new version of PEFT or transformers has moved a name, one warning, and the rest works."""

import warnings
from importlib import import_module

__all__ = ["PluginWarning", "apply_optional"]


class PluginWarning(UserWarning):
    """A patch of PEFT or transformers could not be applied, so one feature is missing."""


def apply_optional(feature: str, patch: str) -> bool:
    """Apply a patch; warn where a name it needs is gone.

    Args:
        feature: what users lose without it, for the warning.
        patch: full name of a function that looks all its names up before it changes the first one. Its module is
            imported here, because a name may be gone that the module itself imports.

    Returns:
        Whether it was applied.
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
