"""Which entries supermasks switch off: how many per tensor, how many changed since the start, and their overlap."""

from collections.abc import Mapping

from torch import Tensor

from peft_lntune.analysis.overlap import overlap_matrix
from peft_lntune.analysis.pooling import rows_by_place
from peft_lntune.analysis.tables import Table
from peft_lntune.architectures.components import find_components
from peft_lntune.errors import ConfigError
from peft_lntune.norms.find import Norm
from peft_lntune.selection.masks import check_alike, check_bool

__all__ = ["FLIPS", "off_overlap", "sparsity"]

FLIPS = ("sparsity_before", "turned_off", "turned_on", "flipped")
"""The columns of `sparsity` that need the masks at the start."""


def sparsity(
    keep: Mapping[str, Tensor],
    start: Mapping[str, Tensor] | None = None,
    norms: Mapping[str, Norm] | None = None,
    *,
    by: str = "tensor",
) -> Table:
    """The share of entries that masks switch off, and how many changed their state since the start.

    Args:
        keep: bool masks by parameter, True where the entry stays; `peft_lntune.tuner.supermasks.keep_masks(model)`.
        start: the masks at the start of training; `peft_lntune.tuner.supermasks.start_masks(model)`.
        norms: `find_norms(model)`, which tells the layer stacks of a model with several of them apart.
        by: what one row pools: `"tensor"` (nothing) or `"component"` (the tensors of a component, per layer).

    Returns:
        The column `tensor`, or `component`, `layer` and `parameter`; then `entries`, `off` and their ratio `sparsity`.
        With `start` also `sparsity_before`, the numbers of entries `turned_off` and `turned_on`, and both together as
        the share `flipped`. Where a component shares its matrix with others, the whole matrix counts.

    Raises:
        ConfigError: no masks are given, a mask is not bool, `start` has other parameters, or `by` is unknown.

    Example:
        >>> keep = {"w": torch.tensor([True, False, False, True])}
        >>> print(sparsity(keep, start={"w": torch.tensor([True, True, False, False])}))
        tensor  entries  off  sparsity  sparsity_before  turned_off  turned_on  flipped
        w       4        2    0.5       0.5              1           1          0.5
    """
    if by not in ("tensor", "component"):
        raise ConfigError(f"by={by!r}: choose 'tensor' or 'component'.")
    if not keep:
        raise ConfigError("no masks: keep is empty.")
    check_bool(keep, "keep")
    if start is not None:
        check_bool(start, "start")
        check_alike(keep, start)
    places = find_components(keep, {name: norm.roles for name, norm in (norms or {}).items()})
    columns, groups = rows_by_place(places)
    if by == "tensor":
        columns, groups = ("tensor",), {(name,): [name] for name in keep}
    rows = [(*label, *_row(names, keep, start)) for label, names in groups.items()]
    return Table((*columns, "entries", "off", "sparsity", *(FLIPS if start is not None else ())), tuple(rows))


def off_overlap(keeps: Mapping[str, Mapping[str, Tensor]]) -> Table:
    """The overlap of what each pair of tasks switches off: entries off in both, divided by entries off in either.

    There are two controls: random masks with the same number of entries off in total, and random masks with the same
    number off in each tensor. The second accounts for tasks that spare the same tensors. Masks that start from the same
    `initial_sparsity` also share that start; to leave it out, compare what turned off since,
    `{name: keep[name] | ~start[name]}`.

    Args:
        keeps: for each task its masks, as `keep_masks` returns them; all tasks have the same parameters.

    Returns:
        One row per task: `task`, `sparsity`, one column per task with the overlap, one column `<task>, by chance` per
        task, and one column `<task>, by chance a tensor` per task (None for a task with itself). The last is the ratio
        of the two means, which for large tensors is the mean of the ratio.

    Raises:
        ConfigError: no tasks are given, a mask is not bool, or tasks have different parameters.

    Example:
        >>> one, two = {"w": torch.tensor([False, False, True, True])}, {"w": torch.tensor([False, True, False, True])}
        >>> table = off_overlap({"sst2": one, "trec": two})
        >>> table.column("sst2"), table.column("sst2, by chance a tensor")
        ([1.0, 0.3333333333333333], [None, 0.3333333333333333])
    """
    for task, keep in keeps.items():
        check_bool(keep, f"task {task!r}")
    table = overlap_matrix({task: {name: ~mask for name, mask in keep.items()} for task, keep in keeps.items()})
    off = {task: {name: int((~mask).sum()) for name, mask in keep.items()} for task, keep in keeps.items()}
    sizes = {name: mask.numel() for keep in keeps.values() for name, mask in keep.items()}
    chance = [[None if one == other else _by_tensor(off[one], off[other], sizes) for other in off] for one in off]
    return Table(
        ("task", "sparsity", *table.columns[2:], *(f"{task}, by chance a tensor" for task in off)),
        tuple((*row, *more) for row, more in zip(table.rows, chance, strict=True)),
    )


def _by_tensor(one: Mapping[str, int], other: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """For two random masks with these counts per tensor: the mean of entries in both, divided by that in either."""
    both = sum(one[name] * other[name] / max(1, size) for name, size in sizes.items())
    either = sum(one.values()) + sum(other.values()) - both
    return both / either if either else 1.0


def _row(names: list[str], keep: Mapping[str, Tensor], start: Mapping[str, Tensor] | None) -> tuple[int | float, ...]:
    entries = sum(keep[name].numel() for name in names)
    off = sum(int((~keep[name]).sum()) for name in names)
    row: tuple[int | float, ...] = (entries, off, off / max(1, entries))
    if start is None:
        return row
    pairs = [(keep[name], start[name].to(keep[name].device)) for name in names]
    turned_off = sum(int((old & ~new).sum()) for new, old in pairs)
    turned_on = sum(int((new & ~old).sum()) for new, old in pairs)
    before = off - turned_off + turned_on
    return (*row, before / max(1, entries), turned_off, turned_on, (turned_off + turned_on) / max(1, entries))
