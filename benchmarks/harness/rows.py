"""Result rows: one JSON object per line, appended when it is known, so that a killed run resumes where it stopped."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Cell = Mapping[str, Any]
Row = dict[str, Any]


def cell_key(cell: Cell) -> str:
    """Return the one spelling of a cell's coordinates.

    Example:
        >>> cell_key({"task": "sst2", "arm": "ln"}) == cell_key({"arm": "ln", "task": "sst2"})
        True
    """
    return json.dumps(dict(cell), sort_keys=True)


class Rows:
    """The rows of one JSON lines file, keyed by the cell each belongs to."""

    def __init__(self, path: Path) -> None:
        """Read what the file holds.

        Args:
            path: a JSON lines file that need not exist yet.
        """
        self.path = path
        self._rows: dict[str, Row] = {cell_key(row["cell"]): row for row in _read(path)}
        self._adopted: set[str] = set()

    def __contains__(self, cell: Cell) -> bool:
        """Tell whether this cell has been run."""
        return cell_key(cell) in self._rows

    def __iter__(self) -> Iterator[Row]:
        """Walk the rows in the order they were written."""
        return iter(list(self._rows.values()))

    def __len__(self) -> int:
        """Count the cells that have been run."""
        return len(self._rows)

    def get(self, cell: Cell) -> Row | None:
        """Return the row of this cell, or None where it has not been run."""
        return self._rows.get(cell_key(cell))

    def adopt(self, rows: Iterable[Row]) -> None:
        """Count rows of another experiment as run here too; they stay in its file alone."""
        for row in rows:
            key = cell_key(row["cell"])
            if key not in self._rows:
                self._rows[key] = row
                self._adopted.add(key)

    def own(self) -> Iterator[Row]:
        """Walk the rows that are no other experiment's."""
        return iter([row for key, row in self._rows.items() if key not in self._adopted])

    def append(self, row: Row) -> None:
        """Write a row and wait until it is on the disk.

        Args:
            row: JSON values, with the coordinates under `cell`.

        Raises:
            ValueError: the cell has a row already.
        """
        key = cell_key(row["cell"])
        if key in self._rows:
            raise ValueError(
                f"This cell has a row already: {key}. Remove the line from {self.path.name} to run it again."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if _is_torn(self.path):
                file.write(b"\n")
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows[key] = row


def _read(path: Path) -> Iterator[Row]:
    """Yield the whole rows of a file; an incomplete line left by a kill is skipped, and its cell runs again."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _is_torn(path: Path) -> bool:
    """Tell whether the last line lacks its end."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
