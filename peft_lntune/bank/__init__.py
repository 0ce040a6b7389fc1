"""Thousands of adapters of one model in few tensors, served row by row."""

from peft_lntune.bank.adapter_bank import AdapterBank

__all__ = ["AdapterBank"]
