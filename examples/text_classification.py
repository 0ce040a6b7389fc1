"""Tune a sequence-classification model on a GLUE task or on local files, with one or several methods in one loop.

    python examples/text_classification.py --task sst2 --method head ln full          # data from the Hub
    python examples/text_classification.py --data-dir my_data --model bert-base-uncased
    python examples/text_classification.py --data-dir my_data --text-column title body --label-column topic \\
        --predict my_data/test.csv

Labels are class names or numbers, lists of them (several classes per text), or values (--regression). For texts without
labels, --predict writes a table of scores beside each method's adapter.

Every method trains the same head (see `methods.find_head`), from the same seed, on the same batches, without weight
decay. `head` trains nothing else and is the control: a frozen body.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from demo_data import write_data
from metrics import score
from task_data import Collator, TaskData, add_task_options, errors_as_text, read_task, say
from training import Run, Task, add_options, compare, default_model, load_tokenizer, make_trainer, predict, quiet
from transformers import AutoModelForSequenceClassification

from peft_lntune.cli.data import count_cut, describe_data, find_columns, read_table, read_texts
from peft_lntune.errors import DataError

PREDICTIONS = "predictions.csv"


def evaluate_logits(data: TaskData, logits: np.ndarray) -> dict[str, float]:
    """The task's metrics on the validation part, from logits (N, num_labels)."""
    if data.labels.problem_type == "multi_label_classification":
        predictions = (logits > 0).astype(int)
    else:
        predictions = logits.squeeze(-1) if data.num_labels == 1 else logits.argmax(-1)
    return score(data.metrics, predictions.tolist(), data.validation["label"][:])


def text_task(data: TaskData, model: str) -> Task:
    """The task of classifying sentences, or pairs of them, for one checkpoint's tokenizer; says what was understood."""
    tokenizer = load_tokenizer(model)
    parts = {"train": data.train, "validation": data.validation}
    cut = [count_cut(tokenizer, [rows[c] for c in data.columns], data.max_length) for rows in parts.values()]
    counts = " and ".join(f"{len(rows):,} {part} rows" for part, rows in parts.items())
    say(describe_data(counts, data.columns, sum(cut), data.max_length, data.labels.describe(data.train["label"][:])))
    names = data.labels.names
    named = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}} if names else {}
    return Task(
        peft_type="SEQ_CLS",
        auto_class=AutoModelForSequenceClassification,
        head={"num_labels": data.num_labels, "problem_type": data.labels.problem_type, **named},
        tokenizer=tokenizer,
        train=data.train,
        validation=data.validation,
        collator=Collator(tokenizer, data),
        evaluate=partial(evaluate_logits, data),
        chance=data.chance,
    )


def task_or_demo(args: argparse.Namespace) -> tuple[Task, str]:
    """The task of --task or --data-dir, or of the demo's data without both; and the checkpoint's name."""
    if args.task is None and args.data_dir is None:
        args.data_dir = write_data(args.out / "data", "sentiment", seed=args.seed)
    with errors_as_text():
        model = args.model or default_model()
        return text_task(read_task(args), model), model


def read_unlabelled(file: Path, data: TaskData, encoding: str) -> datasets.Dataset:
    """The rows of a file, of which the text columns count; the others are kept for the table of predictions."""
    rows = read_table(file, encoding)
    find_columns(rows.column_names, [data.columns], str(file))
    for column in data.columns:
        read_texts(rows[column], column, str(file))
    taken = [name for name in rows.column_names if name == "prediction" or name.startswith("score_")]
    if taken:
        raise DataError(f"{file} has the column {taken[0]!r}, which {PREDICTIONS} would overwrite. Rename it.")
    return rows


def write_predictions(rows: datasets.Dataset, data: TaskData, task: Task, run: Run, model: Any, folder: Path) -> None:
    """Answer rows without labels, and write them with the answers and the score of each class."""
    texts = datasets.Dataset.from_dict({c: read_texts(rows[c], c, "") for c in data.columns})
    logits = predict(make_trainer(run, model, task), replace(task, validation=texts))
    table = rows.to_pandas()
    if data.labels.problem_type == "regression":
        table["prediction"] = logits.squeeze(-1)
    else:
        several = data.labels.problem_type == "multi_label_classification"
        scores = torch.from_numpy(logits).float()
        scores = scores.sigmoid() if several else scores.softmax(-1)
        names = np.array(data.labels.names)
        if several:
            table["prediction"] = ["|".join(names[row > 0]) for row in logits]
        else:
            table["prediction"] = names[logits.argmax(-1)]
        for name, column in zip(names, scores.T.tolist(), strict=True):
            table[f"score_{name}"] = column
    table.to_csv(folder / PREDICTIONS, index=False)
    print(f"wrote {folder / PREDICTIONS}: {len(table):,} predictions")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser, "")
    parser.add_argument("--predict", type=Path, help=f"a file with texts to answer, into {PREDICTIONS} of each method")
    add_options(parser, Path("runs/text_classification"))
    args = parser.parse_args(argv)
    if args.task is None and args.data_dir is None:
        parser.error("give --task or --data-dir")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train every method asked for, print the table, reload what was saved, answer what --predict asks."""
    args = parse_args(argv)
    quiet()
    with errors_as_text():
        data = read_task(args)
        task = text_task(data, args.model or default_model())
        after = None
        if args.predict is not None:
            after = partial(write_predictions, read_unlabelled(args.predict, data, args.encoding), data, task)
        compare(args, task, f"{args.task or ''} {args.data_dir or 'Hub'}".strip(), after)


if __name__ == "__main__":
    main()
