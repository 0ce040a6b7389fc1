"""`peft-lntune closeness`: how far two checkpoints of any size are from each other."""

from pathlib import Path

import click

from peft_lntune.analysis import closeness, plot_closeness
from peft_lntune.analysis.distances import BY, DISTANCES
from peft_lntune.cli.tables import csv_option, layers_option, plot_option, shared_option, show

__all__ = ["command"]


@click.command("closeness", short_help="How close two checkpoints of any size are, beside chance.")
@click.argument("before")
@click.argument("after")
@click.option(
    "--by", type=click.Choice(BY), default="component", show_default=True, help="What a row of the table pools."
)
@layers_option
@shared_option
@click.option("--controls/--no-controls", default=True, help="Also two random starts, and noise as long as the step.")
@click.option("--init-std", default=0.02, show_default=True, help="Standard deviation of random starts.")
@click.option("--seed", default=0, show_default=True, help="Of the controls.")
@csv_option
@plot_option
@click.option("--measure", type=click.Choice(DISTANCES), default="angle", show_default=True, help="What --plot shows.")
def command(
    before: str,
    after: str,
    by: str,
    layers: bool,
    shared: bool,
    controls: bool,
    init_std: float,
    seed: int,
    csv_file: Path | None,
    plot: Path | None,
    measure: str,
) -> None:
    """How close the models BEFORE and AFTER are: mean L1, relative L1 and angle, beside controls.

    Both are local: a safetensors file, the index of a sharded checkpoint, or the folder of a model. They are read one
    tensor at a time, so two checkpoints of any size need the memory of their largest tensor.

    \b
    Examples:
      peft-lntune closeness ./bert-base ./bert-sst2 --shared --plot closeness.png
      peft-lntune closeness a.safetensors b.safetensors --by tensor --csv closeness.csv
    """
    if not layers and by != "component":
        raise click.UsageError(f"--no-layers pools the layers of components; it has no meaning with --by {by}.")
    if plot is not None and by != "component":
        raise click.UsageError(f"--plot shows components; it has no meaning with --by {by}.")
    table = closeness(
        before, after, layers=layers, by=by, shared=shared, controls=controls, init_std=init_std, seed=seed
    )
    show(table, csv_file, plot, lambda drawn, path: plot_closeness(drawn, path, measure))
