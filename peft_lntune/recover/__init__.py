"""Repair of a damaged model (quantized, pruned): its norms are tuned until it answers as the undamaged model did."""

from peft_lntune.recover.distill import distill
from peft_lntune.recover.divergence import divergence
from peft_lntune.recover.pairs import check_pair, logits_of, recovery_config
from peft_lntune.recover.quality import Quality, quality
from peft_lntune.recover.repair import Recovery, recover

__all__ = [
    "Quality",
    "Recovery",
    "check_pair",
    "distill",
    "divergence",
    "logits_of",
    "quality",
    "recover",
    "recovery_config",
]
