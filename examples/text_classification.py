"""Tune a sequence-classification model on a GLUE task or on local files, with one or several methods in one loop.

    python examples/text_classification.py --task sst2 --method head ln full          # data from the Hub
    python examples/text_classification.py --data-dir my_data --model bert-base-uncased

Every method trains the same head (see `methods.find_head`), from the same seed, on the same batches, without weight
decay. `head` trains nothing else and is the control: a frozen body.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from demo_data import write_data
from metrics import score
from task_data import GLUE_COLUMNS, Collator, DataError, TaskData, read_data
from training import Task, add_options, compare, default_model, load_tokenizer, quiet
from transformers import AutoModelForSequenceClassification


def evaluate_logits(data: TaskData, logits: np.ndarray) -> dict[str, float]:
    """The task's metrics on the validation part, from logits (N, num_labels)."""
    predictions = logits.squeeze(-1) if data.num_labels == 1 else logits.argmax(-1)
    return score(data.metrics, predictions.tolist(), data.validation["label"])


def text_task(data: TaskData, model: str) -> Task:
    """The task of classifying sentences, or pairs of them, for one checkpoint's tokenizer."""
    tokenizer = load_tokenizer(model)
    return Task(
        peft_type="SEQ_CLS",
        auto_class=AutoModelForSequenceClassification,
        head={"num_labels": data.num_labels},
        tokenizer=tokenizer,
        train=data.train,
        validation=data.validation,
        collator=Collator(tokenizer, data),
        evaluate=partial(evaluate_logits, data),
    )


def task_or_demo(args: argparse.Namespace) -> tuple[Task, str]:
    """The task of --task or --data-dir, or of the demo's data without both; and the checkpoint's name."""
    if args.task is None and args.data_dir is None:
        args.data_dir = write_data(args.out / "data", "sentiment", seed=args.seed)
    try:
        model = args.model or default_model()
        return text_task(read_data(args.task, args.data_dir), model), model
    except DataError as error:
        raise SystemExit(f"error: {error}") from error


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help=f"one of GLUE's: {', '.join(GLUE_COLUMNS)}")
    parser.add_argument("--data-dir", type=Path, help="local train and validation files: .jsonl, .csv or .parquet")
    add_options(parser, Path("runs/text_classification"))
    args = parser.parse_args(argv)
    if args.task is None and args.data_dir is None:
        parser.error("give --task or --data-dir")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train every method asked for, print the table, reload what was saved."""
    args = parse_args(argv)
    quiet()
    try:
        task = text_task(read_data(args.task, args.data_dir), args.model or default_model())
        compare(args, task, f"{args.task or ''} {args.data_dir or 'Hub'}".strip())
    except DataError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
