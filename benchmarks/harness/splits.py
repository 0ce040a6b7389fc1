"""Rows of a task, tokenized once, and batches of about equal length that are the same for every arm."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

POOL = 16  # batches that are sorted by length together: little padding, still a random order
IGNORED = -100  # the label that a loss leaves out
Batch = dict[str, Tensor]
Label = int | float | tuple[int, ...]


class Data(Protocol):
    """The rows of one split, whatever a row is."""

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each row."""

    def __len__(self) -> int:
        """Count the rows."""

    def take(self, indices: list[int]) -> "Data":
        """Return the chosen rows, in the order given."""

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        """Return what a model is called with for the chosen rows."""


@dataclass(frozen=True)
class Split:
    """Tokenized rows: `tokens[i]` are the ids of row i, `labels[i]` its class, its value, or a class for each token."""

    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[Label, ...]
    pad: int

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each row."""
        return [len(tokens) for tokens in self.tokens]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.labels)

    def take(self, indices: list[int]) -> "Split":
        """Return the chosen rows, in the order given."""
        return Split(tuple(self.tokens[i] for i in indices), tuple(self.labels[i] for i in indices), self.pad)

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        """Pad the chosen rows to the longest of them.

        Returns:
            `input_ids` and `attention_mask` (B, T), `labels` (B,) or, where each token has one, (B, T).
        """
        inputs = pad_rows([self.tokens[i] for i in indices], self.pad)
        chosen = [self.labels[i] for i in indices]
        each = [label for label in chosen if isinstance(label, tuple)]
        labels = pad_rows(each, IGNORED)["input_ids"] if each else torch.tensor(chosen)
        return {name: values.to(device) for name, values in {**inputs, "labels": labels}.items()}


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> Batch:
    """Pad rows on the right to the longest of them: `input_ids` and `attention_mask`, (B, T)."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows])
    sizes = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < sizes[:, None]).long()}


def batches(split: Data, size: int, steps: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Yield `steps` shuffled batches, going through the rows as often as it takes.

    The order depends on the seed alone, so every arm sees the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    given = 0
    while given < steps:
        for indices in _epoch(split, size, generator):
            if given == steps:
                return
            given += 1
            yield split.batch(indices, device)


def ordered(split: Data, size: int) -> Iterator[list[int]]:
    """Yield the numbers of the rows of each batch of `ordered_batches`."""
    lengths = split.lengths
    order = sorted(range(len(split)), key=lambda i: lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def ordered_batches(split: Data, size: int, device: torch.device) -> Iterator[Batch]:
    """Yield every row once, sorted by length."""
    for indices in ordered(split, size):
        yield split.batch(indices, device)


def _epoch(split: Data, size: int, generator: torch.Generator) -> list[list[int]]:
    """Return the batches of one pass; the last, incomplete one is dropped unless it is the only one."""
    order, lengths = torch.randperm(len(split), generator=generator).tolist(), split.lengths
    found = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lambda i: lengths[i])
        found += [pool[i : i + size] for i in range(0, len(pool), size)]
    whole = [chosen for chosen in found if len(chosen) == size] or found
    return [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
