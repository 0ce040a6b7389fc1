"""Tune a model to answer questions with a span of a text, as in SQuAD.

    python examples/question_answering.py --model bert-base-cased                  # data from the Hub
    python examples/question_answering.py --data-dir my_data --method head ln full

Local files are train and validation: .json as SQuAD's own, or .jsonl or .parquet with these columns; every question has
an answer:

    {"context": "Rick lives in New York.", "question": "Where does Rick live?",
     "answers": {"text": ["New York"], "answer_start": [14]}}

A context that is too long is split into overlapping windows; the best span of all of them is the answer. The saved
adapter is loaded into a fresh model, whose predictions must equal the trained model's bit for bit.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from metrics import score
from task_data import ENCODING, PARTS, add_data_options, errors_as_text, load_parts, say
from training import Task, add_options, compare, default_model, load_tokenizer, quiet
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding
from windows import Windows, decode

from peft_lntune.cli.data import find_columns, read_texts
from peft_lntune.errors import DataError


def flatten(rows: datasets.Dataset) -> datasets.Dataset:
    """A row per question, from SQuAD's own files, in which articles hold paragraphs and these hold questions."""
    if "data" not in rows.column_names:
        return rows
    return datasets.Dataset.from_list(
        [
            {
                "context": paragraph["context"],
                "question": asked["question"],
                "answers": {name: [one[name] for one in asked["answers"]] for name in ("text", "answer_start")},
            }
            for articles in rows["data"]
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    )


def check_answers(context: str, answers: Any, where: str) -> None:
    """Refuse answers that are missing, or that do not stand in the context where they say."""
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
        raise DataError(f'{where}: answers has to be {{"text": [...], "answer_start": [...]}}, not {answers!r:.80}')
    texts, starts = answers["text"] or [], answers["answer_start"] or []
    if not texts:
        raise DataError(f"{where}: no answer; this example is for SQuAD 1.1, where each question has one")
    if not (isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)):
        raise DataError(
            f"{where}: the text of answers has to be a list of texts that are not empty, and is {texts!r:.80}"
        )
    whole = isinstance(starts, list) and all(isinstance(start, int) and start >= 0 for start in starts)
    if not whole or len(texts) != len(starts):
        raise DataError(f"{where}: answer_start has to be the first character of each text, and is {starts!r}")
    for text, start in zip(texts, starts, strict=True):
        if context[start : start + len(text)] != text:
            place = context.find(text)
            there = f"it stands at {place}" if place >= 0 else "the context does not have it"
            raise DataError(f"{where}: the context has {context[start : start + len(text)]!r}, not {text!r}; {there}")


def read_questions(data_dir: Path | None, encoding: str = ENCODING) -> dict[str, datasets.Dataset]:
    """Both parts, with SQuAD's columns; each answer stands in its context, where the row says."""
    sources, parts = load_parts(data_dir, "rajpurkar/squad", encoding=encoding)
    for part in PARTS:
        try:
            rows = flatten(parts[part])
        except (KeyError, TypeError) as error:
            raise DataError(f"{sources[part]} has data, but not articles as SQuAD's files: {error!r}") from error
        find_columns(rows.column_names, [("question", "context", "answers")], sources[part])
        texts = {column: read_texts(rows[column], column, sources[part]) for column in ("question", "context")}
        for i, (context, answers) in enumerate(zip(texts["context"], rows["answers"], strict=True)):
            check_answers(context, answers, f"{sources[part]}, row {i}")
        numbers = [name for name in texts if rows.features[name].dtype != "string"]
        for name in numbers:
            rows = rows.remove_columns(name).add_column(name, texts[name])
        parts[part] = rows
    return parts


def answering_task(parts: dict[str, datasets.Dataset], model: str, length: int, stride: int) -> Task:
    """The task for one checkpoint's tokenizer; says what was understood."""
    tokenizer = load_tokenizer(model, padding_side="right")
    windows = {
        part: rows.map(
            Windows(tokenizer, min(length, tokenizer.model_max_length), stride, part),
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            keep_in_memory=True,
        )
        for part, rows in parts.items()
    }
    contexts, truth = parts["validation"]["context"][:], [row["text"] for row in parts["validation"]["answers"]]
    answers = ["start_positions", "end_positions"]
    found = {row for row, end in zip(windows["train"]["row"], windows["train"]["end_positions"], strict=True) if end}
    say(
        "data: "
        + " and ".join(f"{len(rows):,} {part} rows in {len(windows[part]):,} windows" for part, rows in parts.items())
        + f"; of {len(parts['train']) - len(found):,} training rows no window has the whole answer"
    )
    return Task(
        peft_type="QUESTION_ANS",
        auto_class=AutoModelForQuestionAnswering,
        head={},
        tokenizer=tokenizer,
        train=windows["train"].remove_columns(["row", "offsets"]),
        validation=windows["validation"].remove_columns(["row", "offsets", *answers]),
        collator=DataCollatorWithPadding(tokenizer),
        evaluate=lambda logits: score("squad", decode(contexts, windows["validation"], logits), truth),
        # of a model that holds every token for as likely
        chance=float(np.mean([np.log(len(ids)) for ids in windows["train"]["input_ids"]])),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train every method asked for, print the table, reload what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser, "a folder of local files; without it, SQuAD from the Hub")
    parser.add_argument("--max-length", type=int, default=384, help="tokens of a window with its question; default 384")
    parser.add_argument("--stride", type=int, default=128, help="tokens that neighbouring windows share; default 128")
    add_options(parser, Path("runs/question_answering"))
    args = parser.parse_args(argv)
    quiet()
    with errors_as_text():
        model = args.model or default_model()
        parts = read_questions(args.data_dir, args.encoding)
        task = answering_task(parts, model, args.max_length, args.stride)
        compare(args, task, f"{args.data_dir or 'Hub'}, windows of {args.max_length} with stride {args.stride}")


if __name__ == "__main__":
    main()
