"""LN-tuning: the gain and bias of all norms, or of the norms of some roles and layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft_lntune.config.base import check_roles, part_kind
from peft_lntune.config.deltas import DeltaConfig
from peft_lntune.core.choices import ROLES, Role

__all__ = ["LNTuningConfig"]


@part_kind
@dataclass(kw_only=True)
class LNTuningConfig(DeltaConfig):
    """Tune the normalization layers of a model. `LNTuningConfig()` alone is complete: every norm, gain and bias.

    PEFT has a config of the same name that copies whole norms, in their own dtype. This one trains float32 deltas, so
    it learns over a bfloat16 base, and its adapters can be mixed in a batch, summed, merged and unmerged.
    docs/methods/ln_tuning.md says when to use which.

    Source: Qi et al. 2022 (arXiv 2211.08682); Zhao et al. 2023 (arXiv 2312.11420).

    Args:
        tune: `"weight"` (the gain), `"bias"`, or `"both"`.
        roles: only norms of these roles: `"attention"`, `"cross_attention"`, `"ffn"`, `"mixer"`, `"qk"`,
            `"embedding"`, `"final"`. A norm's role is the sub-layer it feeds (pre-norm) or closes (post-norm).
            None: all norms, including norms of unknown role.
        target_modules: names of modules to tune instead of the norms found, of any class with a floating weight.
        mask_source: how the mask was made if only some entries are tuned: the method and its settings, or the adapters
            it was combined from; never data. Filled in.

    Further arguments: see `LNTuneConfig`.

    Raises:
        ConfigError: a field has a value that is not allowed.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2))
        >>> peft_model = get_peft_model(model, LNTuningConfig(tune="bias", roles=["attention"]))
        >>> [name for name, p in peft_model.named_parameters() if p.requires_grad][0]
        'base_model.model.encoder.layer.0.attention.output.LayerNorm.lntune_bias.default.weight'
    """

    roles: Sequence[Role] | None = None

    def _check(self) -> None:
        super()._check()
        if self.roles is not None:
            check_roles(self, ROLES, "norms")
