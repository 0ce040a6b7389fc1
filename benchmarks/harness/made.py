"""Batches of made-up tokens, for measurements that do not depend on the tokens."""

import torch
from torch import Tensor


def made_inputs(
    rows: int, tokens: int, device: torch.device, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return random tokens without padding, `(rows, tokens)`.

    Args:
        rows: of the batch.
        tokens: of each row.
        device: where the batch goes.
        generator: for several batches that differ; None: every call makes the same.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    ids = torch.randint(1, 200, (rows, tokens), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def made_batch(
    rows: int, tokens: int, device: torch.device, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return `made_inputs` with a label of two classes for each row."""
    inputs = made_inputs(rows, tokens, device, generator)
    return {**inputs, "labels": inputs["input_ids"][:, 0] % 2}
