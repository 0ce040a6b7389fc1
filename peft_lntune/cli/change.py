"""`peft-lntune change`: which components training moved."""

from pathlib import Path

import click

from peft_lntune.analysis import Table, match_tensors, parameter_change, plot_change
from peft_lntune.analysis.change import MEASURES
from peft_lntune.cli.models import load_adapted
from peft_lntune.cli.tables import csv_option, layers_option, plot_option, shared_option, show, with_layers

__all__ = ["change_between", "command"]


def change_between(before: str, after: str, *, layers: bool = True, shared: bool = False) -> Table:
    """`parameter_change` of two saved models, or of a model and an adapter for it.

    Args:
        before: checkpoint of a model: a safetensors file, the index of a sharded one, or a folder.
        after: likewise; or the directory of an adapter, which is then put into the model `before`; of heads saved with
            it only those count that `before` has in the same shape.
        layers: one row a component and layer; False: one row a component.
        shared: compare what both have in one shape.

    Returns:
        The table of `parameter_change`.

    Raises:
        ConfigError: names or shapes differ.
        AdapterFileError: a file is missing or damaged.
    """
    if Path(after, "adapter_config.json").is_file():
        # A head that the folder does not have starts at random, so there is nothing it has moved from.
        return parameter_change(*match_tensors(before, load_adapted(after, before), shared=True), layers=layers)
    return parameter_change(*match_tensors(before, after, shared=shared), layers=layers)


@click.command("change", short_help="Which components training moved, and how far.")
@click.argument("before")
@click.argument("after")
@layers_option
@shared_option
@csv_option
@plot_option
@click.option(
    "--measure", type=click.Choice(MEASURES), default=MEASURES[0], show_default=True, help="What --plot shows."
)
def command(
    before: str, after: str, layers: bool, shared: bool, csv_file: Path | None, plot: Path | None, measure: str
) -> None:
    """How far training moved each component of a model, by three measures and their ranks.

    BEFORE is a saved model: a safetensors file, the index of a sharded checkpoint, or a folder. AFTER is another one,
    or the directory of an adapter for BEFORE.

    \b
    Examples:
      peft-lntune change ./bert-base ./bert-sst2 --shared --no-layers
      peft-lntune change ./bert-base ./my-adapter --plot change.png
    """
    with_layers(plot, layers)
    table = change_between(before, after, layers=layers, shared=shared)
    show(table, csv_file, plot, lambda drawn, path: plot_change(drawn, path, measure))
