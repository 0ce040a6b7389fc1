"""The only folder that touches private names of PEFT and transformers; `tests/plugin` lists each and what it is for."""

from peft_lntune.plugin.cards import name_import_in_cards
from peft_lntune.plugin.loading import guard_loading
from peft_lntune.plugin.mixed import join_mixed_models
from peft_lntune.plugin.optional import apply_optional
from peft_lntune.plugin.register import register

__all__ = ["install"]


def install() -> None:
    """Register with PEFT, then apply what can be done without. Calling it again changes nothing."""
    register()
    apply_optional("adapters in a PeftMixedModel", join_mixed_models)
    apply_optional("refusing damaged adapters without a trace, on every loading path", guard_loading)
    apply_optional("the line `import peft_lntune` in cards that PEFT or push_to_hub write", name_import_in_cards)
