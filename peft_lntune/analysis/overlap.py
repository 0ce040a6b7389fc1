"""How much the masks of several tasks overlap, compared with random masks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_lntune.analysis.tables import Table
from peft_lntune.errors import ConfigError
from peft_lntune.selection.masks import check_bool, mask_overlap

__all__ = ["expected_overlap", "overlap_matrix"]


def overlap_matrix(masks_by_task: Mapping[str, Mapping[str, Tensor]]) -> Table:
    """The Jaccard index of the masks of each pair of tasks: entries in both, divided by entries in either.

    Large masks overlap by chance, so each index has a control: the mean index of two random masks with the same numbers
    of entries. The random masks spread over all parameters, so masks that merely prefer the same layers overlap more
    than the control.

    Args:
        masks_by_task: for each task its bool masks by parameter; all tasks have the same parameters.

    Returns:
        One row per task: columns `task`, `density`, one column per task with the index, and one column
        `<task>, by chance` per task with the control (None for a task with itself).

    Raises:
        ConfigError: no tasks are given, a mask is not bool, or tasks have different parameters.

    Example:
        >>> one, two = {"w": torch.tensor([True, True, False, False])}, {"w": torch.tensor([True, False, True, False])}
        >>> print(overlap_matrix({"sst2": one, "trec": two}))
        task  density  sst2    trec    sst2, by chance  trec, by chance
        sst2  0.5      1       0.3333  -                0.3889
        trec  0.5      0.3333  1       0.3889           -
    """
    if not masks_by_task:
        raise ConfigError("there are no masks to compare: masks_by_task is empty.")
    for task, masks in masks_by_task.items():
        check_bool(masks, f"task {task!r}")
    tuned = {task: sum(int(mask.sum()) for mask in masks.values()) for task, masks in masks_by_task.items()}
    entries = sum(mask.numel() for mask in next(iter(masks_by_task.values())).values())
    rows = []
    for task, masks in masks_by_task.items():
        overlaps = [mask_overlap(masks, other) for other in masks_by_task.values()]
        chance = [None if other == task else expected_overlap(tuned[task], tuned[other], entries) for other in tuned]
        rows.append((task, tuned[task] / max(1, entries), *overlaps, *chance))
    return Table(("task", "density", *tuned, *(f"{task}, by chance" for task in tuned)), tuple(rows))


def expected_overlap(a: int, b: int, entries: int) -> float:
    """The mean Jaccard index of two independent random masks with `a` and `b` of `entries` entries.

        sum over k of  C(a, k) C(n - a, b - k) / C(n, b)  *  k / (a + b - k)

    The number k of shared entries has a hypergeometric distribution. Two empty masks count as equal.

    Args:
        a: number of entries that the first mask chooses.
        b: number of entries that the second mask chooses.
        entries: number of all entries, n.

    Returns:
        The mean index, from 0 to 1.

    Example:
        >>> round(expected_overlap(2, 2, 4), 4)  # k = 0, 1, 2 with chances 1/6, 4/6, 1/6
        0.3889
    """
    if a + b == 0:
        return 1.0
    # Beyond 50 standard deviations from the mean the terms are below the rounding of float64.
    mean = a * b / max(1, entries)
    reach = 50 * mean**0.5 + 50
    low, high = max(0, a + b - entries, int(mean - reach)), min(a, b, int(mean + reach))
    k = torch.arange(low, high + 1, dtype=torch.float64)
    logs = _log_binomial(a, k) + _log_binomial(entries - a, b - k)
    weights = (logs - logs.max()).exp()
    return float((weights * k / (a + b - k)).sum() / weights.sum())


def _log_binomial(n: int, k: Tensor) -> Tensor:
    return torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
