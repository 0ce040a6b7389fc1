"""The options that commands with a table share, and how they show it."""

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
    help="Write the table there, with every digit.",
)
plot_option = click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the table: PNG, PDF or SVG, by the ending."
)
layers_option = click.option(
    "--layers/--no-layers", default=True, help="One row a layer, or all layers of a component as one."
)
shared_option = click.option(
    "--shared", is_flag=True, help="Compare what both have in one shape; leave heads of other sizes out."
)


def with_layers(plot: Path | None, layers: bool) -> None:
    """Refuse a picture of components by layers where the layers are pooled."""
    if plot is not None and not layers:
        raise click.UsageError("--plot shows components by layers; leave --no-layers out.")


def to_csv(table: Table, file: Path) -> None:
    """Write a table as CSV, whole or not at all."""
    with new_file(file) as made:
        table.to_csv(made)


def show(
    table: Table,
    csv_file: Path | None = None,
    plot: Path | None = None,
    draw: Callable[[Table, Path], Any] | None = None,
) -> None:
    """Print a table, and write it into files where that is asked for.

    Args:
        table: what a command found.
        csv_file: where to write it as CSV; None: nowhere.
        plot: where to draw it; None: nowhere.
        draw: draws a table into a file, such as `plot_change`.
    """
    if csv_file is not None:
        to_csv(table, csv_file)
    if plot is not None and draw is not None:
        with new_file(plot) as made:
            draw(table, made)
    click.echo(str(table))
