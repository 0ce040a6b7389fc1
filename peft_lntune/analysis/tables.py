"""A table of results: named columns, rows, and output as text, Markdown or CSV."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from peft_lntune.errors import ConfigError

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Named columns and rows of values; None stands for a missing value.

    Attributes:
        columns: distinct names.
        rows: each with one value per column.

    Example:
        >>> table = Table(("norm", "score"), (("ln_1", 0.25), ("ln_2", None)))
        >>> print(table)
        norm  score
        ln_1  0.25
        ln_2  -
        >>> table.sorted_by("score").column("norm")
        ['ln_1', 'ln_2']
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        if len(set(self.columns)) < len(self.columns):
            raise ConfigError(f"the columns of a table must not repeat one, but are {list(self.columns)}.")
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(f"row {number} should have {len(self.columns)} values, but has {len(row)}: {row}.")

    def column(self, name: str) -> list[Any]:
        """The values of one column.

        Args:
            name: name of the column.

        Returns:
            One value per row.

        Raises:
            ConfigError: the table has no column of this name.
        """
        if name not in self.columns:
            raise ConfigError(f"the table has no column {name!r}. It has: {', '.join(self.columns)}.")
        number = list(self.columns).index(name)
        return [row[number] for row in self.rows]

    def sorted_by(self, column: str, *, largest: bool = False) -> "Table":
        """Sort the rows by one column; rows with equal values keep their order, and None comes last.

        Args:
            column: name of the column.
            largest: whether the largest value comes first.

        Returns:
            A new table.

        Raises:
            ConfigError: the table has no column of this name.
        """
        values = self.column(column)
        known = [number for number, value in enumerate(values) if value is not None]
        known.sort(key=lambda number: values[number], reverse=largest)
        unknown = [number for number, value in enumerate(values) if value is None]
        return Table(self.columns, tuple(self.rows[number] for number in known + unknown))

    def to_markdown(self, missing: str = "-") -> str:
        """The table in Markdown.

        Args:
            missing: the text for None.

        Returns:
            The lines, joined.

        Example:
            >>> print(Table(("norm", "score"), (("ln_1", 0.25),)).to_markdown())
            | norm | score |
            |---|---|
            | ln_1 | 0.25 |
        """
        header, *lines = [[cell.replace("|", "\\|") for cell in line] for line in self._texts(missing)]
        written = ["| " + " | ".join(line) + " |" for line in (header, *lines)]
        return "\n".join([written[0], "|" + "---|" * len(header), *written[1:]])

    def to_csv(self, path: "str | PathLike[str]") -> None:
        """Write the table as CSV (UTF-8) in full precision, with an empty cell for None.

        Args:
            path: file to write.
        """
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(self.rows)

    def __str__(self) -> str:
        lines = self._texts("-")
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(line.rstrip() for line in padded)

    def _texts(self, missing: str) -> list[list[str]]:
        """The header and the rows as texts."""
        return [list(self.columns), *([_text(value, missing) for value in row] for row in self.rows)]


def _text(value: Any, missing: str) -> str:
    """A value as text, floats with four digits."""
    if value is None:
        return missing
    return f"{value:.4g}" if isinstance(value, float) else str(value)
