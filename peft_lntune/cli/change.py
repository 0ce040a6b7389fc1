"""`peft-lntune change`: which components training moved."""

from pathlib import Path

import click

from peft_lntune.analysis import Table, match_tensors, parameter_change, plot_change
from peft_lntune.analysis.change import MEASURES
from peft_lntune.cli.models import load_adapted
from peft_lntune.cli.tables import csv_option, layers_option, plot_option, shared_option, show, with_layers

__all__ = ["change_between", "command"]


def change_between(before: str, after: str, *, layers: bool = True, shared: bool = False) -> Table:
    """Measure how far training moved each component, from two saved models or from a model and an adapter.

    Args:
        before: checkpoint of a model: a safetensors file, the index of a sharded checkpoint, or a folder.
        after: checkpoint of a model in the same forms, or the folder of an adapter for `before`. Heads saved with the
            adapter are only compared if `before` has them in the same shape.
        layers: one row per component and layer; False: one row per component.
        shared: compare only the tensors that both have in the same shape.

    Returns:
        The table of `peft_lntune.analysis.parameter_change`.

    Raises:
        ConfigError: names or shapes differ, and `shared` is False.
        AdapterFileError: a file is missing or damaged.
    """
    if Path(after, "adapter_config.json").is_file():
        # A head that is not in the folder starts at random, so its change means nothing.
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
    """Show how far training moved each component of a model, by three measures and their ranks.

    BEFORE is a saved model: a safetensors file, the index of a sharded checkpoint, or a folder. AFTER is another saved
    model, or the folder of an adapter for BEFORE.

    \b
    Examples:
      peft-lntune change ./bert-base ./bert-sst2 --shared --no-layers
      peft-lntune change ./bert-base ./my-adapter --plot change.png
    """
    with_layers(plot, layers)
    table = change_between(before, after, layers=layers, shared=shared)
    show(table, csv_file, plot, lambda drawn, path: plot_change(drawn, path, measure))
