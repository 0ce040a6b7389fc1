"""Masks over frozen weights: learning by switching off."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft_lntune.architectures.table import LAYER_MATRICES, MATRICES, Component, MatrixName
from peft_lntune.config.base import LNTuneConfig, check_type, part_kind
from peft_lntune.config.components import check_components
from peft_lntune.errors import ConfigError

__all__ = ["SupermaskConfig"]


@part_kind
@dataclass(kw_only=True)
class SupermaskConfig(LNTuneConfig):
    """Learn which weights to switch off, without changing any: sparsified fine-tuning. The adapter is 1 bit per weight.

        w_eff = w if keep else 0            keep = Bernoulli(sigmoid(score)) in training, score > 0 otherwise

    Each weight has a trained score, with a straight-through gradient. Like dropout, masks are drawn only after
    `model.train()`. Training keeps the scores, their gradients and the optimizer's state in memory (16 bytes per weight
    with AdamW). A saved adapter, and an adapter loaded without `is_trainable=True`, holds only bits. Use learning rates
    of 1e-2 to 3e-1 and no weight decay, which would pull every score towards a probability of 0.5. To train a head
    densely, use `modules_to_save` (or a `task_type`).

    Source: Radiya-Dixit and Wang 2020 (arXiv 2004.14129).

    Args:
        components: one or more of `"query"`, `"key"`, `"value"`, `"attention_output"`, `"ffn_up"`, `"ffn_gate"`,
            `"ffn_down"`, `"embedding"`, `"pooler"`. If a model holds several in one matrix, only that part of the
            matrix is masked. None: all up to `"ffn_down"`.
        target_modules: names of modules to mask instead of `components`, of any class with a floating weight except
            norms.
        initial_sparsity: fraction of each tensor that starts switched off, the smallest weights first.
        initial_score: size of the initial scores: `sigmoid(initial_score)` is the probability that an entry is drawn in
            its initial state, 0.993 for 5.
        layers_to_exclude: index or indices of layers to leave out.
        save_scores: also save the scores, so that training can be resumed without a break. They are saved in
            `save_dtype`; in float32 they take 32 times the size of the bits.

    Further arguments: see `LNTuneConfig`; `delta_dtype` is the dtype of the scores.

    Raises:
        ConfigError: a field has a value that is not allowed.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2))
        >>> peft_model = get_peft_model(model, SupermaskConfig(components=["query"], initial_sparsity=0.25))
        >>> [name for name, p in peft_model.named_parameters() if p.requires_grad]
        ['base_model.model.encoder.layer.0.attention.self.query.lntune_supermask.default.weight']
    """

    components: Sequence[MatrixName | Component] | None = None
    initial_sparsity: float = 0.0
    initial_score: float = 5.0
    layers_to_exclude: list[int] | int | None = None
    save_scores: bool = False

    def _check(self) -> None:
        super()._check()
        if self.components is not None and self.target_modules is not None:
            raise ConfigError("give one of components and target_modules, or neither, but got both.")
        if self.components is None and self.target_modules is None:
            self.components = list(LAYER_MATRICES)
        check_components(self, MATRICES)
        check_type(self, "save_scores", bool)
        for name in ("initial_sparsity", "initial_score"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{name} takes a number, but got {value!r} of type {type(value).__name__}.")
            setattr(self, name, float(value))
        if not 0 <= self.initial_sparsity < 1:
            raise ConfigError(
                f"initial_sparsity={self.initial_sparsity} should be at least 0 and below 1: the fraction of each "
                "tensor that starts switched off."
            )
        if not 0 < self.initial_score <= 15:
            raise ConfigError(
                f"initial_score={self.initial_score} should be above 0 and at most 15, where sigmoid still has a slope."
            )

    @property
    def masks_are_fixed(self) -> bool:
        """Whether the adapter holds only bits, because it was loaded for inference."""
        return bool(self.inference_mode)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the masked parameters."""
        return ("weight",)
