"""Labelled texts from files, and their labels as numbers."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_lntune.errors import DataError

__all__ = ["TEXT_COLUMNS", "Rows", "encode_labels", "read_rows"]

TEXT_COLUMNS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
"""What is looked for where no text column is named."""


@dataclass(frozen=True)
class Rows:
    """Labelled texts.

    Attributes:
        texts: of each row one text, or two of a pair.
        labels: one a row, as the file has it.
    """

    texts: Sequence[tuple[str, ...]]
    labels: Sequence[Any]


def read_rows(file: str | Path, text_columns: Sequence[str] = (), label_column: str = "label") -> Rows:
    """Read labelled texts from JSON lines, CSV or Parquet, by the ending of the file.

    Args:
        file: `.jsonl` or `.json` (one object a line), `.csv` (with a header) or `.parquet` (needs pyarrow).
        text_columns: one, or two of a pair; none: the first of `TEXT_COLUMNS` that is there.
        label_column: ints, floats, or names of classes.

    Raises:
        DataError: another ending, a line that is no JSON object, no rows, or no such column.
        ModuleNotFoundError: pyarrow is not installed.
    """
    path = Path(file)
    if path.suffix not in _READERS:
        raise DataError(f"{path} should end in one of {', '.join(_READERS)}, which says how it is read.")
    found = _READERS[path.suffix](path)
    if not found:
        raise DataError(f"{path} holds no rows.")
    has = list(found[0])
    texts = [tuple(text_columns)] if text_columns else [names for names in TEXT_COLUMNS if set(names) <= set(has)]
    wanted = [*(texts[0] if texts else ("text",)), label_column]
    for number, row in enumerate(found):
        lost = [name for name in wanted if row.get(name) is None]
        if lost:
            raise DataError(
                f"row {number} of {path} has no {lost[0]!r}, only {', '.join(row)}. Name the columns: --text-column, "
                "--label-column."
            )
    return Rows([tuple(str(row[name]) for name in texts[0]) for row in found], [row[label_column] for row in found])


def encode_labels(labels: Sequence[Any], known: Mapping[str, int]) -> tuple[list, int]:
    """Labels as numbers, and how many classes there are; 1 for a regression.

    Whole numbers are classes, also as text and where a table has made floats of them (`1.0`); other numbers are values
    of a regression; anything else is the name of a class.

    Args:
        labels: of all rows, in order.
        known: the classes of the model's head by name; empty where it has none.

    Raises:
        DataError: a label is missing, NaN, a list, a negative class, or not known to the head; the row is named.
    """
    for row, label in enumerate(labels):
        said = f"the label of row {row} is {label!r}"
        if label is None or (isinstance(label, str) and not label.strip()):
            raise DataError(f"{said}: it is missing. Fill it in, or take the row out.")
        if not isinstance(label, (str, bool, int, float)):
            raise DataError(f"{said}, of type {type(label).__name__}. A label is a number or the name of a class.")
        if _number(label) is not None and not math.isfinite(_number(label) or 0.0):
            raise DataError(f"{said}, which is no number to learn. Fill it in, or take the row out.")
    if known and all(str(label) in known for label in labels):
        return [known[str(label)] for label in labels], max(known.values()) + 1
    numbers = [number for label in labels if (number := _number(label)) is not None]
    if len(numbers) == len(labels):
        if any(number != int(number) for number in numbers):
            return numbers, 1
        if min(numbers) < 0:
            row = numbers.index(min(numbers))
            raise DataError(f"labels of classes are counted from 0, but that of row {row} is {labels[row]!r}.")
        return [int(number) for number in numbers], int(max(numbers)) + 1
    names = sorted({str(label) for label in labels})
    if known:
        raise DataError(f"the model's head knows {', '.join(known)}, and the data has {', '.join(names[:5])}.")
    return [names.index(str(label)) for label in labels], len(names)


def _number(label: Any) -> float | None:
    """The number that a label is or spells; None where it is a name."""
    try:
        return float(label)
    except ValueError:
        return None


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"line {number + 1} of {path} is no JSON: {error}. One object a line is needed."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"line {number + 1} of {path} should be a JSON object, but is {type(row).__name__}.")
            found.append(row)
    return found


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading Parquet needs pyarrow: pip install pyarrow") from error
    return parquet.read_table(path).to_pylist()


_READERS = {".jsonl": _read_json_lines, ".json": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}
