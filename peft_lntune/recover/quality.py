"""How good a damaged model is: perplexity, and divergence from its teacher."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lntune.core.module_tree import base_model
from peft_lntune.errors import DataError, UnsupportedError
from peft_lntune.recover.divergence import divergence
from peft_lntune.recover.pairs import Batch, logits_of, mask_of

__all__ = ["Quality", "quality"]


class Quality(NamedTuple):
    """How good a causal language model is on some texts.

    Attributes:
        perplexity: exp of the mean negative log likelihood of a token.
        divergence: KL(teacher || model), in nats per position.
    """

    perplexity: float
    divergence: float


@torch.no_grad()
def quality(model: nn.Module, teacher: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> Quality:
    """Measure a causal language model against its teacher.

    Args:
        model: the model, plain or with adapters.
        teacher: `batch -> logits` of the undamaged model.
        batches: dicts with `input_ids` `(B, L)` and other inputs, on the model's device.

    Returns:
        Perplexity and divergence, over all positions that the attention mask keeps.

    Raises:
        UnsupportedError: the model is an encoder-decoder, or its answers are not one per token.
        DataError: there are no batches, or no token has one before it.
    """
    if getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(base_model(model)).__name__} is an encoder-decoder, and perplexity is that of the input of a "
            "causal language model. Compare its answers with those of the teacher by divergence alone."
        )
    training = model.training
    model.eval()
    loss = gap = torch.zeros((), dtype=torch.float64)
    tokens = positions = 0
    try:
        for batch in batches:
            logits, ids = logits_of(model, batch), batch["input_ids"]
            if logits.shape[:-1] != ids.shape:
                raise UnsupportedError(
                    f"perplexity needs logits of shape {tuple(ids.shape)} and one per token of the vocabulary, and "
                    f"{type(base_model(model)).__name__} returns {tuple(logits.shape)}. Load it with "
                    "AutoModelForCausalLM."
                )
            mask = mask_of(batch, logits)
            kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            said = kept[:, 1:] & kept[:, :-1]
            unlikely = F.cross_entropy(logits[:, :-1][said].float(), ids[:, 1:][said], reduction="sum")
            loss = loss + unlikely.double().cpu()
            count = int(kept.sum())
            gap = gap + count * divergence(logits, teacher(batch), mask).double().cpu()
            tokens, positions = tokens + int(said.sum()), positions + count
    finally:
        model.train(training)
    if not tokens:
        raise DataError("no token has another one before it, so there is no perplexity. Give longer texts.")
    return Quality(float((loss / tokens).exp()), float(gap) / positions)
