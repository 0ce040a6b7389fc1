"""Reads tables from files, and detects what their labels are. Needs `datasets`, of the extra `examples`.

Only the commands read data, so this module is here. The examples import it too, so that they read files in the same
way.
"""

import json
import math
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lntune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "ENDINGS",
    "NAME_COLUMNS",
    "TEXT_COLUMNS",
    "Labels",
    "count_cut",
    "find_columns",
    "find_labels",
    "read_table",
    "read_texts",
]

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".conll")
"""The endings of the files that `read_table` reads."""

TEXT_COLUMNS = (
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("sentence1", "sentence2"),
    ("sentence",),
    ("text",),
)
"""Text columns to look for if none are named. Pairs come first, because they contain single columns."""

NAME_COLUMNS = "Name yours: --text-column, --label-column."
"""Advice for the error if columns are not found."""

MISSING = {"na", "n/a", "null", "none", "-", "?"}
"""What spreadsheets write for a missing number. Among class names it is a class."""


def read_table(file: str | Path, encoding: str = "utf-8-sig") -> "Dataset":
    """Read a file by its ending. Rows are counted from 0 in every error.

    Args:
        file: `.csv` or `.tsv` with a header (commas, semicolons or tabs; every value is text, also `NA` and `001`),
            `.jsonl` or `.json`, `.parquet`, or `.conll` (a word and its tag per line, a blank line between sentences).
        encoding: of text files; the default reads UTF-8 with and without a byte order mark.

    Returns:
        The table, in memory; of `.conll` with the columns `tokens` and `ner_tags`.

    Raises:
        DataError: the ending is unknown, the file is missing or has no rows, or a row cannot be read.
        ModuleNotFoundError: `datasets` is not installed.

    Example:
        >>> read_table("reviews.csv").column_names  # doctest: +SKIP
        ['text', 'label']
    """
    path = Path(file)
    if path.suffix not in ENDINGS:
        raise DataError(f"{path} should end in one of {', '.join(ENDINGS)}, because the ending says how it is read.")
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    try:
        import datasets
    except ModuleNotFoundError as error:
        message = "reading data files needs datasets: pip install datasets, or peft-lntune with its extra 'examples'"
        raise ModuleNotFoundError(message) from error
    try:
        if path.suffix in (".csv", ".tsv"):
            table = datasets.Dataset.from_dict(_read_csv(path, encoding))
        elif path.suffix == ".conll":
            table = datasets.Dataset.from_dict(_read_conll(path, encoding))
        else:
            table = _read_arrow(path, encoding)
    except UnicodeError as error:
        raise DataError(f"{path} is not {encoding}: {error}. Name its encoding: --encoding latin-1.") from error
    if not len(table):
        raise DataError(f"{path} has no rows.")
    return table


def _read_csv(path: Path, encoding: str) -> dict[str, list[str]]:
    import pandas

    with path.open(encoding=encoding, newline="") as opened:
        header = opened.readline()
    mark = max(",;\t", key=re.sub('"[^"]*"', "", header).count)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # a row longer than the header would be cut
            options: Any = {"dtype": str, "keep_default_na": False, "index_col": False}
            return dict(pandas.read_csv(path, sep=mark, encoding=encoding, **options).to_dict("list"))
    except pandas.errors.EmptyDataError:
        return {}
    except (pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
        raise DataError(
            f"{path} is not a table with {len(header.split(mark))} columns, separated by {mark!r}: "
            f"{str(error).strip()}. Quote texts that contain the separator or a line break."
        ) from error


def _read_conll(path: Path, encoding: str) -> dict[str, list[list[str]]]:
    sentences: list[list[list[str]]] = [[]]
    for number, line in enumerate(path.read_text(encoding=encoding).split("\n")):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or fields[0] == "-DOCSTART-":
            sentences.append([])
        elif len(fields) < 2:
            raise DataError(
                f"line {number + 1} of {path} has no tag: {line.strip()!r}. Each line is a word and its tag."
            )
        else:
            sentences[-1].append([fields[0], fields[-1].strip()])
    words = [[[pair[i] for pair in sentence] for sentence in sentences if sentence] for i in range(2)]
    return {"tokens": words[0], "ner_tags": words[1]}


def _read_arrow(path: Path, encoding: str) -> "Dataset":
    import datasets
    import pyarrow.parquet

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if path.suffix == ".parquet":
            return datasets.Dataset(pyarrow.parquet.read_table(path))
        # A cache that outlives the call would hide later changes of the file.
        with tempfile.TemporaryDirectory() as cache:
            return datasets.Dataset.from_json(str(path), encoding=encoding, cache_dir=cache, keep_in_memory=True)
    except (StopIteration, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding=encoding).split("\n")):
                try:
                    json.loads(line if line.strip() else "{}")
                except json.JSONDecodeError as wrong:
                    raise DataError(
                        f"line {number + 1} of {path} is not JSON: {wrong}. Write one object per line."
                    ) from wrong
        if path.suffix != ".parquet" and not path.read_text(encoding=encoding).strip():
            return datasets.Dataset.from_dict({})
        raise DataError(f"{path} cannot be read: {error.__cause__ or error}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def find_columns(
    present: Sequence[str], choices: Sequence[tuple[str, ...]], source: str, advice: str = ""
) -> tuple[str, ...]:
    """Find the first choice whose columns are all present.

    Args:
        present: the columns of a table.
        choices: tuples of columns, in order of preference.
        source: the table's name, for errors.
        advice: what to do if no choice fits, for the error.

    Returns:
        One of the choices.

    Raises:
        DataError: no choice fits.

    Example:
        >>> find_columns(["label", "text"], [("premise", "hypothesis"), ("text",)], "reviews.csv")
        ('text',)
    """
    for columns in choices:
        if set(columns) <= set(present):
            return columns
    wanted = " or ".join(", ".join(columns) for columns in choices)
    raise DataError(f"{source} has the columns {', '.join(present)}; wanted are {wanted}. {advice}".rstrip())


def read_texts(values: Iterable[Any], column: str, source: str) -> list[str]:
    """Check the texts of a column.

    Args:
        values: one value per row; numbers become text.
        column: name of the column, for errors.
        source: the table's name, for errors.

    Returns:
        One text per row.

    Raises:
        DataError: a text is missing or empty; the message names the row.
    """
    texts = []
    for row, value in enumerate(values):
        if not isinstance(value, (str, int, float)) or not str(value).strip() or value != value:
            raise DataError(
                f"row {row} of {source} has no text in {column!r}: {value!r}. Fill it in or remove the row."
            )
        texts.append(str(value))
    return texts


def count_cut(tokenizer: Any, columns: Sequence[Sequence[str]], max_length: int) -> int:
    """Count the texts, or pairs of texts, that are longer than the model's input.

    Args:
        tokenizer: tokenizer of the model.
        columns: one or two columns of texts.
        max_length: number of tokens that are kept.

    Returns:
        The number of rows that will be cut.
    """
    tokens = tokenizer(*map(list, columns), truncation=True, max_length=max_length + 1)["input_ids"]
    return sum(len(row) > max_length for row in tokens)


@dataclass(frozen=True)
class Labels:
    """The kind of the labels of a table, and its classes.

    Attributes:
        problem_type: the field of a transformers config: `"single_label_classification"`,
            `"multi_label_classification"` or `"regression"`.
        names: names of the classes, in the order of their numbers; empty for a regression.
    """

    problem_type: str
    names: tuple[str, ...] = ()

    def encode(self, labels: Sequence[Any], source: str) -> list[Any]:
        """Convert labels to numbers.

        Args:
            labels: one label per row; lists if a row may have several classes.
            source: the table's name, for errors.

        Returns:
            One per row: the number of a class, a list with 0.0 or 1.0 per class, or a value.

        Raises:
            DataError: a label is missing or not one that `find_labels` found; the message names the row.
        """
        _check(labels, source)
        if self.problem_type == "regression":
            values = [_number(label) for label in labels]
            if None in values:
                row = values.index(None)
                raise DataError(f"{source}: the label of row {row} is {labels[row]!r}, and the others are numbers.")
            return values
        numbers = {name: number for number, name in enumerate(self.names)}

        def number_of(label: Any, row: int) -> int:
            found = numbers.get(str(label).strip(), numbers.get(_whole(label) or ""))
            if found is None:
                raise DataError(
                    f"{source}: row {row} has the class {str(label)!r}, which no training row has; those have "
                    f"{', '.join(self.names[:10])}."
                )
            return found

        if self.problem_type == "single_label_classification":
            return [number_of(label, row) for row, label in enumerate(labels)]
        if _are_vectors(labels) and len(labels[0]) == len(self.names):
            return [[float(value) for value in label] for label in labels]
        chosen = [{number_of(one, row) for one in label} for row, label in enumerate(labels)]
        return [[float(number in several) for number in range(len(self.names))] for several in chosen]

    def describe(self, encoded: Sequence[Any]) -> str:
        """Describe the labels in words, with the number of rows per class.

        Args:
            encoded: labels from `encode`.

        Returns:
            One line of text.
        """
        if self.problem_type == "regression":
            return f"values from {min(encoded):g} to {max(encoded):g}"
        if self.problem_type == "multi_label_classification":
            counts = [int(sum(column)) for column in zip(*encoded, strict=True)]
            kind = "classes, several per row"
        else:
            found = Counter(encoded)
            counts, kind = [found[number] for number in range(len(self.names))], "classes"
        shown = [f"{name} ({count:,})" for name, count in zip(self.names, counts, strict=True)]
        more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
        return f"{len(shown)} {kind}: {', '.join(shown[:10])}{more}"


def find_labels(
    labels: Sequence[Any], source: str, regression: bool | None = None, known: Mapping[str, int] | None = None
) -> Labels:
    """Find out whether labels are classes or values, and which classes there are.

    Text and whole numbers are classes, also if written as `2.0` or counted from 1. Lists are several classes per row,
    or a 0 or 1 per class. Other numbers are values of a regression.

    Args:
        labels: one label per row.
        source: the table's name, for errors.
        regression: whether numbers are values. None decides by the rule above, and raises if that is not clear.
        known: number of each class of a model's head, by name; whole numbers are then its classes, from 0.

    Returns:
        The kind and the classes.

    Raises:
        DataError: a label is missing, NaN, negative, of another type or not known; there is only one class; or whole
            numbers look like a scale.

    Example:
        >>> find_labels(["1.0", "2.0", "1.0"], "ratings.csv").names
        ('1', '2')
    """
    _check(labels, source)
    several = isinstance(labels[0], (list, tuple))
    kind = "multi_label_classification" if several else "single_label_classification"
    flat = [one for label in labels for one in label] if several else labels
    if known and all(str(one) in known for one in flat):
        return Labels(kind, tuple(sorted(known, key=lambda name: known[name])))
    if not flat:
        raise DataError(f"{source}: no row has a class, so there is nothing to learn.")
    values = [_number(one) for one in flat]
    numbers = [value for value in values if value is not None]
    spelled = [(row, one) for row, (one, value) in enumerate(zip(flat, values, strict=True)) if value is None]
    vectors = several and _are_vectors(labels)
    if vectors:
        numbers = [len(labels[0]) - 1.0]  # number of the last class, even if no row has it
    if spelled:
        row, label = spelled[0]
        missing = numbers and not several and all(str(one).strip().lower() in MISSING for _, one in spelled)
        if regression or missing:
            raise DataError(f"{source}: the label of row {row} is {label!r}, which is not a number. Remove the row.")
        if known:
            raise DataError(
                f"the model's head knows {', '.join(known)}, and the data has {', '.join(_names(flat)[:5])}."
            )
    elif not several and (regression or (regression is None and not all(map(float.is_integer, numbers)))):
        return Labels("regression")
    elif min(numbers) < 0:
        row = numbers.index(min(numbers))
        raise DataError(f"{source}: labels of classes are counted from 0, but that of row {row} is {flat[row]!r}.")
    elif known and max(numbers) >= len(known):
        raise DataError(
            f"the data has {int(max(numbers)) + 1} classes, and the head of the model {len(known)}. Give the model "
            "without its head, or data of its own task."
        )
    if known:
        return Labels(kind, tuple(map(str, range(len(known)))))
    if several:
        return Labels(kind, tuple(map(str, range(len(labels[0])))) if vectors else _names(flat))
    names = _names(labels)
    if len(names) == 1:
        raise DataError(f"{source}: every label is {names[0]!r}, so there is nothing to learn.")
    many = 2 * len(names) > len(labels) > 20
    if len(numbers) == len(labels) and regression is None:
        low, high = min(numbers), max(numbers)
        if many or (len(names) > 2 and (low > 1 or high - low >= len(names))):
            raise DataError(
                f"{source}: the labels are {len(names)} whole numbers from {low:g} to {high:g}, which look like a "
                "scale. Say --regression to learn values, or --no-regression to learn classes."
            )
    elif many and regression is None:
        raise DataError(f"{source}: {len(names)} classes in {len(labels)} rows. Is this the label column?")
    return Labels(kind, names)


def _check(labels: Sequence[Any], source: str) -> None:
    """Refuse values that cannot be labels."""
    for row, label in enumerate(labels):
        said = f"{source}: the label of row {row} is {label!r}"
        several = isinstance(label, (list, tuple))
        if several != isinstance(labels[0], (list, tuple)):
            raise DataError(f"{said}. Either all labels are lists, or none.")
        for one in label if several else [label]:
            if one is None or (isinstance(one, str) and not one.strip()):
                raise DataError(f"{said}: it is missing. Fill it in or remove the row.")
            if not isinstance(one, (str, bool, int, float)):
                raise DataError(f"{said}, of type {type(one).__name__}. A label is a number or the name of a class.")
            if not math.isfinite(_number(one) or 0.0):
                raise DataError(f"{said}, which is not a finite number. Fill it in or remove the row.")
            if isinstance(one, str) and one.strip()[:1] == "[":
                raise DataError(f"{said}, text that looks like a list. Write lists as JSON lines or Parquet.")


def _are_vectors(labels: Sequence[Any]) -> bool:
    """Whether each label holds a 0 or 1 per class."""
    width = len(labels[0])
    return width > 1 and all(len(label) == width and all(one in (0, 1) for one in label) for label in labels)


def _names(labels: Sequence[Any]) -> tuple[str, ...]:
    whole = {_whole(label) for label in labels}
    if None in whole:
        return tuple(sorted({str(label).strip() for label in labels}))
    return tuple(sorted(map(str, whole), key=int))


def _whole(label: Any) -> str | None:
    """A whole number without its `.0`; None for anything else."""
    number = _number(label)
    return str(int(number)) if number is not None and number.is_integer() else None


def _number(label: Any) -> float | None:
    """The number that a label is or spells; None if it is a name."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return None
