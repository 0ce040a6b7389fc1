"""`peft-lntune magnitude`: how large the entries of norms are beside the rest, and which of them stand out."""

from pathlib import Path

import click
from torch import Tensor

from peft_lntune.analysis import (
    Table,
    find_outliers,
    magnitude,
    open_tensors,
    outlier_overlap,
    outliers,
    plot_magnitude,
)
from peft_lntune.analysis.checkpoints import CheckpointSource
from peft_lntune.analysis.pooling import rows_by_place
from peft_lntune.analysis.sizes import DEVIATIONS, SIZES
from peft_lntune.architectures.components import find_components
from peft_lntune.cli.models import load_adapted
from peft_lntune.cli.tables import csv_option, layers_option, plot_option, show, to_csv, with_layers
from peft_lntune.errors import ConfigError
from peft_lntune.tuner.state_dict import masks_of

__all__ = ["command", "magnitude_of", "overlap_with_adapter"]


def magnitude_of(source: CheckpointSource, *, layers: bool = True, deviations: float = DEVIATIONS) -> Table:
    """The table of `magnitude`, and in a last column how many entries of the gains and biases stand out.

    Args:
        source: a model, tensors by name, or the path of a checkpoint.
        layers: one row a component and layer; False: one row a component.
        deviations: how many standard deviations from the mean of its own vector an outlier begins.

    Returns:
        The columns of `magnitude`, and `outliers`; None where a row has no vector, since matrices are not looked at.

    Raises:
        ConfigError: as `magnitude` and `find_outliers`.
        AdapterFileError: a checkpoint is missing or damaged.

    Example:
        >>> import torch
        >>> gain, query = torch.tensor([1.0] * 19 + [9.0]), torch.full((2, 2), 0.5)
        >>> table = magnitude_of({"h.0.ln_1.weight": gain, "h.0.attn.c_attn.weight": query})
        >>> table.column("component"), table.column("outliers")
        (['attention norm', 'query, key, value'], [1, None])
    """
    tensors = open_tensors(source)
    table = magnitude(tensors, layers=layers)
    numbers = {name: int(mask.sum()) for name, mask in find_outliers(tensors, deviations=deviations).items()}
    _, groups = rows_by_place(find_components(tensors), layers=layers)
    found = [[numbers[name] for name in names if name in numbers] for names in groups.values()]
    rows = [(*row, sum(own) if own else None) for row, own in zip(table.rows, found, strict=True)]
    return Table((*table.columns, "outliers"), tuple(rows))


def overlap_with_adapter(model: str, adapter: str, *, deviations: float = DEVIATIONS) -> Table:
    """How many outliers of a model a saved adapter tunes, beside what random masks would; see `outlier_overlap`.

    Args:
        model: folder of the model that the adapter was trained on.
        adapter: directory of an adapter with a mask, such as one of a `FisherLNConfig`.
        deviations: how many standard deviations from the mean of its own vector an outlier begins.

    Returns:
        The table of `outlier_overlap`.

    Raises:
        ConfigError: the adapter has no mask, or `model` is no folder.
        AdapterFileError: the adapter is damaged, or one of another model.
    """
    if Path(model).is_file():
        raise ConfigError(
            f"{model} is a file, and the masks of an adapter are read with the model it was trained on. Give the "
            "folder of that model, with its config.json."
        )
    adapted = load_adapted(adapter, model)
    masks: dict[str, Tensor] = masks_of(adapted, "default")
    if all(mask.all() for mask in masks.values()):
        raise ConfigError(
            f"the adapter {adapter} has no mask: it tunes all entries that its config selects, or none. Give "
            " one that was made with FisherLNConfig and fit_fisher_masks, or with set_masks."
        )
    with adapted.disable_adapter():
        found = find_outliers(adapted, deviations=deviations)
    return outlier_overlap(found, masks)


@click.command("magnitude", short_help="How large the entries of norms are, and which stand out.")
@click.argument("model")
@layers_option
@click.option(
    "--deviations",
    type=click.FloatRange(0, min_open=True),
    default=DEVIATIONS,
    show_default=True,
    help="How many standard deviations from the mean of its own vector an outlier begins.",
)
@click.option(
    "--fisher-mask",
    "adapter",
    metavar="ADAPTER",
    help="Also how many outliers the mask of this saved adapter tunes, beside chance.",
)
@csv_option
@click.option(
    "--outliers",
    "outliers_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write every outlier there, with its position, value and distance, as CSV.",
)
@click.option(
    "--overlap",
    "overlap_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the table of --fisher-mask there, as CSV.",
)
@plot_option
@click.option("--measure", type=click.Choice(SIZES), default=SIZES[0], show_default=True, help="What --plot shows.")
def command(
    model: str,
    layers: bool,
    deviations: float,
    adapter: str | None,
    csv_file: Path | None,
    outliers_file: Path | None,
    overlap_file: Path | None,
    plot: Path | None,
    measure: str,
) -> None:
    """How large the entries of each component of MODEL are, and which gains and biases stand out.

    MODEL is local: a safetensors file, the index of a sharded checkpoint, or the folder of a model. It is read one
    tensor at a time. The column over_others compares the mean magnitude with that of all weights outside the norms:
    2 is twice as large. Outliers lie more than 3 standard deviations from the mean of their own gain or bias;
    matrices are not searched.

    With --fisher-mask, a second table says which share of the outliers the adapter tunes, and what random masks as
    large would tune by chance: by_chance where they lie anywhere, by_chance_in_place where every parameter keeps its
    number of tuned entries. MODEL is then the folder of the model that the adapter was trained on.

    \b
    Examples:
      peft-lntune magnitude ./bert-base --no-layers
      peft-lntune magnitude ./bert-base --plot magnitude.png --measure over_others
      peft-lntune magnitude ./bert-base --fisher-mask ./my-fisher-adapter --outliers outliers.csv
    """
    with_layers(plot, layers)
    if overlap_file is not None and adapter is None:
        raise click.UsageError("--overlap writes the table of --fisher-mask; give that too.")
    # All is looked at before anything is written.
    table = magnitude_of(model, layers=layers, deviations=deviations)
    overlap = None if adapter is None else overlap_with_adapter(model, adapter, deviations=deviations)
    if outliers_file is not None:
        to_csv(outliers(model, deviations=deviations), outliers_file)
    show(table, csv_file, plot, lambda drawn, path: plot_magnitude(drawn, path, measure))
    number = sum(found or 0 for found in table.column("outliers"))
    far = f"{deviations:g} standard deviations from the mean of their own vector"
    click.echo(f"\n{number:,} entries of gains and biases lie more than {far}.")
    if overlap is not None:
        click.echo()
        show(overlap, overlap_file)
