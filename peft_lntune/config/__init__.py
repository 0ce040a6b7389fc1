"""The family of configs: choices and provenance, never a tensor and never a callable."""

from peft_lntune.config.base import FORMAT_VERSION, LNTuneConfig
from peft_lntune.config.bottleneck import BottleneckConfig
from peft_lntune.config.deltas import DeltaConfig
from peft_lntune.config.fisher_ln import FisherLNConfig
from peft_lntune.config.ln_tuning import LNTuningConfig
from peft_lntune.config.module_tuning import ModuleTuningConfig
from peft_lntune.config.prefix import PrefixConfig
from peft_lntune.config.stored import KINDS, StoredConfig
from peft_lntune.config.supermask import SupermaskConfig
from peft_lntune.config.unified import UnifiedConfig, parts_of, record_mask

__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "BottleneckConfig",
    "DeltaConfig",
    "FisherLNConfig",
    "LNTuneConfig",
    "LNTuningConfig",
    "ModuleTuningConfig",
    "PrefixConfig",
    "StoredConfig",
    "SupermaskConfig",
    "UnifiedConfig",
    "parts_of",
    "record_mask",
]
