"""Tune a model to find named entities: the names of people, places, products and the like, in tweets of wnut_17.

    python examples/token_classification.py --model bert-base-cased                # data from the Hub
    python examples/token_classification.py --data-dir my_data --method head ln full

Local files are train and validation, .jsonl or .parquet, with a list of words and a list of tags in each row:

    {"tokens": ["Rick", "lives", "in", "New", "York"], "ner_tags": ["B-person", "O", "O", "B-location", "I-location"]}

A word is cut into pieces, and its first piece carries its tag. An entity is right if all its words and its type are.
What is saved is loaded into a fresh model, which has to answer bit for bit as the trained one did.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from metrics import score
from task_data import MAX_TOKENS, DataError, find_columns, load_parts
from training import Task, add_options, compare, default_model, load_tokenizer, quiet
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

TYPES = ("corporation", "creative-work", "group", "location", "person", "product")
WNUT_TAGS = ["O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI")]  # in the order of the Hub's numbers
IGNORED = -100  # the label that the loss leaves out


def tag_names(parts: dict[str, datasets.Dataset], source: str) -> Sequence[str] | None:
    """What numbers in `ner_tags` stand for: the names that come with them or wnut_17's. None where tags are text."""
    kind = getattr(parts["train"].features["ner_tags"], "feature", None)
    if "string" in getattr(kind, "dtype", ""):
        return None
    names = kind.names if isinstance(kind, datasets.ClassLabel) else WNUT_TAGS
    strange = {tag for rows in parts.values() for tags in rows["ner_tags"] for tag in tags} - set(range(len(names)))
    if strange:
        wanted = f"lists of text such as B-person, or of the numbers 0 to {len(names) - 1} of {', '.join(names)}"
        raise DataError(f"{source}: ner_tags has to be {wanted}; found {min(strange)!r}")
    return names


def read_tagged(data_dir: Path | None) -> dict[str, datasets.Dataset]:
    """Both parts, with a list of `tokens` and an equally long one of `ner_tags` as text in each row."""
    # the revision that the Hub has converted: on the main one wnut_17 is a script, which `datasets` no longer runs
    source, parts = load_parts(data_dir, "leondz/wnut_17", revision="refs/convert/parquet")
    find_columns(parts, [("tokens", "ner_tags")], source)
    names, tagged = tag_names(parts, source), {}
    for part, rows in parts.items():
        words, tags = rows["tokens"][:], rows["ner_tags"][:]
        for i, (w, t) in enumerate(zip(words, tags, strict=True)):
            if len(w) != len(t):
                raise DataError(f"{source} ({part}): row {i} has {len(w)} tokens and {len(t)} ner_tags")
        named = tags if names is None else [[names[tag] for tag in row] for row in tags]
        tagged[part] = datasets.Dataset.from_dict({"tokens": words, "ner_tags": named})
    return tagged


@dataclass(frozen=True)
class Tagger:
    """Words and tags to batches, and logits back to tags; `tags` names the classes."""

    tokenizer: PreTrainedTokenizerBase
    tags: list[str]

    def encode(self, rows: Sequence[Sequence[str]]) -> tuple[Any, list[dict[int, int]]]:
        """A padded batch, (B, T), and for each row where the first piece of a word is: {word: position}."""
        batch = self.tokenizer(
            list(rows),
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        places: list[dict[int, int]] = [{} for _ in rows]
        for i, place in enumerate(places):
            for position, word in enumerate(batch.word_ids(i)):
                if word is not None:
                    place.setdefault(word, position)
        return batch, places

    def __call__(self, rows: list[dict]) -> dict:
        """Token ids, masks and labels, each (B, T)."""
        batch, places = self.encode([row["tokens"] for row in rows])
        labels = torch.full(batch["input_ids"].shape, IGNORED)
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            for word, position in place.items():
                labels[i, position] = self.tags.index(row["ner_tags"][word])
        return {**batch, "labels": labels}

    def decode(self, rows: Sequence[Sequence[str]], logits: np.ndarray) -> list[list[str]]:
        """A tag for each word, from logits (N, T, C). A word that the model did not see, being cut off, gets O."""
        classes, (_, places) = logits.argmax(-1), self.encode(rows)
        return [
            [self.tags[classes[i, place[word]]] if word in place else "O" for word in range(len(words))]
            for i, (words, place) in enumerate(zip(rows, places, strict=True))
        ]


def tagging_task(parts: dict[str, datasets.Dataset], model: str) -> Task:
    """The task for one checkpoint's tokenizer."""
    # byte-level tokenizers want the space that stands before a word; positions are counted from the left
    tokenizer = load_tokenizer(model, add_prefix_space=True, padding_side="right")
    tags = sorted({tag for rows in parts.values() for tags in rows["ner_tags"] for tag in tags} | {"O"})
    tagger, words, truth = Tagger(tokenizer, tags), parts["validation"]["tokens"][:], parts["validation"]["ner_tags"][:]
    return Task(
        peft_type="TOKEN_CLS",
        auto_class=AutoModelForTokenClassification,
        head={"id2label": dict(enumerate(tags)), "label2id": {tag: i for i, tag in enumerate(tags)}},
        tokenizer=tokenizer,
        collator=tagger,
        evaluate=lambda logits: score("entities", tagger.decode(words, logits), truth),
        **parts,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train every method asked for, print the table, reload what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="local files; without it, wnut_17 from the Hub")
    add_options(parser, Path("runs/token_classification"))
    args = parser.parse_args(argv)
    quiet()
    try:
        task = tagging_task(read_tagged(args.data_dir), args.model or default_model())
        compare(args, task, str(args.data_dir or "Hub"))
    except DataError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
