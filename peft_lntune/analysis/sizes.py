"""How large the entries of each component are, which are outliers in their vector, and whether masks choose them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from peft_lntune.analysis.checkpoints import CheckpointSource, facts_of, open_tensors
from peft_lntune.analysis.pooling import moments, pieces, pool, ratio, rows_by_place
from peft_lntune.analysis.tables import Table
from peft_lntune.architectures.components import ParameterPlace, find_components
from peft_lntune.architectures.role_names import is_called_norm
from peft_lntune.core.choices import DEVIATIONS, SIZES
from peft_lntune.errors import ConfigError

__all__ = ["find_outliers", "magnitude", "outlier_overlap", "outliers"]


def magnitude(source: CheckpointSource, *, layers: bool = True) -> Table:
    """How large the entries of each component are, compared with the weights outside norms.

    Norms are said to transfer best because their weights are large; the comparison shows how large.

    Source: Akbar-Tajari, Rajaee, Pilehvar 2022 (arXiv 2302.00378).

    Values are measured as they are stored. A norm that multiplies by 1 + w, such as Gemma's, stores w, so its gains of
    1 count as 0.

    Args:
        source: a model, tensors by name, or the path of a checkpoint in safetensors, read one tensor at a time. Give
            all parameters: the role of a norm is read from the modules around it.
        layers: True: one row per component and layer; False: one row per component, its layers pooled.

    Returns:
        Columns `component`, `layer` (None outside the layers; only with `layers=True`), `parameter`, `entries`,
        `mean_magnitude` (mean of `|w|`), `std` (n - 1 in the denominator; None for one entry), `largest` (maximum of
        `|w|`), and `over_others`: the mean of `|w|`, divided by that of all weights outside norms, biases not
        counted; None where there are no such weights.

    Raises:
        ConfigError: the source is empty, or a value is NaN, infinite or quantized.
        AdapterFileError: a checkpoint is missing, damaged, truncated, or not in safetensors.

    Example:
        >>> norm, query = torch.tensor([1.0, 3.0]), torch.tensor([[0.5, -0.5]])
        >>> tensors = {"h.0.ln_1.weight": norm, "h.0.attn.c_attn.weight": query}
        >>> print(magnitude(tensors, layers=False))
        component          parameter  entries  mean_magnitude  std     largest  over_others
        attention norm     weight     2        2               1.414   3        4
        query, key, value  weight     2        0.5             0.7071  0.5      1
    """
    tensors = open_tensors(source)
    if not tensors:
        raise ConfigError("the source is empty: there are no tensors to measure.")
    places = find_components(tensors)
    found = {name: moments(pieces(name, tensors[name])) for name in tensors}
    weights = [name for name, place in places.items() if place.parameter == "weight"]
    others = [name for name in weights if not is_called_norm(name.rpartition(".")[0])]
    typical = pool(found[name] for name in others).mean_magnitude
    columns, groups = rows_by_place(places, layers=layers)
    rows = []
    for cells, names in groups.items():
        own = pool(found[name] for name in names)
        over = ratio(own.mean_magnitude, typical)
        rows.append((*cells, own.entries, own.mean_magnitude, own.std, own.largest, over))
    return Table((*columns, "entries", *SIZES), tuple(rows))


def find_outliers(
    source: CheckpointSource, parameters: Iterable[str] | None = None, *, deviations: float = DEVIATIONS
) -> dict[str, Tensor]:
    """Find the entries that lie far from the mean of their own vector, in standard deviations.

    Source: Kovaleva, Kulshreshtha, Rogers, Rumshisky 2021, BERT Busters (arXiv 2105.06990), who study such entries in
    the norms of BERT.

    Args:
        source: a model, tensors by name, or the path of a checkpoint.
        parameters: names of the tensors to search; None: every tensor of one dimension, that is, gains and biases. A
            tensor of more dimensions counts as one vector.
        deviations: distance from the mean above which an entry is an outlier, in standard deviations (n - 1 in the
            denominator).

    Returns:
        Bool masks by parameter, True for outliers.

    Raises:
        ConfigError: a name is unknown, no tensor has one dimension, or a value is NaN, infinite or quantized.
        AdapterFileError: a checkpoint is missing, damaged, truncated, or not in safetensors.

    Example:
        >>> find_outliers({"norm.weight": torch.tensor([1.0] * 19 + [9.0])})["norm.weight"].nonzero().tolist()
        [[19]]
    """
    if not deviations > 0:
        raise ConfigError(f"deviations={deviations!r} should be above 0: how far from the mean an outlier begins.")
    tensors = open_tensors(source)
    vectors = [name for name, facts in facts_of(tensors).items() if len(facts.shape) == 1]
    wanted = vectors if parameters is None else list(parameters)
    unknown = [name for name in wanted if name not in tensors]
    if unknown:
        raise ConfigError(f"parameter {unknown[0]!r} (and {len(unknown) - 1} more) not found among {len(tensors)}.")
    masks = {}
    for name in wanted:
        values = tensors[name]
        own = moments(pieces(name, values))
        masks[name] = (values.detach().cpu().double() - own.mean).abs() > deviations * (own.std or torch.inf)
    if not masks:
        raise ConfigError("no tensor has one dimension, so there is no vector to search. Name tensors in parameters=.")
    return masks


def outliers(
    source: CheckpointSource, parameters: Iterable[str] | None = None, *, deviations: float = DEVIATIONS
) -> Table:
    """List every entry that lies far from the mean of its own vector, with its position, value and distance.

    Args:
        source: a model, tensors by name, or the path of a checkpoint.
        parameters: names of the tensors to search; None: every tensor of one dimension.
        deviations: distance from the mean above which an entry is an outlier, in standard deviations.

    Returns:
        One row per outlier: `tensor`, `component`, `layer`, `parameter`, `position` (in the flattened tensor),
        `value`, and `deviations` from the mean, with sign. The table is empty where there are no outliers.

    Raises:
        ConfigError: a name is unknown, no tensor has one dimension, or a value is NaN, infinite or quantized.
        AdapterFileError: a checkpoint is missing, damaged, truncated, or not in safetensors.

    Example:
        >>> print(outliers({"h.0.norm.weight": torch.tensor([1.0] * 19 + [9.0])}))
        tensor           component  layer  parameter  position  value  deviations
        h.0.norm.weight  h.norm     0      weight     19        9      4.249
    """
    tensors = open_tensors(source)
    masks = find_outliers(tensors, parameters, deviations=deviations)
    places = find_components(tensors)
    rows = []
    for name, mask in masks.items():
        values = tensors[name]
        own = moments(pieces(name, values))
        flat = values.detach().cpu().double().reshape(-1)
        for position in mask.reshape(-1).nonzero().flatten().tolist():
            value = float(flat[position])
            rows.append((name, *places[name], position, value, ratio(value - own.mean, own.std)))
    return Table(("tensor", *ParameterPlace._fields, "position", "value", "deviations"), tuple(rows))


def outlier_overlap(found: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Table:
    """How many outliers masks choose, compared with random masks of the same density.

    Args:
        found: outliers by parameter, as `find_outliers` returns them.
        masks: bool masks by parameter, True where tuned, such as those of `select(fisher_scores(...))`. Outliers of
            parameters without a mask do not count.

    Returns:
        One row per component, layer and parameter, and a last row `"all"`, with the columns `entries`, `outliers`,
        `chosen`, `both` and `share` (the share of outliers that are chosen; None without outliers). Two more columns
        give the mean share for random masks: `by_chance` for masks that choose as many entries of this row,
        `by_chance_in_place` for masks that choose as many entries of each parameter. The second separates a preference
        for outliers from a preference for certain layers.

    Raises:
        ConfigError: the masks share no parameter with the outliers, have other shapes, or are not bool.

    Example:
        >>> outlying, chosen = torch.tensor([True, False, False, False]), torch.tensor([True, True, False, False])
        >>> print(outlier_overlap({"h.0.norm.bias": outlying}, {"h.0.norm.bias": chosen}))
        component  layer  parameter  entries  outliers  chosen  both  share  by_chance  by_chance_in_place
        h.norm     0      bias       4        1         2       1     1      0.5        0.5
        all        -      -          4        1         2       1     1      0.5        0.5
    """
    names = [name for name in masks if name in found]
    if not names:
        raise ConfigError(
            f"the masks share no parameter with the {len(found)} that were searched for outliers: they name "
            f"{next(iter(masks), 'nothing')!r}. Give masks of the same model, or its names to find_outliers."
        )
    for name in names:
        if masks[name].dtype != torch.bool or masks[name].shape != found[name].shape:
            raise ConfigError(
                f"the mask of {name} should be a bool tensor of shape {tuple(found[name].shape)}, but is "
                f"{masks[name].dtype} of shape {tuple(masks[name].shape)}. It was made for another model."
            )
    counts = {name: _counts(found[name].cpu(), masks[name].cpu()) for name in names}
    # The role of a norm is read from the modules around it, so all known names are passed on.
    places = find_components([*dict.fromkeys([*found, *masks])])
    columns, groups = rows_by_place({name: place for name, place in places.items() if name in counts})
    groups["all", None, None] = names
    rows = []
    for cells, own in groups.items():
        entries, outlying, chosen, both = (sum(values) for values in zip(*(counts[n] for n in own), strict=True))
        kept = sum(counts[n][1] * counts[n][2] / counts[n][0] for n in own if counts[n][0])
        row = (entries, outlying, chosen, both, ratio(both, outlying), ratio(chosen, entries), ratio(kept, outlying))
        rows.append((*cells, *row))
    numbers = ("entries", "outliers", "chosen", "both", "share", "by_chance", "by_chance_in_place")
    return Table((*columns, *numbers), tuple(rows))


def _counts(outlying: Tensor, chosen: Tensor) -> tuple[int, int, int, int]:
    return outlying.numel(), int(outlying.sum()), int(chosen.sum()), int((outlying & chosen).sum())
