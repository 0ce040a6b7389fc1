"""Named entities: wnut_17, read, tokenized and scored by the code of `examples/token_classification.py`."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.evaluation import EVALUATION_BATCH
from benchmarks.harness.models import Head
from benchmarks.harness.splits import IGNORED, Split, ordered_batches
from benchmarks.harness.tasks import Task, loads

NAME = "wnut_17"
TYPES = ("corporation", "creative-work", "group", "location", "person", "product")
TAGS = ("O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI"))  # in the order of the Hub's numbers


@loads(NAME)
def load_tagging(name: str, data_dir: Path | None, model: str) -> Task:
    """Load words with tags; the first piece of a word carries its tag."""
    from token_classification import read_tagged, tagging_task

    parts = read_tagged(data_dir and data_dir / name, names=TAGS)
    example = tagging_task(parts, model)
    splits = {}
    for part, rows in parts.items():
        encoded = [example.collator([row]) for row in rows]
        tokens, labels = (tuple(tuple(row[key][0].tolist()) for row in encoded) for key in ("input_ids", "labels"))
        splits[part] = Split(tokens, labels, example.tokenizer.pad_token_id or 0)
    return Task(name, **splits, head=Head(example.auto_class, example.head), evaluate=entity_scores)


@torch.no_grad()
def entity_scores(model: Any, split: Split, device: torch.device) -> dict[str, float]:
    """Return precision, recall and F1 of whole entities; words beyond the longest row a model reads do not count."""
    from metrics import score

    model.eval()
    names = model.config.id2label
    found: list[list[str]] = []
    true: list[list[str]] = []
    for batch in ordered_batches(split, EVALUATION_BATCH, device):
        labels = batch.pop("labels")
        classes = model(**batch).logits.argmax(-1)
        for right, answered in zip(labels, classes, strict=True):
            words = right != IGNORED
            true.append([names[i] for i in right[words].tolist()])
            found.append([names[i] for i in answered[words].tolist()])
    return score("entities", found, true)
