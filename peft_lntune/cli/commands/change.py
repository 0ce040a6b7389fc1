"""`peft-lntune change`: which components training moved."""

from pathlib import Path
from typing import Any

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import csv_option, json_option, layers_option, plot_option, refuse_without, shared_option
from peft_lntune.core.choices import MEASURES

__all__ = ["command"]


def _check(plot: Path | None, layers: bool, **_: Any) -> None:
    if plot is None:
        refuse_without("--plot", "measure")
    elif not layers:
        raise click.UsageError("--plot shows components by layers; leave --no-layers out.")


@make("change", "Which components training moved, and how far.", _check)
@click.argument("before")
@click.argument("after")
@layers_option
@shared_option
@json_option
@csv_option
@plot_option
@click.option(
    "--measure", type=click.Choice(MEASURES), default=MEASURES[0], show_default=True, help="What --plot shows."
)
def command(
    before: str,
    after: str,
    layers: bool,
    shared: bool,
    as_json: bool,
    csv_file: Path | None,
    plot: Path | None,
    measure: str,
) -> None:
    """Show how far training moved each component of a model, by three measures and their ranks.

    BEFORE is a saved model: a safetensors file, the index of a sharded checkpoint, or a folder. AFTER is another saved
    model, or the folder of an adapter for BEFORE.

    \b
    Examples:
      peft-lntune change ./bert-base ./bert-sst2 --shared --no-layers
      peft-lntune change ./bert-base ./my-adapter --plot change.png
    """
    from peft_lntune.analysis import plot_change
    from peft_lntune.cli.change import change_between
    from peft_lntune.cli.printing import print_result, write_files

    table = change_between(before, after, layers=layers, shared=shared)
    write_files(table, csv_file, plot, lambda drawn, path: plot_change(drawn, path, measure))
    print_result(as_json, {"table": table}, table)
