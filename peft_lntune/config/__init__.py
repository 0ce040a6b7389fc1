"""The family of configs: choices and provenance, never a tensor and never a callable."""

from peft_lntune.config.base import FORMAT_VERSION, LNTuneConfig
from peft_lntune.config.fisher_ln import FisherLNConfig
from peft_lntune.config.ln_tuning import LNTuningConfig
from peft_lntune.config.stored import KINDS, StoredConfig

__all__ = ["FORMAT_VERSION", "KINDS", "FisherLNConfig", "LNTuneConfig", "LNTuningConfig", "StoredConfig"]
