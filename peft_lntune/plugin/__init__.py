"""The only folder that uses private names of PEFT and transformers. `tests/plugin` lists each name and its use."""

from peft_lntune.plugin.optional import apply_optional
from peft_lntune.plugin.register import register

__all__ = ["install"]

# For each feature that users would lose, the patch that provides it.
PATCHES = {
    "adapters in a PeftMixedModel": "mixed.join_mixed_models",
    "refusing damaged adapters without a trace, and masked ones in transformers' load_adapter": "loading.guard_loading",
    "saving over an older adapter in one step": "saving.save_whole",
    "hot swapping": "hotswap.offer_hotswap",
    "prefixes": "attention.register_attention",
    "no weight decay of deltas in Trainer": "decay.leave_out_deltas",
    "the line `import peft_lntune` in cards that PEFT or push_to_hub write": "cards.name_import_in_cards",
}


def install() -> None:
    """Register with PEFT, then apply the optional patches. Calling it again changes nothing.

    Raises:
        RegistrationError: another package has registered this PEFT type. Nothing has changed.
    """
    register()
    for feature, patch in PATCHES.items():
        apply_optional(feature, f"{__name__}.{patch}")
