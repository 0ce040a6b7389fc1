"""The only folder that touches private names of PEFT and transformers; `tests/plugin` lists each and what it is for."""

from peft_lntune.plugin.optional import apply_optional
from peft_lntune.plugin.register import register

__all__ = ["install"]

# What users lose without it, and the patch that gives it.
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
    """Register with PEFT, then apply what can be done without. Calling it again changes nothing."""
    register()
    for feature, patch in PATCHES.items():
        apply_optional(feature, f"{__name__}.{patch}")
