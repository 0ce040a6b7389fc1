"""Options shared by commands that show a table, and the function that shows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from peft_lntune.analysis import Table
from peft_lntune.storage.atomic import new_file

__all__ = ["csv_option", "layers_option", "plot_option", "shared_option", "show", "to_csv", "with_layers"]

csv_option = click.option(
    "--csv",
    "csv_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the table to this CSV file, with every digit.",
)
plot_option = click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the table into this file: PNG, PDF or SVG, by the ending.",
)
layers_option = click.option(
    "--layers/--no-layers", default=True, help="One row per layer, or one row for all layers of a component."
)
shared_option = click.option(
    "--shared", is_flag=True, help="Compare only tensors that both have in the same shape; leave out other heads."
)


def with_layers(plot: Path | None, layers: bool) -> None:
    """Refuse a plot of components by layers if the layers are pooled.

    Args:
        plot: the file of `--plot`, if given.
        layers: whether the table has one row per layer.

    Raises:
        click.UsageError: a plot is asked for, and layers are pooled.
    """
    if plot is not None and not layers:
        raise click.UsageError("--plot shows components by layers; leave --no-layers out.")


def to_csv(table: Table, file: Path) -> None:
    """Write a table as CSV. The file appears whole or not at all.

    Args:
        table: the table.
        file: the file.
    """
    with new_file(file) as made:
        table.to_csv(made)


def show(
    table: Table,
    csv_file: Path | None = None,
    plot: Path | None = None,
    draw: Callable[[Table, Path], Any] | None = None,
) -> None:
    """Print a table, and write it to files if asked for.

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
    click.echo(str(table))
