"""Conversion to and from other formats: PEFT's own adapters, model files that keep their other bytes, and the
checkpoints of Trainer.
"""

from peft_lntune.interop.gguf_file import edit_gguf, restore_gguf, to_gguf
from peft_lntune.interop.peft_ln_tuning import from_stock, to_stock
from peft_lntune.interop.peft_lora import load_lora, to_lora
from peft_lntune.interop.safetensors_files import merge_into_safetensors
from peft_lntune.interop.trainer_checkpoints import last_whole_checkpoint

__all__ = [
    "edit_gguf",
    "from_stock",
    "last_whole_checkpoint",
    "load_lora",
    "merge_into_safetensors",
    "restore_gguf",
    "to_gguf",
    "to_lora",
    "to_stock",
]
