"""A table of results: columns, rows, and the few ways to write it down."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from peft_lntune.errors import ConfigError

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Named columns and rows of values; None stands for a value that is not there.

    Attributes:
        columns: names, each once.
        rows: one value a column.

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
            raise ConfigError(f"the columns of a table have a name each, but these repeat one: {list(self.columns)}.")
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(f"row {number} should have {len(self.columns)} values, but has {len(row)}: {row}.")

    def column(self, name: str) -> list[Any]:
        """The values of a column, one per row.

        Args:
            name: of the column.

        Raises:
            ConfigError: there is no such column.
        """
        if name not in self.columns:
            raise ConfigError(f"the table has no column {name!r}. It has: {', '.join(self.columns)}.")
        number = list(self.columns).index(name)
        return [row[number] for row in self.rows]

    def sorted_by(self, column: str, *, largest: bool = False) -> "Table":
        """The table with its rows in the order of a column; rows that are equal keep their order.

        Args:
            column: its name. None comes last.
            largest: whether the largest value comes first.

        Returns:
            A new table.

        Raises:
            ConfigError: there is no such column.
        """
        values = self.column(column)
        known = [number for number, value in enumerate(values) if value is not None]
        known.sort(key=lambda number: values[number], reverse=largest)
        unknown = [number for number, value in enumerate(values) if value is None]
        return Table(self.columns, tuple(self.rows[number] for number in known + unknown))

    def to_markdown(self, missing: str = "-") -> str:
        """The table in Markdown.

        Args:
            missing: what is written for None.

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
        """Write the table as CSV (UTF-8) with every digit; None is an empty cell."""
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
    """A value as people read it: four digits of a float."""
    if value is None:
        return missing
    return f"{value:.4g}" if isinstance(value, float) else str(value)
