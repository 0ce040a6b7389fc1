"""What commands print: tables that fit the terminal, or JSON; and tables in files."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import click

from peft_lntune.analysis import Table
from peft_lntune.analysis.tables import fill
from peft_lntune.storage.atomic import new_file

__all__ = ["print_result", "to_csv", "write_files"]


class Fitting(Protocol):
    """Something that is printed in lines of a given width, such as a `Table` or a `Plan`."""

    def to_text(self, width: int | None = None) -> str: ...


def print_result(as_json: bool, data: Mapping[str, Any], *texts: "Fitting | str") -> None:
    """Print the result of a command on stdout: JSON, or texts as wide as the terminal.

    Without a terminal, lines have 80 characters, or as many as the environment variable COLUMNS says.

    Args:
        as_json: print `data` as one JSON object, with tables as lists of objects, and null for numbers that are
            not finite.
        data: the result as data.
        *texts: the result for people, separated by blank lines.
    """
    if as_json:
        click.echo(json.dumps(_plain(data), indent=2, allow_nan=False))
        return
    width = shutil.get_terminal_size().columns
    click.echo("\n\n".join(fill(text, width) if isinstance(text, str) else text.to_text(width) for text in texts))


def write_files(
    table: Table,
    csv_file: Path | None = None,
    plot: Path | None = None,
    draw: Callable[[Table, Path], Any] | None = None,
) -> None:
    """Write a table to files, if asked for. Each file appears whole or not at all.

    Args:
        table: the table.
        csv_file: CSV file to write; None: no file.
        plot: file to draw into; None: no plot.
        draw: a function `(table, file)` that draws the table, such as `plot_change`.
    """
    if csv_file is not None:
        to_csv(table, csv_file)
    if plot is not None and draw is not None:
        with new_file(plot) as made:
            draw(table, made)


def to_csv(table: Table, file: Path) -> None:
    """Write a table as CSV. The file appears whole or not at all.

    Args:
        table: the table.
        file: the file.
    """
    with new_file(file) as made:
        table.to_csv(made)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Table):
        return _plain(value.to_records())
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
