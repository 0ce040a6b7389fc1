"""`peft-lntune magnitude`: how large the entries of norms are compared with the rest, and which are outliers."""

from pathlib import Path
from typing import Any

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import OutFile, csv_option, json_option, layers_option, plot_option, refuse_without
from peft_lntune.core.choices import DEVIATIONS, SIZES

__all__ = ["command"]


def _check(layers: bool, adapter: str | None, plot: Path | None, **_: Any) -> None:
    if plot is None:
        refuse_without("--plot", "measure")
    elif not layers:
        raise click.UsageError("--plot shows components by layers; leave --no-layers out.")
    if adapter is None:
        refuse_without("--fisher-mask", "overlap_file")


@make("magnitude", "How large the entries of norms are, and which are outliers.", _check)
@click.argument("model")
@layers_option
@click.option(
    "--deviations",
    type=click.FloatRange(0, min_open=True),
    default=DEVIATIONS,
    show_default=True,
    help="Outliers are this many standard deviations from the mean of their own vector.",
)
@click.option(
    "--fisher-mask",
    "adapter",
    metavar="ADAPTER",
    help="Also show how many outliers the mask of this saved adapter tunes, compared with chance.",
)
@json_option
@csv_option
@click.option(
    "--outliers",
    "outliers_file",
    type=OutFile(),
    help="Write every outlier to this CSV file, with its position, value and distance.",
)
@click.option("--overlap", "overlap_file", type=OutFile(), help="Write the table of --fisher-mask to this CSV file.")
@plot_option
@click.option("--measure", type=click.Choice(SIZES), default=SIZES[0], show_default=True, help="What --plot shows.")
def command(
    model: str,
    layers: bool,
    deviations: float,
    adapter: str | None,
    as_json: bool,
    csv_file: Path | None,
    outliers_file: Path | None,
    overlap_file: Path | None,
    plot: Path | None,
    measure: str,
) -> None:
    """Show how large the entries of each component of MODEL are, and which entries of gains and biases are outliers.

    MODEL is local: a safetensors file, the index of a sharded checkpoint, or the folder of a model. It is read one
    tensor at a time. The column over_others compares the mean magnitude with that of all weights outside the norms:
    2 is twice as large. By default, outliers lie more than 3 standard deviations from the mean of their own gain or
    bias. Matrices are not searched. Values are measured as stored: norms that multiply by 1 + w, such as Gemma's, by
    their w.

    With --fisher-mask, a second table shows the share of outliers that the adapter tunes, and the share that random
    masks of the same size would tune: by_chance if entries are drawn anywhere, by_chance_in_place if every parameter
    keeps its number of tuned entries. MODEL is then the folder of the model that the adapter was trained on.

    \b
    Examples:
      peft-lntune magnitude ./bert-base --no-layers
      peft-lntune magnitude ./bert-base --plot magnitude.png --measure over_others
      peft-lntune magnitude ./bert-base --fisher-mask ./adapter --outliers o.csv
    """
    from peft_lntune.analysis import outliers, plot_magnitude
    from peft_lntune.cli.magnitude import magnitude_of, overlap_with_adapter
    from peft_lntune.cli.printing import print_result, to_csv, write_files

    # Compute everything before writing anything.
    table = magnitude_of(model, layers=layers, deviations=deviations)
    overlap = None if adapter is None else overlap_with_adapter(model, adapter, deviations=deviations)
    if outliers_file is not None:
        to_csv(outliers(model, deviations=deviations), outliers_file)
    if overlap is not None and overlap_file is not None:
        to_csv(overlap, overlap_file)
    write_files(table, csv_file, plot, lambda drawn, path: plot_magnitude(drawn, path, measure))
    number = sum(found or 0 for found in table.column("outliers"))
    far = f"{deviations:g} standard deviations from the mean of their own vector"
    below = f"{number:,} entries of gains and biases lie more than {far}."
    data = {"table": table, "outliers": number, "overlap": overlap}
    print_result(as_json, data, table, below, *([] if overlap is None else [overlap]))
