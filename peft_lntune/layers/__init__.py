"""The tuner layers: state machines around or beside a module, one kind per method."""

from peft_lntune.layers.bottleneck import BottleneckLayer
from peft_lntune.layers.inserted import InsertedLayer
from peft_lntune.layers.module import ModuleLayer
from peft_lntune.layers.norm import NormLayer
from peft_lntune.layers.prefix import PrefixLayer
from peft_lntune.layers.replacing import PARAMETERS, ReplacementLayer
from peft_lntune.layers.switched import switched_off, unmerged_layers

__all__ = [
    "PARAMETERS",
    "BottleneckLayer",
    "InsertedLayer",
    "ModuleLayer",
    "NormLayer",
    "PrefixLayer",
    "ReplacementLayer",
    "switched_off",
    "unmerged_layers",
]
