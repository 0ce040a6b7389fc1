"""Scores of a trained model over a whole split."""

import torch
from torch import nn

from benchmarks.harness.splits import Split, ordered_batches

EVALUATION_BATCH = 64


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
    """Return the share of rows whose class is predicted."""
    model.eval()
    right = 0
    for batch in ordered_batches(split, EVALUATION_BATCH, device):
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return {"accuracy": right / len(split)}


@torch.no_grad()
def correlations(model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
    """Return how predicted and true values go together, by value and by rank; 0 where all predictions are equal."""
    from metrics import score

    model.eval()
    found: list[float] = []
    true: list[float] = []
    for batch in ordered_batches(split, EVALUATION_BATCH, device):
        true += batch.pop("labels").tolist()
        found += model(**batch).logits[:, 0].tolist()
    if len(set(found)) == 1:
        return {"pearson": 0.0, "spearmanr": 0.0}
    return score("stsb", found, true)
