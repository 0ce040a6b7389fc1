"""`peft-lntune closeness`: how close two checkpoints of any size are to each other."""

from pathlib import Path
from typing import Any

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import csv_option, json_option, layers_option, plot_option, refuse_without, shared_option
from peft_lntune.core.choices import BY, DISTANCES

__all__ = ["command"]


def _check(layers: bool, by: str, controls: bool, plot: Path | None, **_: Any) -> None:
    if not layers and by != "component":
        raise click.UsageError(f"--no-layers pools the layers of components; it has no meaning with --by {by}.")
    if plot is not None and by != "component":
        raise click.UsageError(f"--plot shows components; it has no meaning with --by {by}.")
    if plot is None:
        refuse_without("--plot", "measure")
    if not controls:
        refuse_without("--controls", "init_std", "seed")


@make("closeness", "How close two checkpoints of any size are, compared with chance.", _check)
@click.argument("before")
@click.argument("after")
@click.option(
    "--by", type=click.Choice(BY), default="component", show_default=True, help="What each row of the table pools."
)
@layers_option
@shared_option
@click.option(
    "--controls/--no-controls", default=True, help="Also compare two random starts, and noise as long as the step."
)
@click.option(
    "--init-std",
    type=click.FloatRange(0, min_open=True),
    default=0.02,
    show_default=True,
    help="Standard deviation of the random starts.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the controls.")
@json_option
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
    as_json: bool,
    csv_file: Path | None,
    plot: Path | None,
    measure: str,
) -> None:
    """Show how close the models BEFORE and AFTER are: mean L1, relative L1 and angle, compared with controls.

    Both are local: a safetensors file, the index of a sharded checkpoint, or the folder of a model. They are read one
    tensor at a time, so checkpoints of any size need only the memory of their largest tensor.

    \b
    Examples:
      peft-lntune closeness ./bert-base ./bert-sst2 --shared --plot closeness.png
      peft-lntune closeness a.safetensors b.safetensors --by tensor --json
    """
    import sys

    from peft_lntune.analysis import closeness, plot_closeness
    from peft_lntune.cli.printing import print_result, write_files

    table = closeness(
        before,
        after,
        layers=layers,
        by=by,
        shared=shared,
        controls=controls,
        init_std=init_std,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    write_files(table, csv_file, plot, lambda drawn, path: plot_closeness(drawn, path, measure))
    print_result(as_json, {"table": table}, table)
