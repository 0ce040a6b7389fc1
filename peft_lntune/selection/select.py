"""From scores to masks: the best entries within a budget."""

import math
import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from peft_lntune.core.choices import SCOPES
from peft_lntune.errors import ConfigError

__all__ = ["SCOPES", "check_whole", "group_of", "select"]


def select(
    scores: Mapping[str, Tensor],
    *,
    density: float | None = None,
    count: int | None = None,
    threshold: float | None = None,
    scope: str = "global",
    largest: bool = True,
    max_per_norm: int | None = None,
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
        max_per_norm: choose at most this many entries of each module, weight and bias together; a budget that cannot be
            used up in one module goes to others of its group. None: no limit.

    Returns:
        For each parameter a bool mask of its shape, True where chosen.

    Raises:
        ConfigError: not exactly one budget is given, it is out of range, the scope is unknown, or a score is NaN.

    Example:
        >>> select({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([3.0, 2.0])}, count=2)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    _check(scores, density, count, threshold, scope, max_per_norm)
    everything = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    if threshold is not None:
        chosen = {name: score >= threshold if largest else score <= threshold for name, score in scores.items()}
        return _capped(scores, chosen, max_per_norm, largest)
    # Sets are cut from the inside out: each entry that is left must fit into the budget of every set around it.
    inner = scope == "tensor"
    allowed = everything if inner else _capped(scores, everything, max_per_norm, largest)
    groups = _groups(scores, scope)
    sizes = {group: sum(scores[name].numel() for name in names) for group, names in groups.items()}
    if count is not None and count > min(sizes.values()):
        group = min(sizes, key=lambda key: sizes[key])
        raise ConfigError(f"count={count} is more than the {sizes[group]} entries of {group or 'all parameters'}.")
    chosen = {}
    for group, names in groups.items():
        number = count if count is not None else max(1, math.floor((density or 0) * sizes[group] + 0.5))
        chosen |= _best({name: scores[name] for name in names}, allowed, number, largest)
    chosen = {name: chosen[name] for name in scores}
    return _capped(scores, chosen, max_per_norm, largest) if inner else chosen


def _groups(scores: Mapping[str, Tensor], scope: str) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(scores):
        groups.setdefault(group_of(name, scope), []).append(name)
    return groups


def _capped(
    scores: Mapping[str, Tensor], chosen: Mapping[str, Tensor], most: int | None, largest: bool
) -> dict[str, Tensor]:
    """The best of the chosen entries of each module, at most so many."""
    if most is None:
        return dict(chosen)
    kept: dict[str, Tensor] = {}
    modules: dict[str, list[str]] = {}
    for name in sorted(scores):
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for names in modules.values():
        kept |= _best({name: scores[name] for name in names}, chosen, most, largest)
    return {name: kept[name] for name in scores}


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


def _best(scores: Mapping[str, Tensor], allowed: Mapping[str, Tensor], number: int, largest: bool) -> dict[str, Tensor]:
    """The best of the allowed entries, at most so many."""
    device = next(iter(scores.values())).device
    flat = torch.cat([score.detach().reshape(-1).to(device) for score in scores.values()])
    open_ = torch.cat([allowed[name].reshape(-1).to(device) for name in scores])
    order = flat.argsort(descending=largest, stable=True)  # topk has no fixed order for equal scores
    mask = torch.zeros_like(open_)
    mask[order[open_[order]][:number]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def _check(
    scores: Mapping[str, Tensor],
    density: float | None,
    count: int | None,
    threshold: float | None,
    scope: str,
    max_per_norm: int | None,
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
    if count is not None:
        check_whole("count", count, "entries")
    if max_per_norm is not None:
        check_whole("max_per_norm", max_per_norm, "entries")
    if threshold is not None and scope != "global":
        raise ConfigError(
            f"threshold={threshold} looks at each entry alone, so scope={scope!r} has no meaning with it."
        )
    broken = [name for name, score in scores.items() if score.isnan().any()]
    if broken:
        raise ConfigError(f"the scores of {broken[0]} (and {len(broken) - 1} more) hold NaN, so they have no order.")


def check_whole(name: str, value: Any, unit: str) -> None:
    """Check that a number is whole and at least 1.

    Args:
        name: name of the argument, for the message.
        value: the number.
        unit: what is counted, for the message.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ConfigError(f"{name}={value!r} should be a whole number of {unit}, at least 1.")
