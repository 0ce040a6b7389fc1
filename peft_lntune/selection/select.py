"""From scores to masks: the best entries within a budget."""

import math
import re
from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor

from peft_lntune.choices import SCOPES
from peft_lntune.errors import ConfigError

__all__ = ["SCOPES", "group_of", "select"]


def select(
    scores: Mapping[str, Tensor],
    *,
    density: float | None = None,
    count: int | None = None,
    threshold: float | None = None,
    scope: str = "global",
    largest: bool = True,
) -> dict[str, Tensor]:
    """Choose the entries with the largest (or smallest) scores.

    For n entries, a density chooses `floor(density * n + 1/2)` of them, at least one. Equal scores are chosen in the
    order of the parameters' names, then of their entries, so the result does not depend on the machine.

    Args:
        scores: scores by parameter, of any shapes.
        density: fraction of the entries to choose, above 0 and at most 1.
        count: number of entries to choose. Give exactly one of `density`, `count` and `threshold`.
        threshold: choose every entry with a score of at least this, or at most this where `largest` is False.
        scope: the group to which density and count apply: all entries (`"global"`), each parameter (`"tensor"`), or
            each layer (`"layer"`: the first number in the name; outside numbered layers, each module is a group).
        largest: False: choose the smallest scores, for controls.

    Returns:
        For each parameter a bool mask of its shape, True where chosen.

    Raises:
        ConfigError: not exactly one budget is given, it is out of range, the scope is unknown, or a score is NaN.

    Example:
        >>> select({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([3.0, 2.0])}, count=2)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    _check(scores, density, count, threshold, scope)
    if threshold is not None:
        return {name: score >= threshold if largest else score <= threshold for name, score in scores.items()}
    groups: dict[str, list[str]] = {}
    for name in sorted(scores):
        groups.setdefault(group_of(name, scope), []).append(name)
    sizes = {group: sum(scores[name].numel() for name in names) for group, names in groups.items()}
    if count is not None and count > min(sizes.values()):
        group = min(sizes, key=lambda key: sizes[key])
        raise ConfigError(f"count={count} is more than the {sizes[group]} entries of {group or 'all parameters'}.")
    chosen: dict[str, Tensor] = {}
    for group, names in groups.items():
        number = count if count is not None else max(1, math.floor((density or 0) * sizes[group] + 0.5))
        chosen |= _best({name: scores[name] for name in names}, number, largest)
    return {name: chosen[name] for name in scores}


def group_of(name: str, scope: str) -> str:
    """The group of parameters that share a budget under a scope.

    Args:
        name: name of a parameter.
        scope: `"global"`, `"tensor"` or `"layer"`.

    Returns:
        A key of the parameter's group: empty, the parameter's name, or the path up to the layer's number.

    Example:
        >>> [group_of("encoder.layer.3.output.LayerNorm.bias", scope) for scope in SCOPES]
        ['', 'encoder.layer.3.output.LayerNorm.bias', 'encoder.layer.3']
    """
    if scope == "tensor":
        return name
    if scope == "global":
        return ""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return found[0] if found else name.rpartition(".")[0]


def _best(scores: Mapping[str, Tensor], number: int, largest: bool) -> dict[str, Tensor]:
    device = next(iter(scores.values())).device
    flat = torch.cat([score.detach().reshape(-1).to(device) for score in scores.values()])
    order = flat.argsort(descending=largest, stable=True)  # topk has no fixed order for equal scores
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order[:number]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def _check(
    scores: Mapping[str, Tensor], density: float | None, count: int | None, threshold: float | None, scope: str
) -> None:
    given = {"density": density, "count": count, "threshold": threshold}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give one of density, count and threshold; got {', '.join(given) or 'none of them'}.")
    if scope not in SCOPES:
        raise ConfigError(f"scope={scope!r}: choose one of {', '.join(map(repr, SCOPES))}.")
    if not scores:
        raise ConfigError("there are no scores to choose from.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density={density} should be above 0 and at most 1: it is the fraction of entries to tune.")
    if count is not None and (isinstance(count, bool) or not isinstance(count, Integral) or count < 1):
        raise ConfigError(f"count={count!r} should be a whole number of entries, at least 1.")
    if threshold is not None and scope != "global":
        raise ConfigError(
            f"threshold={threshold} looks at each entry alone, so scope={scope!r} has no meaning with it."
        )
    broken = [name for name, score in scores.items() if score.isnan().any()]
    if broken:
        raise ConfigError(f"the scores of {broken[0]} (and {len(broken) - 1} more) hold NaN, so they have no order.")
