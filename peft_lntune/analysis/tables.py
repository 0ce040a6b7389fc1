"""A table of results: named columns, rows, and output as text, Markdown or CSV."""

import csv
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from peft_lntune.errors import ConfigError

__all__ = ["Table", "fill"]


def fill(text: str, width: int | None, indent: str = "") -> str:
    """Wrap a text between words; words and paths stay whole.

    Args:
        text: one paragraph.
        width: longest line; None: no limit.
        indent: what the second and further lines begin with.

    Returns:
        The lines, joined.

    Example:
        >>> print(fill("norm: not tuned", 10, "  "))
        norm: not
          tuned
    """
    if width is None or len(text) <= width:
        return text
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, width, subsequent_indent=indent, drop_whitespace=True, **options)


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

    def to_records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries, with every digit.

        Returns:
            One dictionary per row, with the columns as keys.

        Example:
            >>> Table(("norm", "score"), (("ln_1", 0.25),)).to_records()
            [{'norm': 'ln_1', 'score': 0.25}]
        """
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def to_text(self, width: int | None = None) -> str:
        """The table as text, in lines of at most `width` characters.

        Names of columns and texts are wrapped where they have a space or a dot. If that is not enough, the table is
        split into blocks of columns, and each block repeats the columns that identify a row. Numbers are never cut.

        Args:
            width: longest line; None: no limit. A line may be longer if one word or number is.

        Returns:
            The lines, joined.

        Example:
            >>> print(Table(("norm", "mean_change", "rank"), (("ln_1", 0.25, 1),)).to_text(14))
            norm  mean_
                  change
            ln_1  0.25
            <BLANKLINE>
            norm  rank
            ln_1  1
        """
        lines = self._texts("-")
        whole = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        if width is None or _total(whole) <= width:
            return "\n".join(_padded(line, whole) for line in lines)
        return min(_fitted(lines, self._keys(), width), key=lambda text: text.count("\n"))

    def __str__(self) -> str:
        return self.to_text()

    def _keys(self) -> int:
        """How many of the first columns identify a row."""
        for number in range(1, len(self.columns)):
            if len({tuple(row[:number]) for row in self.rows}) == len(self.rows):
                return number
        return 1

    def _texts(self, missing: str) -> list[list[str]]:
        """The header and the rows as texts."""
        return [list(self.columns), *([_text(value, missing) for value in row] for row in self.rows)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _pieces(text: str) -> list[str]:
    """What a text may be wrapped into: words, and parts of names. Numbers are one piece."""
    return re.split(r"(?<= )|(?<=[._/+])(?=[A-Za-z])", text)


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for piece in _pieces(text):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _wrapped(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    columns = [_wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    for number in range(max(map(len, columns))):
        yield _padded([lines[number] if number < len(lines) else "" for lines in columns], widths)


def _fitted(lines: Sequence[Sequence[str]], keys: int, width: int) -> Iterator[str]:
    """Ways to fit a table: wrapped texts, or blocks of columns with whole or with wrapped texts."""
    columns = list(zip(*lines, strict=True))
    least = [max(len(piece.rstrip()) for cell in cells for piece in _pieces(cell)) for cells in columns]
    # Names of columns may be wrapped in each way: that costs a few lines of the whole table.
    wide = [max(least[n], *map(len, cells[1:]), 0) for n, cells in enumerate(columns)]
    ways = [_greedy(wide, least, keys, width), _greedy([*least[:keys], *wide[keys:]], least, keys, width)]
    if _total(least) <= width:
        ways.insert(0, [(list(range(len(columns))), _narrowed(wide, least, width))])
    for blocks in ways:
        yield "\n\n".join(
            "\n".join(text for line in lines for text in _wrapped([line[n] for n in numbers], widths))
            for numbers, widths in blocks
        )


def _greedy(wide: Sequence[int], least: Sequence[int], keys: int, width: int) -> list[tuple[list[int], list[int]]]:
    """Blocks of as many columns as fit, each with the first `keys` columns."""
    blocks: list[list[int]] = []
    for number in range(keys, len(wide)):
        last = [*blocks[-1], number] if blocks else [*range(keys), number]
        if blocks and _total([wide[n] for n in last]) > width:
            blocks.append([*range(keys), number])
        else:
            blocks[-1:] = [last]
    blocks = blocks or [list(range(keys))]
    return [(block, _narrowed([wide[n] for n in block], [least[n] for n in block], width)) for block in blocks]


def _narrowed(wide: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Take characters from the widest columns until the line fits, down to the longest word of each."""
    found = list(wide)
    while _total(found) > width and found != list(least):
        number = max((n for n in range(len(found)) if found[n] > least[n]), key=found.__getitem__)
        found[number] -= 1
    return found


def _text(value: Any, missing: str) -> str:
    """A value as text, floats with four digits."""
    if value is None:
        return missing
    return f"{value:.4g}" if isinstance(value, float) else str(value)
