"""Tasks: two splits, a head, and how answers are scored. Here: classification and regression with GLUE's columns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.evaluation import accuracy, correlations
from benchmarks.harness.models import Head, classes
from benchmarks.harness.splits import Data, Split
from peft_lntune.cli.data import read_table

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
SIMILARITY = {"stsb": ("sentence1", "sentence2")}  # the label is a number
LABEL_COLUMNS = {"trec": ("label", "coarse_label")}  # the Hub's copy calls the six classes coarse_label
Load = Callable[[str, Path | None, str], "Task"]


@dataclass(frozen=True)
class Task:
    """A training and a validation split, the head of its models, and what scores them.

    Attributes:
        name: as in cells.
        train: rows to train on.
        validation: rows to score.
        head: what a model of this task ends in.
        evaluate: model, rows and device -> the task's figures, see `metrics.metric_of`.
    """

    name: str
    train: Data
    validation: Data
    head: Head
    evaluate: Callable[[nn.Module, Any, torch.device], dict[str, float]]

    def held_out(self, most: int = 1000) -> "Task":
        """Return a task of the training rows alone, a tenth of them (`most` at most) held out as its validation split.

        Learning rates are chosen on it, so that the reported split never chooses anything.
        """
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0)).tolist()
        size = min(most, len(order) // 10)
        return replace(self, train=self.train.take(order[size:]), validation=self.train.take(order[:size]))

    def first(self, most: int | None) -> "Task":
        """Return the task with at most this many validation rows, drawn once; None keeps all."""
        if most is None or most >= len(self.validation):
            return self
        order = torch.randperm(len(self.validation), generator=torch.Generator().manual_seed(0)).tolist()
        return replace(self, validation=self.validation.take(order[:most]))

    def score(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Return the figures of a model on the validation split."""
        return self.evaluate(model, self.validation, device)


LOADERS: dict[str, Load] = {}


def loads(name: str) -> Callable[[Load], Load]:
    """Register a function that loads the task `name`: name, folder of the data, model -> the task."""

    def add(load: Load) -> Load:
        if name in LOADERS:
            raise ValueError(f"There is a loader of {name} already; there are {sorted(LOADERS)}.")
        LOADERS[name] = load
        return load

    return add


@lru_cache(maxsize=8)
def load_task(name: str, data_dir: Path | None, model: str) -> Task:
    """Load and tokenize a task.

    Args:
        name: of `TEXT_COLUMNS`, `SIMILARITY` or `LOADERS`.
        data_dir: a folder of `<task>/{train,validation}.jsonl`; None loads the task from the Hub.
        model: folder or Hub id whose tokenizer is used.
    """
    return LOADERS.get(name, load_texts)(name, data_dir, model)


def load_texts(name: str, data_dir: Path | None, model: str, max_length: int = 128) -> Task:
    """Load a task of sentences or pairs, each with a class or a value; longer rows than `max_length` are cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    columns = {**TEXT_COLUMNS, **SIMILARITY}[name]
    raw = read_rows(name, data_dir)
    splits, labels = {}, {part: _labels(name, rows) for part, rows in raw.items()}
    for part in ("train", "validation"):
        texts = [[str(row[column]) for row in raw[part]] for column in columns]
        tokens = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
        splits[part] = Split(tuple(map(tuple, tokens)), tuple(labels[part]), tokenizer.pad_token_id or 0)
    if name in SIMILARITY:
        return Task(name, **splits, head=classes(1), evaluate=correlations)
    return Task(name, **splits, head=classes(int(max(labels["train"])) + 1), evaluate=accuracy)


def read_rows(name: str, data_dir: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of the two splits; where the Hub has no validation split, its test split stands for it."""
    if data_dir is not None:
        return {part: read_table(data_dir / name / f"{part}.jsonl").to_list() for part in ("train", "validation")}
    import datasets

    found = datasets.load_dataset(*HUB_NAMES.get(name, ("nyu-mll/glue", name)))
    return {"train": list(found["train"]), "validation": list(found["validation" if "validation" in found else "test"])}


def _labels(name: str, rows: list[dict[str, Any]]) -> list[int] | list[float]:
    for column in LABEL_COLUMNS.get(name, ("label",)):
        if column in rows[0]:
            return [float(row[column]) if name in SIMILARITY else int(row[column]) for row in rows]
    raise ValueError(f"Task {name} has no label column; its columns are {sorted(rows[0])}.")
