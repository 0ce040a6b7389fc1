"""The attention function of prefixes, in transformers' table of attention functions."""

from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_lntune.architectures.attention import IMPLEMENTATION
from peft_lntune.layers.prefix import lntune_prefix

__all__ = ["register_attention"]


def register_attention() -> None:
    """Let attention modules find `lntune_prefix` by its name. Idempotent."""
    _ = PreTrainedConfig._attn_implementation  # where they look for that name, see `ConfigView`
    # On the object, since the class has another `register` from its metaclass.
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, lntune_prefix)
