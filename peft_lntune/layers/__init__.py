"""The tuner layers: one state machine, and what is particular to norms and to other modules."""

from peft_lntune.layers.base import PARAMETERS, LNTuneLayer
from peft_lntune.layers.module import ModuleLayer
from peft_lntune.layers.norm import NormLayer

__all__ = ["PARAMETERS", "LNTuneLayer", "ModuleLayer", "NormLayer"]
