"""How far training moved each component of a model, layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft_lntune.analysis.checkpoints import one_sided
from peft_lntune.analysis.tables import Table
from peft_lntune.architectures.components import ParameterPlace, find_components, group_by_place
from peft_lntune.errors import ConfigError
from peft_lntune.selection.effective import effective_parameters

__all__ = ["MEASURES", "parameter_change", "rank_flips"]

MEASURES = ("mean_change", "relative_to_mean", "relative_to_std")
_RANKS = tuple(f"rank_{measure}" for measure in MEASURES)
_CHUNK = 2**24  # entries held in float64 at a time
Tensors = Mapping[str, Tensor]


def parameter_change(before: nn.Module | Tensors, after: nn.Module | Tensors, *, layers: bool = True) -> Table:
    """How far each component moved, by three measures.

        mean_change       mean |w1 - w0|                    (ValizadehAslani and Liang 2024, arXiv 2403.20284; BitFit)
        relative_to_mean  mean |w1 - w0| / mean |w0|
        relative_to_std   mean |w1 - w0| / std(w0)          (n - 1 in the denominator)

    All three are given because the order may hang on the measure. The weight of a norm sits near 1 and that of a linear
    layer near 0.05, so a step of the same relative size moves the norm's twenty times as far: raw means favour norms.
    Relative means favour what is small, and std(w0) what is all alike. `rank_flips` shows where the orders differ.

    A row pools all parameters of one place: the sums run over all their entries, in float64. Where a denominator is 0
    (a bias that starts at zero, a weight whose entries are equal, a single entry), the measure and its rank are None.

    Args:
        before: a model, plain or with adapters, or its parameters by name. Of a model with adapters the parameters it
            computes with are taken, active adapters merged in.
        after: likewise, with the same names and shapes.
        layers: one row a component and layer; False: one row a component, its layers pooled.

    Returns:
        Columns `component`, `layer` (None outside the layers; only with `layers=True`), `parameter` ("weight" or
        "bias"), `entries`, the three measures, and of each measure the rank of the row among all rows of the table: 1
        moved most, equal values share the better rank.

    Raises:
        ConfigError: names or shapes differ, or a value is NaN or infinite, or a tensor has no floating-point values.

    Example:
        >>> before = {"wte.weight": torch.tensor([0.1, -0.3]), "ln_f.weight": torch.tensor([1.0, 1.2])}
        >>> after = {"wte.weight": torch.tensor([0.2, -0.4]), "ln_f.weight": torch.tensor([1.2, 1.0])}
        >>> change = parameter_change(before, after, layers=False)
        >>> [round(value, 3) for value in change.column("mean_change")], change.column("rank_mean_change")
        ([0.1, 0.2], [2, 1])
        >>> change.column("rank_relative_to_mean")
        [1, 2]
    """
    old, new = _tensors(before), _tensors(after)
    _check_alike(old, new)
    groups = group_by_place(find_components(old), layers=layers)
    measured = [_measure([(name, old[name], new[name]) for name in names]) for names in groups.values()]
    ranks = zip(*(_ranks(values) for values in zip(*(values for _, values in measured), strict=True)), strict=True)
    rows = [
        (*_place_cells(place, layers), entries, *values, *row_ranks)
        for place, (entries, values), row_ranks in zip(groups, measured, ranks, strict=True)
    ]
    place_columns = ("component", "layer", "parameter") if layers else ("component", "parameter")
    return Table((*place_columns, "entries", *MEASURES, *_RANKS), tuple(rows))


def rank_flips(change: Table) -> Table:
    """The rows of a `parameter_change` table whose rank is not the same under all three measures.

    Rows for which a measure is None are left out and the others ranked anew, so what is left differs in order. An empty
    table says that every measure orders the rows alike.

    Example:
        >>> columns = ("component", "parameter", "entries", *MEASURES, *(f"rank_{name}" for name in MEASURES))
        >>> norm = ("final norm", "weight", 2, 0.2, 0.2, 1.4, 1, 2, 1)
        >>> print(rank_flips(Table(columns, (norm, ("word embeddings", "weight", 2, 0.1, 0.5, 0.4, 2, 1, 2)))))
        component        parameter  rank_mean_change  rank_relative_to_mean  rank_relative_to_std
        final norm       weight     1                 2                      1
        word embeddings  weight     2                 1                      2
    """
    measures = list(zip(*(change.column(name) for name in MEASURES), strict=True))
    kept = [number for number, values in enumerate(measures) if None not in values]
    ranks = [_ranks([measures[number][which] for number in kept]) for which in range(len(MEASURES))]
    places = list(change.columns).index("entries")
    rows = [
        (*change.rows[number][:places], *row_ranks)
        for number, row_ranks in zip(kept, zip(*ranks, strict=True), strict=True)
        if len(set(row_ranks)) > 1
    ]
    return Table((*change.columns[:places], *_RANKS), tuple(rows)).sorted_by(_RANKS[0])


def _place_cells(place: ParameterPlace, layers: bool) -> tuple[Any, ...]:
    return tuple(place) if layers else (place.component, place.parameter)


def _tensors(given: nn.Module | Tensors) -> Tensors:
    return effective_parameters(given) if isinstance(given, nn.Module) else given


def _check_alike(old: Tensors, new: Tensors) -> None:
    if not old:
        raise ConfigError("there is no parameter to compare: before is empty.")
    if said := one_sided(old, new):
        raise ConfigError(
            f"before and after should have the same parameters, but {said}. "
            "Pass named tensors without them to compare the rest."
        )
    for name, value in old.items():
        if value.shape != new[name].shape:
            raise ConfigError(
                f"{name} is {tuple(value.shape)} before and {tuple(new[name].shape)} after. A head of another size "
                "cannot be compared: pass named tensors without it."
            )
        for when, tensor in (("before", value), ("after", new[name])):
            if not tensor.is_floating_point() or tensor.is_meta:
                raise ConfigError(
                    f"{name} {when} should have floating-point values, but is {tensor.dtype} on {tensor.device}. "
                    "Load the model unquantized and off meta."
                )


def _measure(named: Sequence[tuple[str, Tensor, Tensor]]) -> tuple[int, tuple[float | None, ...]]:
    """Entries, and the three measures over all entries of `(name, before, after)` together."""
    entries = sum(old.numel() for _, old, _ in named)
    moved = size = offset = squares = 0.0
    # Entries are taken relative to one of them: equal ones then have a variance of exactly 0.
    origin = next((float(old.reshape(-1)[0]) for _, old, _ in named if old.numel()), 0.0)
    for name, old, new in _chunks(named):
        if not (old.isfinite().all() and new.isfinite().all()):
            when = "before" if not old.isfinite().all() else "after"
            raise ConfigError(f"{name} has NaN or infinite entries {when}. Take a checkpoint from before it diverged.")
        moved += float((new - old).abs().sum())
        size += float(old.abs().sum())
        offset += float((old - origin).sum())
    mean = offset / max(1, entries)
    for _, old, _ in _chunks(named):
        squares += float(((old - origin) - mean).square().sum())
    change = _ratio(moved, entries)
    std = (squares / (entries - 1)) ** 0.5 if entries > 1 else 0.0
    return entries, (change, _ratio(change, size / max(1, entries)), _ratio(change, std))


def _chunks(named: Sequence[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, old, new in named:
        for one, two in zip(old.reshape(-1).split(_CHUNK), new.reshape(-1).split(_CHUNK), strict=True):
            yield name, one.detach().cpu().double(), two.detach().cpu().double()


def _ratio(value: float | None, by: float) -> float | None:
    return None if value is None or by == 0 else value / by


def _ranks(values: Sequence[float | None]) -> list[int | None]:
    """1 for the largest; equal values share the better rank; None stays None."""
    known = [value for value in values if value is not None]
    return [None if value is None else 1 + sum(other > value for other in known) for value in values]
