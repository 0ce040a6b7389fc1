"""The two parts of a task, from the Hub or from local files with the same columns; and GLUE's sentences and pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase

PARTS = ("train", "validation")
READERS = {
    "jsonl": datasets.Dataset.from_json,
    "json": datasets.Dataset.from_json,
    "csv": datasets.Dataset.from_csv,
    "parquet": datasets.Dataset.from_parquet,
}
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
# what local files without a task name are searched for: pairs before single sentences
KNOWN_COLUMNS = (*sorted(set(GLUE_COLUMNS.values()), key=lambda columns: (-len(columns), columns)), ("text",))
MAX_TOKENS = 128


class DataError(ValueError):
    """The data asked for is not there, or has other columns. Next: correct the path, the task or the file."""


@dataclass(frozen=True)
class TaskData:
    """The two parts of one task.

    Attributes:
        metrics: the key of this task in `metrics.METRICS`.
        columns: the one or two text columns.
        num_labels: the number of classes; 1 where the labels are floats, a regression.
    """

    metrics: str
    columns: tuple[str, ...]
    num_labels: int
    train: datasets.Dataset
    validation: datasets.Dataset


class Collator:
    """Rows of a task -> one padded batch; texts are tokenized here, so nothing has to be prepared or kept on disk."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: TaskData) -> None:
        self.tokenizer, self.columns = tokenizer, data.columns

    def __call__(self, rows: list[dict]) -> dict:
        """Token ids and masks (B, T), labels (B,)."""
        texts = ([row[column] for row in rows] for column in self.columns)
        batch = self.tokenizer(*texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}


def find_file(data_dir: Path, part: str) -> Path:
    """The file of one part, whatever its format."""
    wanted = [data_dir / f"{part}.{ending}" for ending in READERS]
    found = [path for path in wanted if path.is_file()]
    if len(found) == 1:
        return found[0]
    problem = "several files for one part, keep one of" if found else "no such file, looked for"
    raise DataError(f"{problem}: {', '.join(map(str, found or wanted))}")


def read_part(data_dir: Path, part: str) -> datasets.Dataset:
    """The rows of one part."""
    path = find_file(data_dir, part)
    return READERS[path.suffix[1:]](str(path))


def load_parts(
    data_dir: Path | None, hub: str, *config: str, validation: str = "validation", **options: str
) -> tuple[str, dict[str, datasets.Dataset]]:
    """The source's name and both parts, from `data_dir` where it is given and from the Hub otherwise."""
    if data_dir is not None:
        return str(data_dir), {part: read_part(Path(data_dir), part) for part in PARTS}
    try:
        loaded = datasets.load_dataset(hub, *config, **options)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(f"cannot load {hub}: {error}. Give --data-dir, a folder on this machine.") from error
    return " ".join((hub, *config)), {"train": loaded["train"], "validation": loaded[validation]}


def find_columns(
    parts: dict[str, datasets.Dataset], choices: Sequence[tuple[str, ...]], source: str
) -> tuple[str, ...]:
    """The first choice whose columns are all present in the training part; each part has to offer one."""
    found = {}
    for part, rows in parts.items():
        present = rows.column_names
        fitting = [columns for columns in choices if set(columns) <= set(present)]
        if not fitting:
            wanted = " or ".join(", ".join(columns) for columns in choices)
            raise DataError(f"{source} ({part}) has the columns {', '.join(present)}; wanted are {wanted}")
        found[part] = fitting[0]
    return found["train"]


def count_labels(train: datasets.Dataset, source: str) -> int:
    """The number of classes, or 1 for a regression."""
    kind = train.features["label"]
    if isinstance(kind, datasets.ClassLabel):
        return kind.num_classes
    if "float" in kind.dtype:
        return 1
    if "int" in kind.dtype and min(train["label"]) >= 0:
        return max(train["label"]) + 1
    raise DataError(f"{source}: labels must be class numbers from 0 on, or floats; the first is {train['label'][0]!r}")


def read_data(task: str | None = None, data_dir: Path | None = None) -> TaskData:
    """Read a task's two parts, from `data_dir` where it is given and from the Hub otherwise."""
    if task is not None and task not in GLUE_COLUMNS:
        raise DataError(f"unknown task {task!r}; known are {', '.join(GLUE_COLUMNS)}")
    if data_dir is None and task is None:
        raise DataError(f"give a data folder, or a task that is loaded from the Hub: {', '.join(GLUE_COLUMNS)}")
    validation = "validation_matched" if task == "mnli" else "validation"
    source, parts = load_parts(data_dir, "nyu-mll/glue", str(task), validation=validation)
    choices = KNOWN_COLUMNS if task is None else (GLUE_COLUMNS[task],)
    *columns, _ = find_columns(parts, [(*names, "label") for names in choices], source)
    num_labels = count_labels(parts["train"], source)
    metrics = task or ("regression" if num_labels == 1 else "classification")
    return TaskData(metrics, tuple(columns), num_labels, **parts)
