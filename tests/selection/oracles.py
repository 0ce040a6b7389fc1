"""The slow and obviously right way to Fisher scores: one sample, one forward, one backward."""

import torch

from peft_lntune.selection.parameters import find_parameters


def loop_scores(model, batches, loss=None, parameters=None):
    """The mean of squared gradients; `loss(outputs, batch)` of a batch of one sample, or None for the model's own."""
    found = find_parameters(model, parameters)
    model.eval()
    model.requires_grad_(True)
    wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in found.items()}
    sums = {name: torch.zeros(p.shape, dtype=wide[name]) for name, p in found.items()}
    samples = 0
    for batch in batches:
        size = len(next(iter(batch.values())))
        for row in range(size):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            model.zero_grad()
            outputs = model(**one)
            value = outputs["loss"] if loss is None else loss(outputs, one).sum()
            value.backward()
            for name, parameter in found.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.to(wide[name]).square()
            samples += 1
    model.zero_grad()
    return {name: total / samples for name, total in sums.items()}
