"""Tune a model to find named entities: the names of people, places, products and the like, in tweets of wnut_17.

    python examples/token_classification.py --model bert-base-cased                # data from the Hub
    python examples/token_classification.py --data-dir my_data --method head ln full

Local files are train and validation: .conll, with a word and its tag per line and a blank line between sentences; or
.jsonl or .parquet, with a list of words and a list of tags in each row:

    {"tokens": ["Rick", "lives", "in", "New", "York"], "ner_tags": ["B-person", "O", "O", "B-location", "I-location"]}

Tags are IOB2, or IOBES, which is read as IOB2. A word is split into tokens, and its first token gets its tag. An entity
counts as correct if all its words and its type are.
The saved adapter is loaded into a fresh model, whose predictions must equal the trained model's bit for bit.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from metrics import score
from task_data import ENCODING, MAX_TOKENS, add_data_options, entropy, errors_as_text, load_parts, say
from training import Task, add_options, compare, default_model, load_tokenizer, quiet
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from peft_lntune.cli.data import find_columns
from peft_lntune.errors import DataError

TYPES = ("corporation", "creative-work", "group", "location", "person", "product")
WNUT_TAGS = ["O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI")]  # in the order of the Hub's numbers
COLUMNS = tuple((words, tags) for words in ("tokens", "words") for tags in ("ner_tags", "tags", "labels"))
PREFIXES = {"B": "B", "I": "I", "E": "I", "L": "I", "S": "B", "U": "B"}  # of IOBES, also called BILOU, in IOB2
IGNORED = -100  # the label that the loss leaves out


def tag_names(parts: dict[str, datasets.Dataset], column: str, source: str) -> Sequence[str] | None:
    """What numbers in tags stand for: the names that come with them or wnut_17's. None where tags are text."""
    kind = getattr(parts["train"].features[column], "feature", None)
    if "string" in getattr(kind, "dtype", ""):
        return None
    names = kind.names if isinstance(kind, datasets.ClassLabel) else WNUT_TAGS
    found = {tag for rows in parts.values() for tags in rows[column] for tag in tags or ()}
    strange = [tag for tag in found if tag not in range(len(names))]
    if strange:
        wanted = f"lists of text such as B-person, or of the numbers 0 to {len(names) - 1} of {', '.join(names)}"
        raise DataError(f"{source}: {column} has to be {wanted}; found {min(strange, key=str)!r}")
    return names


def to_iob2(tag: str, where: str) -> str:
    """A tag of IOB2 or IOBES in IOB2."""
    prefix, _, kind = tag.partition("-")
    if tag == "O":
        return tag
    if prefix not in PREFIXES or not kind:
        raise DataError(f"{where} has the tag {tag!r}; a tag is O, or B-, I-, E- or S- with the type of an entity")
    return f"{PREFIXES[prefix]}-{kind}"


def read_tagged(data_dir: Path | None, encoding: str = ENCODING) -> dict[str, datasets.Dataset]:
    """Both parts, with a list of `tokens` and an equally long one of `ner_tags` as text in each row."""
    # the revision that the Hub has converted: on the main one wnut_17 is a script, which `datasets` no longer runs
    sources, parts = load_parts(data_dir, "leondz/wnut_17", encoding=encoding, revision="refs/convert/parquet")
    of_words, of_tags = find_columns(parts["train"].column_names, COLUMNS, sources["train"])
    find_columns(parts["validation"].column_names, [(of_words, of_tags)], sources["validation"])
    names, tagged = tag_names(parts, of_tags, sources["train"]), {}
    types: set[str] = set()
    for part, rows in parts.items():
        words, tags = rows[of_words][:], []
        for i, (w, t) in enumerate(zip(words, rows[of_tags], strict=True)):
            where = f"{sources[part]}: row {i}"
            if not w or not t or None in w or None in t:
                raise DataError(f"{where} has no words, or one without a tag")
            if len(w) != len(t):
                raise DataError(f"{where} has {len(w)} {of_words} and {len(t)} {of_tags}")
            tags.append([to_iob2(tag if names is None else names[tag], where) for tag in t])
            new = {tag[2:] for tag in tags[-1]} - types - {""}
            if part == "validation" and new:
                raise DataError(f"{where} has an entity of type {min(new)}, which no training row has")
            types |= new
        tagged[part] = datasets.Dataset.from_dict({"tokens": words, "ner_tags": tags})
    if not types:
        raise DataError(f"{sources['train']}: every tag is O, so there is nothing to learn")
    return tagged


@dataclass(frozen=True)
class Tagger:
    """Words and tags to batches, and logits back to tags; `tags` names the classes."""

    tokenizer: PreTrainedTokenizerBase
    tags: list[str]
    max_length: int = MAX_TOKENS

    def encode(self, rows: Sequence[Sequence[str]]) -> tuple[Any, list[dict[int, int]]]:
        """A padded batch, (B, T), and for each row where the first piece of a word is: {word: position}."""
        batch = self.tokenizer(
            list(rows),
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=self.max_length,
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


def tagging_task(parts: dict[str, datasets.Dataset], model: str, max_length: int = MAX_TOKENS) -> Task:
    """The task for one checkpoint's tokenizer; says what was understood."""
    # byte-level tokenizers want the space that stands before a word; positions are counted from the left
    tokenizer = load_tokenizer(model, add_prefix_space=True, padding_side="right")
    counts = Counter(tag for tags in parts["train"]["ner_tags"] for tag in tags)
    types = sorted({tag[2:] for tag in counts} - {""})
    tags = sorted(["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")])
    tagger = Tagger(tokenizer, tags, max_length)
    words, truth = parts["validation"]["tokens"][:], parts["validation"]["ner_tags"][:]
    lengths = tokenizer([*parts["train"]["tokens"], *words], is_split_into_words=True)["input_ids"]
    say(
        f"data: {' and '.join(f'{len(rows):,} {part} rows' for part, rows in parts.items())}, "
        f"{sum(len(ids) > max_length for ids in lengths):,} of them cut at {max_length} tokens; entities to learn: "
        + ", ".join(f"{kind} ({counts[f'B-{kind}']:,})" for kind in types)
    )
    return Task(
        peft_type="TOKEN_CLS",
        auto_class=AutoModelForTokenClassification,
        head={"id2label": dict(enumerate(tags)), "label2id": {tag: i for i, tag in enumerate(tags)}},
        tokenizer=tokenizer,
        collator=tagger,
        evaluate=lambda logits: score("entities", tagger.decode(words, logits), truth),
        chance=entropy([count / counts.total() for count in counts.values()]),
        **parts,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train every method asked for, print the table, reload what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser, "a folder of local files; without it, wnut_17 from the Hub")
    parser.add_argument("--max-length", type=int, default=MAX_TOKENS, help=f"tokens of a row; default {MAX_TOKENS}")
    add_options(parser, Path("runs/token_classification"))
    args = parser.parse_args(argv)
    quiet()
    with errors_as_text():
        task = tagging_task(read_tagged(args.data_dir, args.encoding), args.model or default_model(), args.max_length)
        compare(args, task, str(args.data_dir or "Hub"))


if __name__ == "__main__":
    main()
