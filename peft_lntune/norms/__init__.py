"""Find the norms of a model, and run a norm with other parameters than its own."""

from peft_lntune.norms.find import Missed, Norm, find_missed, find_norms

__all__ = ["Missed", "Norm", "find_missed", "find_norms"]
