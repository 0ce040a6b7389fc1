"""The two parts of a task, from local files or the Hub, checked before anything is trained; and what they are.

Files are read by `peft_lntune.cli.data`, as the command line reads them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from peft_lntune.cli.data import (
    ENDINGS,
    NAME_COLUMNS,
    TEXT_COLUMNS,
    Labels,
    find_columns,
    find_labels,
    read_table,
    read_texts,
)
from peft_lntune.errors import DataError

PARTS = ("train", "validation")
GLUE_COLUMNS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
MAX_TOKENS = 128
ENCODING = "utf-8-sig"  # with a byte order mark or without
IMBALANCED = 2  # the largest class has so many times the rows of the smallest


@dataclass(frozen=True)
class TaskData:
    """The two parts of one task.

    Attributes:
        metrics: the key of this task in `metrics.METRICS`.
        columns: the one or two text columns.
        labels: the classes; the parts hold their numbers in `label`.
    """

    metrics: str
    columns: tuple[str, ...]
    labels: Labels
    train: datasets.Dataset
    validation: datasets.Dataset
    max_length: int = MAX_TOKENS

    @property
    def num_labels(self) -> int:
        """The number of classes; 1 in a regression."""
        return len(self.labels.names) or 1

    @property
    def chance(self) -> float:
        """The training loss of the best answer that is the same for every text."""
        labels = np.array(self.train["label"], dtype=float)
        if self.labels.problem_type == "regression":
            return float(labels.var())
        if self.labels.problem_type == "multi_label_classification":
            return float(np.mean([entropy([p, 1 - p]) for p in labels.mean(0)]))
        return entropy(np.bincount(labels.astype(int)) / len(labels))


class Collator:
    """Rows of a task -> one padded batch; texts are tokenized here, so nothing has to be prepared or kept on disk."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: TaskData) -> None:
        self.tokenizer, self.columns, self.max_length = tokenizer, data.columns, data.max_length

    def __call__(self, rows: list[dict]) -> dict:
        """Token ids and masks (B, T), labels (B,) where the rows have some."""
        texts = ([row[column] for row in rows] for column in self.columns)
        batch = self.tokenizer(*texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return {**batch, **({"labels": torch.tensor([row["label"] for row in rows])} if "label" in rows[0] else {})}


def entropy(shares: Sequence[float] | np.ndarray) -> float:
    """The loss, in nats, of answering with these shares where they are right."""
    return float(-sum(share * np.log(share) for share in shares if share > 0))


def say(line: str) -> None:
    """Tell people something beside the results, which alone are on stdout."""
    print(line, file=sys.stderr)


@contextmanager
def errors_as_text() -> Iterator[None]:
    """End the script with the text of an error in the data."""
    try:
        yield
    except DataError as error:
        raise SystemExit(f"error: {error}") from error


def find_file(data_dir: Path, part: str) -> Path:
    """The file of one part, whatever its format."""
    wanted = [data_dir / f"{part}{ending}" for ending in ENDINGS]
    found = [path for path in wanted if path.is_file()]
    if len(found) == 1:
        return found[0]
    problem = "several files for one part, keep one of" if found else "no such file, looked for"
    raise DataError(f"{problem}: {', '.join(map(str, found or wanted))}")


def read_part(data_dir: Path, part: str, encoding: str = ENCODING) -> datasets.Dataset:
    """The rows of one part."""
    return read_table(find_file(data_dir, part), encoding)


def load_parts(
    data_dir: Path | None,
    hub: str,
    *config: str,
    validation: str = "validation",
    encoding: str = ENCODING,
    **options: str,
) -> tuple[dict[str, str], dict[str, datasets.Dataset]]:
    """The name of each part, for errors, and its rows: from `data_dir` where it is given and from the Hub otherwise."""
    if data_dir is not None:
        files = {part: find_file(Path(data_dir), part) for part in PARTS}
        return {part: str(file) for part, file in files.items()}, {
            part: read_table(file, encoding) for part, file in files.items()
        }
    return hub_parts(lambda: datasets.load_dataset(hub, *config, **options), " ".join((hub, *config)), validation)


def hub_parts(
    load: Callable[[], Any], source: str, *validation: str
) -> tuple[dict[str, str], dict[str, datasets.Dataset]]:
    """Both parts of what `load` loads; `validation` are the names that the second one may have."""
    try:
        loaded = load()
    except (ConnectionError, FileNotFoundError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(f"cannot load {source}: {error}. Give --data-dir, a folder on this machine.") from error
    found = {"train": "train", "validation": next((name for name in validation if name in loaded), validation[0])}
    if missing := [name for name in found.values() if name not in loaded]:
        raise DataError(f"{source} has no part {missing[0]}; it has {', '.join(loaded)}")
    return {part: f"{source} ({part})" for part in PARTS}, {part: loaded[name] for part, name in found.items()}


def read_labels(rows: datasets.Dataset, columns: Sequence[str], source: str) -> list[Any]:
    """The labels of a part: names where they come with it, and a list per row where several columns hold a 0 or 1."""
    kind = rows.features[columns[0]]
    if isinstance(kind, datasets.ClassLabel):
        return [None if label is None or label < 0 else kind.names[label] for label in rows[columns[0]]]
    if len(columns) == 1:
        return rows[columns[0]][:]
    flags = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
    labels = [[flags.get(str(label).lower()) for label in row] for row in zip(*(rows[c] for c in columns), strict=True)]
    for i, row in enumerate(labels):
        if None in row:
            column = columns[row.index(None)]
            raise DataError(
                f"{source}: row {i} has {rows[column][i]!r} in {column!r}; several label columns hold 0 or 1"
            )
    return labels


def read_data(
    task: str | None = None,
    data_dir: Path | None = None,
    *,
    text_columns: Sequence[str] = (),
    label_columns: Sequence[str] = ("label",),
    regression: bool | None = None,
    max_length: int = MAX_TOKENS,
    encoding: str = ENCODING,
) -> TaskData:
    """Read a task's two parts, from `data_dir` where it is given and from the Hub otherwise."""
    if task is not None and task not in GLUE_COLUMNS:
        raise DataError(f"unknown task {task!r}; known are {', '.join(GLUE_COLUMNS)}")
    if data_dir is None and task is None:
        raise DataError(f"give a data folder, or a task that is loaded from the Hub: {', '.join(GLUE_COLUMNS)}")
    validation = "validation_matched" if task == "mnli" else "validation"
    sources, parts = load_parts(data_dir, "nyu-mll/glue", str(task), validation=validation, encoding=encoding)
    choices = [tuple(text_columns)] if text_columns else TEXT_COLUMNS if task is None else [GLUE_COLUMNS[task]]
    wanted = [(*names, *label_columns) for names in choices]
    columns = find_columns(parts["train"].column_names, wanted, sources["train"], NAME_COLUMNS)[: -len(label_columns)]
    if task is not None and regression is None:
        regression = task == "stsb"
    for part, rows in parts.items():
        find_columns(rows.column_names, [(*columns, *label_columns)], sources[part], NAME_COLUMNS)
    raw = {part: read_labels(rows, label_columns, sources[part]) for part, rows in parts.items()}
    kind = parts["train"].features[label_columns[0]]
    if len(label_columns) > 1:
        labels = Labels("multi_label_classification", tuple(label_columns))
    elif isinstance(kind, datasets.ClassLabel):
        labels = Labels("single_label_classification", tuple(kind.names))
    else:
        labels = find_labels(raw["train"], sources["train"], regression)
    read = {
        part: datasets.Dataset.from_dict(
            {column: read_texts(rows[column], column, sources[part]) for column in columns}
            | {"label": labels.encode(raw[part], sources[part])}
        )
        for part, rows in parts.items()
    }
    return TaskData(
        task or metrics_of(labels, read["train"]["label"][:]), columns, labels, **read, max_length=max_length
    )


def metrics_of(labels: Labels, train: Sequence[Any]) -> str:
    """Which metrics suit the labels; where one class is much rarer than another, those beside accuracy too."""
    if labels.problem_type != "single_label_classification":
        return labels.problem_type
    counts = np.bincount(train, minlength=len(labels.names))
    return "imbalanced" if counts.max() >= IMBALANCED * counts.min() else "classification"


def add_data_options(parser: argparse.ArgumentParser, help: str) -> None:
    """Where data is read from."""
    parser.add_argument("--data-dir", type=Path, help=f"{help}: train and validation, {', '.join(ENDINGS)}")
    parser.add_argument("--encoding", default=ENCODING, help="of text files, such as latin-1; default UTF-8")


def add_task_options(parser: argparse.ArgumentParser, without: str = "; without it and --data-dir, the demo's") -> None:
    """Which data a text classifier learns, and how it is read."""
    parser.add_argument("--task", help=f"one of GLUE's from the Hub: {', '.join(GLUE_COLUMNS)}{without}")
    add_data_options(parser, "a folder of local files")
    parser.add_argument("--text-column", nargs="+", default=[], help="one, or two of a pair; default: by usual names")
    parser.add_argument(
        "--label-column", nargs="+", default=["label"], help="default label; several of 0 or 1: a class each"
    )
    parser.add_argument(
        "--regression", action=argparse.BooleanOptionalAction, help="whether numbers are values; default: by their look"
    )
    parser.add_argument("--max-length", type=int, default=MAX_TOKENS, help=f"tokens of a text; default {MAX_TOKENS}")


def read_task(args: argparse.Namespace) -> TaskData:
    """The data of a command line with `add_task_options`."""
    return read_data(
        args.task,
        args.data_dir,
        text_columns=args.text_column,
        label_columns=args.label_column,
        regression=args.regression,
        max_length=args.max_length,
        encoding=args.encoding,
    )
