"""LN-tuning: the gain and bias of norms, all of them or those of some roles and layers."""

from dataclasses import dataclass

from peft_lntune.architectures.roles import ROLES
from peft_lntune.config.base import check_names, part_kind
from peft_lntune.config.deltas import DeltaConfig
from peft_lntune.errors import ConfigError

__all__ = ["LNTuningConfig"]


@part_kind
@dataclass(kw_only=True)
class LNTuningConfig(DeltaConfig):
    """Tune the normalization layers of a model. `LNTuningConfig()` alone is complete: every norm, gain and bias.

    PEFT has a config of the same name with another mechanism (it copies whole norms, in their own dtype). This one
    trains float32 deltas, so it learns over a bf16 base, mixes in a batch, adds, merges and unmerges; see
    docs/methods/ln_tuning.md for when to use which.

    Source: Qi et al. 2022 (arXiv 2211.08682); Zhao et al. 2023 (arXiv 2312.11420).

    Args:
        tune: `"weight"` (the gain), `"bias"`, or `"both"`.
        roles: only norms of these roles: `"attention"`, `"cross_attention"`, `"ffn"`, `"mixer"`, `"qk"`,
            `"embedding"`, `"final"`. A norm's role is the sub-layer it feeds (pre-norm) or closes (post-norm).
            None: norms of every role, and those whose role is unknown.
        target_modules: instead of the search for norms, these modules, of any class with a floating weight.
        mask_source: where only some entries are tuned, how their mask was made: the method and its settings, or what it
            was combined from; never data. Filled in.

    Further arguments: see `LNTuneConfig`.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2))
        >>> peft_model = get_peft_model(model, LNTuningConfig(tune="bias", roles=["attention"]))
        >>> [name for name, p in peft_model.named_parameters() if p.requires_grad][0]
        'base_model.model.encoder.layer.0.attention.output.LayerNorm.lntune_bias.default.weight'
    """

    roles: list[str] | None = None

    def _check(self) -> None:
        super()._check()
        if self.roles is None:
            return
        if isinstance(self.roles, str):
            self.roles = [self.roles]
        check_names(self, "roles", one_string=False)
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            raise ConfigError(f"roles={self.roles!r}: choose one or more of {', '.join(map(repr, ROLES))}.")
        if self.target_modules is not None:
            raise ConfigError(
                f"roles={self.roles!r} narrows the search for norms, but target_modules={self.target_modules!r} "
                "replaces that search. Give one of the two."
            )
