"""How good a damaged model is: perplexity, and divergence from its teacher."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_lntune.errors import DataError
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
        DataError: there are no batches, or no token has one before it.
    """
    training = model.training
    model.eval()
    loss = gap = torch.zeros((), dtype=torch.float64)
    tokens = positions = 0
    try:
        for batch in batches:
            logits, ids = logits_of(model, batch), batch["input_ids"]
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
