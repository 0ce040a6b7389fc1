"""How large the entries of norms are compared with the rest, and which are outliers."""

from pathlib import Path

from torch import Tensor

from peft_lntune.analysis import (
    Table,
    find_outliers,
    magnitude,
    open_tensors,
    outlier_overlap,
)
from peft_lntune.analysis.checkpoints import CheckpointSource
from peft_lntune.analysis.pooling import rows_by_place
from peft_lntune.analysis.sizes import DEVIATIONS
from peft_lntune.architectures.components import find_components
from peft_lntune.cli.models import load_adapted
from peft_lntune.errors import ConfigError
from peft_lntune.tuner.state_dict import masks_of

__all__ = ["magnitude_of", "overlap_with_adapter"]


def magnitude_of(source: CheckpointSource, *, layers: bool = True, deviations: float = DEVIATIONS) -> Table:
    """Measure the magnitude of each component, and count the outliers among gains and biases.

    Args:
        source: a model, tensors by name, or the path of a checkpoint.
        layers: one row per component and layer; False: one row per component.
        deviations: outliers are entries more than this many standard deviations from the mean of their own vector.

    Returns:
        The columns of `peft_lntune.analysis.magnitude`, and `outliers`, which is None for rows without a gain or bias,
        because matrices are not searched.

    Raises:
        ConfigError: the source has no weights to compare, or a setting is not allowed.
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
    """Count how many outliers of a model a saved adapter tunes, compared with random masks.

    Args:
        model: folder of the model that the adapter was trained on.
        adapter: folder of an adapter with a mask, such as one with a `FisherLNConfig`.
        deviations: outliers are entries more than this many standard deviations from the mean of their own vector.

    Returns:
        The table of `peft_lntune.analysis.outlier_overlap`.

    Raises:
        ConfigError: the adapter has no mask, or `model` is a file.
        AdapterFileError: the adapter is damaged, or from another model.
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
            f"the adapter {adapter} has no mask: it tunes all entries that its config selects, or none. Give an "
            "adapter with a mask from fit_fisher_masks or set_masks."
        )
    with adapted.disable_adapter():
        found = find_outliers(adapted, deviations=deviations)
    return outlier_overlap(found, masks)
