"""Tune a model to find named entities: the names of people, places, products and the like, in tweets of wnut_17.

    python examples/token_classification.py --model bert-base-cased                # data from the Hub
    python examples/token_classification.py --data-dir my_data --method head ln full

Local files are train and validation: .conll, with a word and its tag per line and a blank line between sentences; or
.jsonl or .parquet, with a list of words and a list of tags in each row:

    {"tokens": ["Rick", "lives", "in", "New", "York"], "ner_tags": ["B-person", "O", "O", "B-location", "I-location"]}

Tags are IOB2, or IOB1 or IOBES, which are read as IOB2; numbers need --tag-names, unless a Parquet file names them. A
word is split into tokens, and its first token gets its tag. An entity counts as correct if all its words and its type
are. The saved adapter is loaded into a fresh model, whose predictions must equal the trained model's bit for bit.
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

from peft_lntune.cli.data import class_names, find_columns
from peft_lntune.errors import DataError

COLUMNS = tuple((words, tags) for words in ("tokens", "words") for tags in ("ner_tags", "tags", "labels"))
PREFIXES = {"B": "B", "I": "I", "E": "I", "L": "I", "S": "B", "U": "B"}  # of IOBES, also called BILOU, in IOB2
IGNORED = -100  # the label that the loss leaves out


def read_tags(tags: Sequence[Any], names: Sequence[str], where: str) -> list[str]:
    """The tags of one row in IOB2, from text in IOB1, IOB2 or IOBES, or from numbers that `names` explains."""
    read: list[str] = []
    for tag in tags:
        if isinstance(tag, int) and not isinstance(tag, bool):
            if not names:
                raise DataError(
                    f"{where} has the tag {tag}, a number without a name. Say what they are: --tag-names O ..."
                )
            if not 0 <= tag < len(names):
                raise DataError(
                    f"{where} has the tag {tag}, and the names are of 0 to {len(names) - 1}: {', '.join(names)}"
                )
            tag = names[tag]
        prefix, _, kind = tag.partition("-") if isinstance(tag, str) else ("", "", "")
        if tag != "O" and (prefix not in PREFIXES or not kind):
            raise DataError(f"{where} has the tag {tag!r}; a tag is O, or B-, I-, E- or S- with the type of an entity")
        # IOB1 begins an entity by I-; one that continues nothing begins one in IOB2 too, as conlleval reads it
        goes_on = bool(read) and read[-1][1:] == f"-{kind}" and PREFIXES.get(prefix) == "I"
        read.append("O" if tag == "O" else f"{'I' if goes_on else 'B'}-{kind}")
    return read


def read_tagged(
    data_dir: Path | None, encoding: str = ENCODING, names: Sequence[str] = ()
) -> dict[str, datasets.Dataset]:
    """Both parts, with a list of `tokens` and an equally long one of `ner_tags` as text in each row."""
    # the revision that the Hub has converted: on the main one wnut_17 is a script, which `datasets` no longer runs
    sources, parts = load_parts(data_dir, "leondz/wnut_17", encoding=encoding, revision="refs/convert/parquet")
    advice = "A file with a word and its tag per line has to end in .conll."
    of_words, of_tags = find_columns(parts["train"].column_names, COLUMNS, sources["train"], advice)
    find_columns(parts["validation"].column_names, [(of_words, of_tags)], sources["validation"])
    tagged: dict[str, datasets.Dataset] = {}
    types: set[str] = set()
    for part, rows in parts.items():
        words, tags = rows[of_words][:], []
        known = class_names(rows, of_tags) or names  # each part's own: the orders may differ
        for i, (w, t) in enumerate(zip(words, rows[of_tags], strict=True)):
            where = f"{sources[part]}: row {i}"
            if not (isinstance(w, list) and isinstance(t, list)):
                raise DataError(
                    f"{where} has to have a list of {of_words} and one of {of_tags}, not {w!r:.60} and {t!r:.60}"
                )
            if not w or not t or None in w or None in t:
                raise DataError(f"{where} has no words, or one without a tag")
            if len(w) != len(t):
                raise DataError(f"{where} has {len(w)} {of_words} and {len(t)} {of_tags}")
            if not all(isinstance(word, str) for word in w):
                raise DataError(f"{where} has a word that is no text: {w!r:.60}")
            tags.append(read_tags(t, known, where))
            new = {tag[2:] for tag in tags[-1]} - types - {""}
            if part == "validation" and new:
                raise DataError(f"{where} has an entity of type {min(new)}, which no training row has")
            types |= new
        tagged[part] = datasets.Dataset.from_dict({"tokens": words, "ner_tags": tags})
        if part == "train" and len({tag for row in tags for tag in row}) == 1:
            raise DataError(f"{sources['train']}: every tag is {tags[0][0]}, so there is nothing to learn")
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
    every = [*parts["train"]["tokens"], *words]
    pieces = tokenizer(every, is_split_into_words=True)
    lost = sum(len(row) - len({*pieces.word_ids(i)} - {None}) for i, row in enumerate(every))
    say(
        f"data: {' and '.join(f'{len(rows):,} {part} rows' for part, rows in parts.items())}, "
        f"{sum(len(ids) > max_length for ids in pieces['input_ids']):,} of them cut at {max_length} tokens; "
        f"{f'{lost:,} words have no token and are read as O; ' if lost else ''}entities to learn: "
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
    parser.add_argument("--tag-names", nargs="+", default=[], help="of tags that are numbers, from 0: O B-person ...")
    parser.add_argument("--max-length", type=int, default=MAX_TOKENS, help=f"tokens of a row; default {MAX_TOKENS}")
    add_options(parser, Path("runs/token_classification"))
    args = parser.parse_args(argv)
    quiet()
    with errors_as_text():
        parts = read_tagged(args.data_dir, args.encoding, args.tag_names)
        task = tagging_task(parts, args.model or default_model(), args.max_length)
        compare(args, task, str(args.data_dir or "Hub"))


if __name__ == "__main__":
    main()
