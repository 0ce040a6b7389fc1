"""Reads tables from files, and detects what their labels are. Needs `datasets`, of the extra `examples`.

Only the commands read data, so this module is here. The examples import it too, so that they read files in the same
way.
"""

import codecs
import csv
import io
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lntune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

__all__ = [
    "ENDINGS",
    "NAME_COLUMNS",
    "TEXT_COLUMNS",
    "Labels",
    "class_names",
    "count_cut",
    "describe_data",
    "find_columns",
    "find_labels",
    "read_labels",
    "read_table",
    "read_texts",
    "token_rows",
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

FOREIGN = {
    b"\x1f\x8b": "is compressed by gzip. Unpack it first.",
    b"PK\x03\x04": "is a zip archive or an Excel workbook. Unpack it, or save the sheet as CSV.",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook. Save the sheet as CSV.",
    b"version https://git-lfs": "is a pointer of Git LFS. Fetch the file itself: git lfs pull.",
}
"""First bytes of files that often have the ending of a table, and what to do with such a file."""


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
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path} should end in one of {', '.join(ENDINGS)}, because the ending says how it is read.")
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    try:
        import datasets
    except ModuleNotFoundError as error:
        message = "reading data files needs datasets: pip install datasets, or peft-lntune with its extra 'examples'"
        raise ModuleNotFoundError(message) from error
    with path.open("rb") as opened:
        first = opened.read(32)
    for begin, problem in FOREIGN.items():
        if first.startswith(begin):
            raise DataError(f"{path} {problem}")
    kind = path.suffix.lower()
    if kind == ".parquet":
        table = _read_parquet(path)
    elif kind in (".csv", ".tsv"):
        table = datasets.Dataset.from_dict(_read_csv(path, _read_text(path, encoding)))
    elif kind == ".conll":
        table = datasets.Dataset.from_dict(_read_conll(path, _read_text(path, encoding)))
    else:
        table = _read_json(path, _read_text(path, encoding))
    if not len(table):
        raise DataError(f"{path} has no rows.")
    return table


def _read_text(path: Path, encoding: str) -> str:
    """The text of a file, without a byte order mark; refuses what is decoded, but not by the file's own encoding."""
    content = path.read_bytes()
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except LookupError as error:
        raise DataError(f"unknown encoding {encoding!r}. Name one such as utf-8, cp1252 or utf-16.") from error
    except UnicodeError as error:
        likely = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp1252"
        raise DataError(
            f"{path} is not {encoding}: {error}. Name its encoding, such as --encoding {likely}."
        ) from error
    # Latin-1 decodes any bytes; cp1252 has quotation marks and the euro where it has control characters.
    wrong = "[\0\x80-\x9f]" if codecs.lookup(encoding).name == "iso8859-1" else "\0"
    if found := re.search(wrong, text):
        line, likely = text.count("\n", 0, found.start()) + 1, "utf-16" if found.group() == "\0" else "cp1252"
        raise DataError(
            f"line {line} of {path} has the control character {found.group()!r}, so its encoding is not {encoding}, or "
            f"it is no text. Name its encoding, such as --encoding {likely}."
        )
    return text


def _read_csv(path: Path, text: str) -> dict[str, list[str]]:
    first = next(iter(text.splitlines()), "")
    mark = max(",;\t|", key=re.sub('"[^"]*"', "", first).count)
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))
    # Strict: what follows a closing quotation mark would be taken into the text, with whole rows in between.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    header, rows, line, problem = [], [], 0, ""
    try:
        header = [name.strip() for name in next(reader, [])]
        line = reader.line_num
        for row in reader:
            line = reader.line_num
            if len(row) == len(header) and not (mark == "\t" and any("\t" in value and "\n" in value for value in row)):
                rows.append(row)
            elif len(header) == 1 and not row:
                rows.append([""])  # an empty text; those at the end are no rows
            elif len(row) == len(header):
                problem = f"a quotation mark before line {line} begins a text that holds a tab and a line break"
            elif len("".join(row).strip()):
                problem = f"line {line} has {len(row)} fields"
            if problem:
                break
    except csv.Error as error:
        problem = f"the row that begins in line {line + 1} has a quotation mark too many or too few ({error})"
    finally:
        csv.field_size_limit(limit)
    if problem:
        raise DataError(
            f"{path} is not a table with {len(header)} columns, separated by {mark!r}: {problem}. Quote texts that "
            "contain the separator, a quotation mark or a line break, and double the quotation marks in them; or "
            "write JSON lines."
        )
    while len(header) == 1 and rows and rows[-1] == [""]:
        rows.pop()
    names = [name or f"unnamed {i}" for i, name in enumerate(header)]
    _check_names(names, path)
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}


def _check_names(names: Sequence[str], path: Path) -> None:
    """Refuse a name that two columns have."""
    name, count = Counter(names).most_common(1)[0] if names else ("", 1)
    if count > 1:
        raise DataError(f"{path} has {count} columns {name!r}. Rename all but one.")


def _read_conll(path: Path, text: str) -> dict[str, list[list[str]]]:
    sentences: list[list[list[str]]] = [[]]
    for number, line in enumerate(text.split("\n")):
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


def _read_parquet(path: Path) -> "Dataset":
    import datasets
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    _check_names(table.column_names, path)
    return datasets.Dataset(table)


def _read_json(path: Path, text: str) -> "Dataset":
    import datasets

    if re.fullmatch(r"[\s\[\]{}]*", text):
        return datasets.Dataset.from_dict({})
    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is raised here
    try:
        # A cache that outlives the call would hide later changes of the file.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "data.json"
            copy.write_text(text, encoding="utf-8", newline="")
            return datasets.Dataset.from_json(str(copy), cache_dir=folder, keep_in_memory=True)
    except (StopIteration, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(text.split("\n")):
                try:
                    json.loads(line if line.strip() else "{}")
                except json.JSONDecodeError as wrong:
                    raise DataError(
                        f"line {number + 1} of {path} is not JSON: {wrong}. Write one object per line."
                    ) from wrong
        raise DataError(f"{path} cannot be read: {error.__cause__ or error}") from error
    finally:
        datasets.logging.set_verbosity(level)
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
                f"row {row} of {source} has no text in {column!r}: {_show(value)}. Fill it in or remove the row."
            )
        texts.append(str(value))
    return texts


def token_rows(tokenizer: Any, texts: Sequence[str], length: int, source: str) -> "Tensor":
    """Join texts to one stream of tokens, with an empty line between two, and cut it into rows of equal length.

    Args:
        tokenizer: tokenizer of the model.
        texts: the texts.
        length: tokens per row.
        source: the file's name, for errors.

    Returns:
        `(rows, length)`, int64; tokens that do not fill a row are left out.

    Raises:
        DataError: there are fewer tokens than one row has.
    """
    import torch

    each = tokenizer([f"{text}\n\n" for text in texts])["input_ids"] if texts else []
    stream = torch.tensor([token for ids in each for token in ids], dtype=torch.int64)
    if len(stream) < length:
        raise DataError(f"{source} holds {len(stream)} tokens of text, and one row has {length}. Give more text.")
    return stream[: len(stream) // length * length].view(-1, length)


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


def describe_data(rows: str, columns: Sequence[str], cut: int, max_length: int, labels: str) -> str:
    """Say in one line what was understood of data.

    Args:
        rows: the numbers of rows, in words.
        columns: the columns of texts.
        cut: the number of rows whose texts are cut, from `count_cut`.
        max_length: number of tokens that are kept.
        labels: the labels in words, from `Labels.describe`.

    Returns:
        The line.

    Example:
        >>> describe_data("12 train rows", ["text"], 3, 128, "2 classes: no (8), yes (4)")
        'data: 12 train rows; texts in text, 3 of them cut at 128 tokens; labels: 2 classes: no (8), yes (4)'
    """
    return f"data: {rows}; texts in {', '.join(columns)}, {cut:,} of them cut at {max_length} tokens; labels: {labels}"


def class_names(rows: "Dataset", column: str) -> tuple[str, ...]:
    """Find the names of classes that come with a column, such as a `ClassLabel` of a Parquet file.

    Args:
        rows: the table.
        column: the column of labels.

    Returns:
        The names, in the order of their numbers; empty if the column holds plain numbers or text.
    """
    kind = rows.features[column]
    return tuple(getattr(getattr(kind, "feature", kind), "names", None) or ())


def read_labels(rows: "Dataset", columns: Sequence[str], source: str, separator: str | None = None) -> list[Any]:
    """Read the labels of a table.

    Args:
        rows: the table.
        columns: one column of labels, or several that each hold a 0 or 1 per row.
        source: the table's name, for errors.
        separator: what stands between the classes of one row, in text such as `toxic|insult`.

    Returns:
        One label per row: a name if the classes have names, a list if a row may have several.

    Raises:
        DataError: several columns hold something else than 0 and 1, or a text to be split is missing.
    """
    if len(columns) == 1:
        names, labels = class_names(rows, columns[0]), rows[columns[0]][:]
        if names:
            return [_named(label, names) for label in labels]
        if not separator:
            return labels
        for row, label in enumerate(labels):
            if not str("" if label is None else label).strip():
                raise DataError(
                    f"{source}: the label of row {row} is {label!r}: it is missing. Fill it in or remove the row; "
                    f"{separator!r} alone is a row without a class."
                )
        return [[part.strip() for part in str(label).split(separator) if part.strip()] for label in labels]
    flags = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
    found = [[flags.get(str(label).lower()) for label in row] for row in zip(*(rows[c] for c in columns), strict=True)]
    for i, several in enumerate(found):
        if None in several:
            column = columns[several.index(None)]
            raise DataError(
                f"{source}: row {i} has {_show(rows[column][i])} in {column!r}; several label columns hold 0 or 1."
            )
    return found


def _named(label: Any, names: Sequence[str]) -> Any:
    """The names of one label's classes; None for -1, which data sets write where a label is hidden."""
    if isinstance(label, (list, tuple)):
        return [_named(one, names) for one in label]
    return None if label is None or label < 0 else names[label]


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
    or a 0 or 1 per class. Other numbers are values of a regression. What has two readings is asked about.

    Args:
        labels: one label per row.
        source: the table's name, for errors.
        regression: True: numbers are values. False: each label is one class as it stands. None decides by the rule
            above, and raises if that is not clear.
        known: number of each class of a model's head, by name; whole numbers are then its classes, from 0.

    Returns:
        The kind and the classes.

    Raises:
        DataError: a label is missing, NaN, negative, of another type or not known; all labels are equal; whole numbers
            look like a scale; numbers have a comma; or texts look like several classes each.

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
        if regression is not False and not known and all(_COMMA.fullmatch(str(one).strip()) for _, one in spelled):
            raise DataError(
                f"{source}: the label of row {row} is {label!r}, a number with a comma. Write a point to learn values; "
                "or say --no-regression to learn classes, or --label-separator , if it is several classes."
            )
        if regression or missing:
            raise DataError(f"{source}: the label of row {row} is {label!r}, which is not a number. Remove the row.")
        if known:
            raise DataError(
                f"the model's head knows {', '.join(known)}, and the data has {', '.join(_names(flat)[:5])}."
            )
        if regression is None and not several and (mark := _separator(_names(flat))):
            row = next(row for row, one in spelled if mark in str(one))
            raise DataError(
                f"{source}: the label of row {row} is {labels[row]!r}, which looks like several classes. Say "
                f"--label-separator {mark!r} to learn several per row, or --no-regression to learn one per row."
            )
    elif not several and (regression or (regression is None and not all(map(float.is_integer, numbers)))):
        if not known and len(set(numbers)) == 1:
            raise DataError(f"{source}: every label is {flat[0]!r}, so there is nothing to learn.")
        return Labels("regression")
    elif min(numbers) < 0 and (known or several or regression is None):
        one = flat[numbers.index(min(numbers))]
        row = next(row for row, label in enumerate(labels) if one in (label if several else [label]))
        raise DataError(
            f"{source}: labels of classes are counted from 0, but that of row {row} is {labels[row]!r}. Remove the row "
            "if its label is hidden, or say --regression to learn values, or --no-regression to learn classes."
        )
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


def _show(value: Any) -> str:
    """A value as an error shows it: a text or a list may be long."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


_COMMA = re.compile(r"[+-]?\d[\d.]*,\d+")


def _check(labels: Sequence[Any], source: str) -> None:
    """Refuse values that cannot be labels."""
    for row, label in enumerate(labels):
        several = isinstance(label, (list, tuple))
        problem = None
        if several != isinstance(labels[0], (list, tuple)):
            problem = ". Either all labels are lists, or none."
        for one in label if several else [label]:
            if one is None or (isinstance(one, str) and not one.strip()):
                problem = problem or ": it is missing. Fill it in or remove the row."
            elif not isinstance(one, (str, bool, int, float)):
                problem = problem or f", of type {type(one).__name__}. A label is a number or the name of a class."
            elif not math.isfinite(_number(one) or 0.0):
                problem = problem or ", which is not a finite number. Fill it in or remove the row."
            elif isinstance(one, str) and one.strip()[:1] in ("[", "{"):
                problem = problem or ", text that looks like a list. Write lists as JSON lines or Parquet."
        if problem:
            raise DataError(f"{source}: the label of row {row} is {_show(label)}{problem}")


def _are_vectors(labels: Sequence[Any]) -> bool:
    """Whether each label holds a 0 or 1 per class."""
    width = len(labels[0])
    return width > 1 and all(len(label) == width and all(one in (0, 1) for one in label) for label in labels)


def _names(labels: Sequence[Any]) -> tuple[str, ...]:
    whole = {_whole(label) for label in labels}
    if None in whole:
        return tuple(sorted({str(label).strip() for label in labels}))
    return tuple(sorted(map(str, whole), key=int))


def _separator(names: Sequence[str]) -> str | None:
    """What separates several classes in one label: each of its parts is also in another label."""
    for mark in "|;,":
        parts = {name: {part.strip() for part in name.split(mark)} for name in names}
        found = Counter(part for several in parts.values() for part in several)
        if any(len(several) > 1 and all(found[part] > 1 for part in several) for several in parts.values()):
            return mark
    return None


def _whole(label: Any) -> str | None:
    """A whole number without its `.0`; None for anything else."""
    number = _number(label)
    if number is None or not number.is_integer():
        return None
    try:
        return str(int(label))  # exact, also above 2^53
    except ValueError:
        return str(int(number))


def _number(label: Any) -> float | None:
    """The number that a label is or spells; None if it is a name."""
    if isinstance(label, str) and "_" in label:  # Python reads 1_2 as 12
        return None
    try:
        return float(label)
    except (TypeError, ValueError):
        return None
