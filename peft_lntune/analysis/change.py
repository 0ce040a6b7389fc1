"""How far training moved each component of a model, layer by layer."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from peft_lntune.analysis.checkpoints import check_same, facts_of
from peft_lntune.analysis.pooling import moments, pieces, pool, ratio, rows_by_place
from peft_lntune.analysis.tables import Table
from peft_lntune.architectures.components import find_components
from peft_lntune.core.choices import MEASURES
from peft_lntune.errors import ConfigError
from peft_lntune.selection.effective import effective_parameters

__all__ = ["MEASURES", "parameter_change"]

_RANKS = tuple(f"rank_{measure}" for measure in MEASURES)


def parameter_change(
    before: nn.Module | Mapping[str, Tensor], after: nn.Module | Mapping[str, Tensor], *, layers: bool = True
) -> Table:
    """How far each component moved in training, by three measures.

    - `mean_change`: mean of `|w1 - w0|`
    - `relative_to_mean`: mean of `|w1 - w0|`, divided by the mean of `|w0|`
    - `relative_to_std`: mean of `|w1 - w0|`, divided by the standard deviation of `w0` (n - 1 in the denominator)

    All three are given because the order of the components may depend on the measure. The weight of a norm is near 1
    and that of a linear layer near 0.05, so a step of the same relative size moves the norm twenty times as far. Raw
    means therefore favour norms, relative means favour small values, and the third measure favours values that are
    nearly equal. The ranks show where the orders differ.

    One row pools all parameters of one place: sums run over all their entries, in float64. Where a denominator is 0 (a
    bias that starts at zero, a weight with equal entries, a single entry), the measure and its rank are None.

    Values are measured as they are stored: of a norm that multiplies by 1 + w, such as Gemma's, w. Its gains then look
    small, and `relative_to_mean` large.

    Source: ValizadehAslani and Liang 2024 (arXiv 2403.20284) and BitFit, Ben Zaken et al. 2022 (arXiv 2106.10199), use
    `mean_change`.

    Args:
        before: a model, plain or with adapters, or its parameters by name. For a model with adapters, the active
            adapters are merged into the parameters that are compared.
        after: the model after training, or its parameters by name, with the names and shapes of `before`.
        layers: True: one row per component and layer; False: one row per component, its layers pooled.

    Returns:
        Columns `component`, `layer` (None outside the layers; only with `layers=True`), `parameter` ("weight" or
        "bias"), `entries`, the three measures, and for each measure the rank of the row in the table. Rank 1 moved
        most; equal values share the better rank.

    Raises:
        ConfigError: names or shapes differ, a value is NaN or infinite, or a tensor has no floating-point values.

    Example:
        >>> before = {"wte.weight": torch.tensor([0.1, -0.3]), "ln_f.weight": torch.tensor([1.0, 1.2])}
        >>> after = {"wte.weight": torch.tensor([0.2, -0.4]), "ln_f.weight": torch.tensor([1.2, 1.0])}
        >>> change = parameter_change(before, after, layers=False)
        >>> [round(value, 3) for value in change.column("mean_change")], change.column("rank_mean_change")
        ([0.1, 0.2], [2, 1])
        >>> change.column("rank_relative_to_mean")
        [1, 2]
    """
    old, new = (effective_parameters(given) if isinstance(given, nn.Module) else given for given in (before, after))
    _check(old, new)
    columns, groups = rows_by_place(find_components(old), layers=layers)
    measured = [_measure(names, old, new) for names in groups.values()]
    ranks = zip(*(_ranks(values) for values in zip(*(values for _, *values in measured), strict=True)), strict=True)
    rows = [(*cells, *values, *own) for cells, values, own in zip(groups, measured, ranks, strict=True)]
    return Table((*columns, "entries", *MEASURES, *_RANKS), tuple(rows))


def _check(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    check_same(facts_of(old), facts_of(new))
    for when, tensors in (("before", old), ("after", new)):
        for name, fact in facts_of(tensors).items():
            if not fact.floating or fact.meta:
                raise ConfigError(
                    f"{name} {when} should have floating-point values, but is {tensors[name].dtype} on "
                    f"{tensors[name].device}. Load the model unquantized and off meta."
                )


def _measure(
    names: Sequence[str], old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> tuple[int, float | None, float | None, float | None]:
    """Number of entries and the three measures, over all entries of these tensors together."""
    moved, parts = 0.0, []
    for name in names:
        before, after = old[name], new[name]
        parts.append(moments(pieces(name, before, " before")))
        both = zip(pieces(name, before), pieces(name, after, " after"), strict=True)
        moved += sum(float((two - one).abs().sum()) for one, two in both)
    found = pool(parts)
    change = ratio(moved, found.entries)
    return found.entries, change, ratio(change, found.mean_magnitude), ratio(change, found.std)


def _ranks(values: Sequence[float | None]) -> list[int | None]:
    """Rank per value, 1 for the largest; equal values share the better rank; None stays None."""
    known = [value for value in values if value is not None]
    return [None if value is None else 1 + sum(other > value for other in known) for value in values]
