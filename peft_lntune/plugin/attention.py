"""The attention function of prefixes, in transformers' table of attention functions."""

from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_lntune.architectures.attention import IMPLEMENTATION
from peft_lntune.layers.prefix import lntune_prefix

__all__ = ["register_attention"]


def register_attention() -> None:
    """Register `lntune_prefix`, so that attention modules find it by name. Calling it again changes nothing.

    Raises:
        AttributeError: transformers no longer has a name that is needed.
    """
    _ = PreTrainedConfig._attn_implementation  # must exist: `ConfigView` gives the function's name there
    # On the object, because the class has another `register` from its metaclass.
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, lntune_prefix)
