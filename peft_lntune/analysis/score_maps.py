"""Where in the model scores are high, or which parts masks choose."""

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_lntune.analysis.pooling import rows_by_place
from peft_lntune.analysis.tables import Table
from peft_lntune.architectures.components import find_components
from peft_lntune.errors import ConfigError
from peft_lntune.norms.find import Norm

__all__ = ["score_map"]

# The column's name, by `how` and by whether masks are given.
_QUANTITIES = {
    ("mean", False): "mean_score",
    ("sum", False): "sum_of_scores",
    ("mean", True): "share_tuned",
    ("sum", True): "entries_tuned",
}


def score_map(scores: Mapping[str, Tensor], norms: Mapping[str, Norm] | None = None, *, how: str = "mean") -> Table:
    """Pool scores or masks over the entries of each component and layer, with weights and biases in separate rows.

    Args:
        scores: scores, or bool masks, by parameter.
        norms: `find_norms(model)`, which knows the roles of norms. None: roles are read from the names in `scores`;
            where only norms are named, that is not possible, and their components are module paths.
        how: `"mean"` (for masks: the share of tuned entries) or `"sum"` (for masks: the number of tuned entries).

    Returns:
        Columns `component`, `layer` (None outside the layers), `parameter`, `entries`, and one of `mean_score`,
        `sum_of_scores`, `share_tuned` or `entries_tuned`.

    Raises:
        ConfigError: `scores` is empty or mixes scores and masks, a score is NaN or infinite, or `how` is unknown.

    Example:
        >>> print(score_map({"h.0.norm.weight": torch.tensor([True, False]), "h.1.norm.weight": torch.ones(2).bool()}))
        component  layer  parameter  entries  share_tuned
        h.norm     0      weight     2        0.5
        h.norm     1      weight     2        1
    """
    if how not in ("mean", "sum"):
        raise ConfigError(f"how={how!r}: choose 'mean' or 'sum'.")
    kinds = {value.dtype == torch.bool for value in scores.values()}
    if len(kinds) != 1:
        masks = sum(value.dtype == torch.bool for value in scores.values())
        raise ConfigError(
            "scores should be all scores or all masks, and at least one, but are "
            f"{len(scores) - masks} score and {masks} mask tensors."
        )
    for name, value in scores.items():
        if not value.isfinite().all():
            raise ConfigError(f"the scores of {name} have NaN or infinite entries: look at the model and the loss.")
    places = find_components(scores, {name: norm.roles for name, norm in (norms or {}).items()})
    columns, groups = rows_by_place(places)
    rows = []
    for cells, names in groups.items():
        entries = sum(scores[name].numel() for name in names)
        total = sum(float(scores[name].detach().cpu().double().sum()) for name in names)
        rows.append((*cells, entries, total / max(1, entries) if how == "mean" else total))
    return Table((*columns, "entries", _QUANTITIES[how, kinds.pop()]), tuple(rows))
