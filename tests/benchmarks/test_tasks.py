"""Batches: the same for every arm, nothing lost, held-out rows never trained on."""

from pathlib import Path

import pytest
import torch

from benchmarks.harness.splits import batches, ordered_batches
from benchmarks.harness.tasks import Task, load_task

CPU = torch.device("cpu")


@pytest.fixture
def task(tiny_bert: str, tiny_data: Path) -> Task:
    return load_task("sst2", tiny_data, tiny_bert)


def test_the_seed_alone_decides_the_batches(task: Task) -> None:
    first, again, other = ([batch["input_ids"] for batch in batches(task.train, 4, 15, s, CPU)] for s in (0, 0, 1))
    assert len(first) == 15
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_evaluation_sees_every_row_once(task: Task) -> None:
    labels = torch.cat([batch["labels"] for batch in ordered_batches(task.validation, 5, CPU)])
    assert sorted(labels.tolist()) == sorted(task.validation.labels)


def test_held_out_rows_come_from_training_and_are_not_trained_on(task: Task) -> None:
    held = task.held_out()
    assert len(held.train) + len(held.validation) == len(task.train)
    assert sorted(held.train.tokens + held.validation.tokens) == sorted(task.train.tokens)


def test_the_mask_covers_the_tokens(task: Task) -> None:
    batch = next(iter(batches(task.train, 4, 1, 0, CPU)))
    assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != task.train.pad)
