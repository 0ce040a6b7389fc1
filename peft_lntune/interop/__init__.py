"""Conversion to and from other formats: PEFT's own adapters, and the checkpoints of Trainer."""

from peft_lntune.interop.peft_ln_tuning import from_stock, to_stock
from peft_lntune.interop.peft_lora import load_lora, to_lora
from peft_lntune.interop.trainer_checkpoints import last_whole_checkpoint

__all__ = ["from_stock", "last_whole_checkpoint", "load_lora", "to_lora", "to_stock"]
