"""LN-tuning of the entries that Fisher information chooses."""

from dataclasses import dataclass

from peft_lntune.config.base import check_choice, check_type, part_kind
from peft_lntune.config.ln_tuning import LNTuningConfig
from peft_lntune.core.choices import FISHER_KINDS, SCOPES, FisherKind, Scope
from peft_lntune.errors import ConfigError
from peft_lntune.selection.select import check_whole

__all__ = ["FisherLNConfig"]


@part_kind
@dataclass(kw_only=True)
class FisherLNConfig(LNTuningConfig):
    """Tune the entries of the norms that matter most for a task: those with the largest Fisher information.

    The adapter starts with every entry, as with `LNTuningConfig`. Then `fit_fisher_masks` scores the entries on batches
    of the task and keeps the best. This is a separate step, because it needs data and makes new parameters: call it
    before making the optimizer. A mask made in another way can be set with `set_masks` instead.

    Source: ValizadehAslani and Liang 2024 (arXiv 2403.20284).

    Args:
        density: fraction of the entries to tune, above 0 and at most 1.
        fisher: which Fisher information: `"empirical"` uses the labels of the data, `"mc"` draws labels from the model,
            `"exact"` takes the expectation over the model's classes.
        scope: what `density` applies to: all entries together (`"global"`), each parameter (`"tensor"`), or each layer
            (`"layer"`).
        num_samples: how many samples to look at.
        seed: seed of the labels that `"mc"` draws.
        max_per_norm: tune at most this many entries of each norm, weight and bias together. An adapter of RMSNorms with
            at most 64 exports exactly as LoRA of rank 64 (`peft_lntune.interop.to_lora`); `density=1.0` takes as many
            of each norm. None: no limit.

    Further arguments: see `LNTuningConfig` and `LNTuneConfig`.

    Raises:
        ConfigError: a field has a value that is not allowed.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
        >>> model = BertForSequenceClassification(config)
        >>> peft_model = get_peft_model(model, FisherLNConfig(task_type="SEQ_CLS", density=0.1))
        >>> peft_model.peft_config["default"].mask_source is None  # not fitted yet
        True
    """

    density: float = 0.2
    fisher: FisherKind = "empirical"
    scope: Scope = "global"
    num_samples: int = 1024
    seed: int = 0
    max_per_norm: int | None = None

    @property
    def chooses_entries(self) -> bool:
        """True: a mask will be fitted."""
        return True

    def _check(self) -> None:
        super()._check()
        check_choice(self, "fisher", FISHER_KINDS)
        check_choice(self, "scope", SCOPES)
        for name in ("num_samples", "seed"):
            check_type(self, name, int)
        if type(self.density) not in (int, float) or not 0 < self.density <= 1:
            raise ConfigError(
                f"density={self.density!r} should be a number above 0 and at most 1: the fraction of entries to tune."
            )
        if self.num_samples < 1:
            raise ConfigError(f"num_samples={self.num_samples} should be at least 1: how many samples to look at.")
        if self.max_per_norm is not None:
            check_whole("max_per_norm", self.max_per_norm, "entries")
