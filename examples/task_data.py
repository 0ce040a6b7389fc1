"""The two parts of a task, from local files or the Hub, described and checked before anything is trained.

Files are read by `peft_lntune.cli.data`, as in the command line.
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
    class_names,
    find_columns,
    find_labels,
    read_labels,
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
    if data_dir.is_file():
        raise DataError(f"{data_dir} is a file. Give the folder that has train and validation files.")
    present = sorted(path for path in data_dir.iterdir() if path.is_file()) if data_dir.is_dir() else []
    found = [path for e in ENDINGS for path in present if path.stem == part and path.suffix.lower() == e]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"several files for one part, keep one of: {', '.join(map(str, found))}")
    there = f"The folder has {', '.join(path.name for path in present[:10])}." if present else "It has no files."
    raise DataError(f"no such file, looked for: {', '.join(str(data_dir / f'{part}{e}') for e in ENDINGS)}. {there}")


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


def check_labels(labels: Labels, encoded: dict[str, list[Any]], sources: dict[str, str]) -> None:
    """Refuse labels that are all the same, and a class that no training row has, also where its name is known."""
    for part, values in encoded.items():
        if all(value == values[0] for value in values) and (part == "train" or labels.problem_type == "regression"):
            problem = "there is nothing to learn" if part == "train" else "there is no correlation"
            raise DataError(f"{sources[part]}: every row has the same label, so {problem}")
    if labels.problem_type != "regression":
        several = labels.problem_type == "multi_label_classification"
        of_row = (lambda row: np.flatnonzero(row).tolist()) if several else (lambda row: [row])
        known = {number for row in encoded["train"] for number in of_row(row)}
        for i, row in enumerate(encoded["validation"]):
            if strange := set(of_row(row)) - known:
                name = labels.names[min(strange)]
                raise DataError(f"{sources['validation']}: row {i} has the class {name!r}, which no training row has")


def read_data(
    task: str | None = None,
    data_dir: Path | None = None,
    *,
    text_columns: Sequence[str] = (),
    label_columns: Sequence[str] = ("label",),
    label_separator: str | None = None,
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
    if len(text_columns) > 2 or len({*text_columns, *label_columns}) < len([*text_columns, *label_columns]):
        raise DataError(
            f"the text columns are {', '.join(text_columns) or 'not named'} and the label columns "
            f"{', '.join(label_columns)}: name one or two of texts, and no column twice"
        )
    choices = [tuple(text_columns)] if text_columns else TEXT_COLUMNS if task is None else [GLUE_COLUMNS[task]]
    wanted = [(*names, *label_columns) for names in choices]
    columns = find_columns(parts["train"].column_names, wanted, sources["train"], NAME_COLUMNS)[: -len(label_columns)]
    if task == "stsb" and regression is None:
        regression = True
    for part, rows in parts.items():
        find_columns(rows.column_names, [(*columns, *label_columns)], sources[part], NAME_COLUMNS)
    raw = {part: read_labels(rows, label_columns, sources[part], label_separator) for part, rows in parts.items()}
    names = class_names(parts["train"], label_columns[0]) if len(label_columns) == 1 else tuple(label_columns)
    if names:
        several = isinstance(raw["train"][0], list)
        labels = Labels("multi_label_classification" if several else "single_label_classification", names)
    else:
        labels = find_labels(raw["train"], sources["train"], regression)
    encoded = {part: labels.encode(raw[part], sources[part]) for part in parts}
    check_labels(labels, encoded, sources)
    read = {
        part: datasets.Dataset.from_dict(
            {column: read_texts(rows[column], column, sources[part]) for column in columns} | {"label": encoded[part]}
        )
        for part, rows in parts.items()
    }
    metrics = task or labels.problem_type
    if metrics == "single_label_classification":
        metrics = metrics_of(np.bincount(encoded["train"], minlength=len(labels.names)))
    return TaskData(metrics, columns, labels, **read, max_length=max_length)


def metrics_of(counts: np.ndarray) -> str:
    """Which metrics suit classes with so many rows: where one is much rarer than another, those beside accuracy too."""
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
    parser.add_argument("--label-separator", help="what stands between the classes of a row, as | in toxic|insult")
    parser.add_argument(
        "--regression",
        action=argparse.BooleanOptionalAction,
        help="whether numbers are values; --no-regression: each label is a class; default: by their look",
    )
    parser.add_argument("--max-length", type=int, default=MAX_TOKENS, help=f"tokens of a text; default {MAX_TOKENS}")


def read_task(args: argparse.Namespace) -> TaskData:
    """The data of a command line with `add_task_options`."""
    return read_data(
        args.task,
        args.data_dir,
        text_columns=args.text_column,
        label_columns=args.label_column,
        label_separator=args.label_separator,
        regression=args.regression,
        max_length=args.max_length,
        encoding=args.encoding,
    )
