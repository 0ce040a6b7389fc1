"""Optional patches: where a new version of PEFT or transformers has moved a name, one warning, and the rest works."""

import warnings
from collections.abc import Callable

__all__ = ["PluginWarning", "apply_optional"]


class PluginWarning(UserWarning):
    """A patch of PEFT or transformers could not be applied, so one feature is missing."""


def apply_optional(feature: str, patch: Callable[[], None]) -> bool:
    """Apply a patch; warn where a name it needs is gone.

    Args:
        feature: what users lose without it, for the warning.
        patch: looks all its names up before it changes the first one.

    Returns:
        Whether it was applied.
    """
    try:
        patch()
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"peft_lntune does not know this version of PEFT or transformers ({error}). Everything works except: "
            f"{feature}. Upgrade peft_lntune to have it back.",
            PluginWarning,
            stacklevel=3,
        )
        return False
    return True
