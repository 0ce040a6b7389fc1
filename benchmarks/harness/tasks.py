"""Classification tasks: rows with GLUE's columns, tokenized once, in batches of about equal length."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HUB_NAMES = {"trec": ("CogComp/trec", None)}  # the others are GLUE's
TEXT_COLUMNS = {
    "sst2": ("sentence",),
    "trec": ("text",),
    "cola": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
}
LABEL_COLUMNS = {"trec": ("label", "coarse_label")}  # the Hub's copy calls the six classes coarse_label
POOL = 16  # batches that are sorted by length together: little padding, still a random order
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """Tokenized rows: `tokens[i]` are the ids of row i, `labels[i]` its class."""

    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad: int

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.labels)

    def take(self, indices: list[int]) -> "Split":
        """Return the chosen rows, in the order given."""
        return Split(tuple(self.tokens[i] for i in indices), tuple(self.labels[i] for i in indices), self.pad)

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        """Pad the chosen rows to the longest of them: `input_ids`, `attention_mask` (B, T) and `labels` (B,)."""
        length = max(len(self.tokens[i]) for i in indices)
        ids = torch.tensor([[*self.tokens[i], *[self.pad] * (length - len(self.tokens[i]))] for i in indices])
        sizes = torch.tensor([len(self.tokens[i]) for i in indices])
        mask = (torch.arange(length) < sizes[:, None]).long()
        labels = torch.tensor([self.labels[i] for i in indices])
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


@dataclass(frozen=True)
class Task:
    """A training and a validation split, and the number of classes."""

    name: str
    train: Split
    validation: Split
    num_labels: int

    def held_out(self) -> "Task":
        """Return a task of the training rows alone, a tenth of them (1,000 at most) held out as its validation split.

        Learning rates are chosen on it, so that the reported split never chooses anything.
        """
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0)).tolist()
        size = min(1000, len(order) // 10)
        return Task(self.name, self.train.take(order[size:]), self.train.take(order[:size]), self.num_labels)


def batches(split: Split, size: int, steps: int, seed: int, device: torch.device) -> Iterator[Batch]:
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


def ordered_batches(split: Split, size: int, device: torch.device) -> Iterator[Batch]:
    """Yield every row once, sorted by length."""
    order = sorted(range(len(split)), key=lambda i: len(split.tokens[i]))
    for start in range(0, len(order), size):
        yield split.batch(order[start : start + size], device)


def _epoch(split: Split, size: int, generator: torch.Generator) -> list[list[int]]:
    """Return the batches of one pass; the last, incomplete one is dropped unless it is the only one."""
    order = torch.randperm(len(split), generator=generator).tolist()
    found = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lambda i: len(split.tokens[i]))
        found += [pool[i : i + size] for i in range(0, len(pool), size)]
    whole = [chosen for chosen in found if len(chosen) == size] or found
    return [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]


@lru_cache(maxsize=8)
def load_task(name: str, data_dir: Path | None, model: str, max_length: int = 128) -> Task:
    """Load and tokenize a task.

    Args:
        name: of `TEXT_COLUMNS`.
        data_dir: a folder of `<task>/{train,validation}.jsonl`; None loads the task from the Hub.
        model: folder or Hub id whose tokenizer is used.
        max_length: longer rows are cut.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    raw = _read(name, data_dir)
    splits = {}
    for part in ("train", "validation"):
        columns = [[str(row[column]) for row in raw[part]] for column in TEXT_COLUMNS[name]]
        tokens = tokenizer(*columns, truncation=True, max_length=max_length)["input_ids"]
        splits[part] = Split(tuple(map(tuple, tokens)), tuple(_labels(name, raw[part])), tokenizer.pad_token_id or 0)
    labels = set(splits["train"].labels)
    return Task(name, splits["train"], splits["validation"], max(labels) + 1)


def _read(name: str, data_dir: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the two splits; where the Hub has no validation split, its test split stands for it."""
    if data_dir is not None:
        files = {part: data_dir / name / f"{part}.jsonl" for part in ("train", "validation")}
        lines = {part: path.read_text(encoding="utf-8").split("\n") for part, path in files.items()}
        return {part: [json.loads(line) for line in lines[part] if line] for part in lines}
    import datasets

    found = datasets.load_dataset(*HUB_NAMES.get(name, ("nyu-mll/glue", name)))
    return {"train": list(found["train"]), "validation": list(found["validation" if "validation" in found else "test"])}


def _labels(name: str, rows: list[dict[str, Any]]) -> list[int]:
    for column in LABEL_COLUMNS.get(name, ("label",)):
        if column in rows[0]:
            return [int(row[column]) for row in rows]
    raise ValueError(f"Task {name} has no label column; its columns are {sorted(rows[0])}.")
