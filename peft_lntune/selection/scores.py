"""Scores by name, and the scores that need no data: magnitude, distance from the median, change, and random.

To add a score, write a function here under `register_score`, and a test; `peft-lntune fisher --score NAME` finds it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from peft_lntune.errors import ConfigError
from peft_lntune.selection.effective import effective_parameters
from peft_lntune.selection.parameters import find_parameters, generator

__all__ = [
    "SCORES",
    "change_scores",
    "find_score",
    "magnitude_scores",
    "median_distance_scores",
    "random_scores",
    "register_score",
]

Score = TypeVar("Score", bound=Callable[..., dict[str, Tensor]])

SCORES: dict[str, Callable[..., dict[str, Tensor]]] = {}
"""Score functions `(model, parameters=None, ...) -> scores by parameter`, by their names on the command line.

Of `fisher_scores`'s further arguments `batches`, `kind`, `seed`, `state` and `progress`, the command line passes those
that the function accepts.
"""


def register_score(name: str) -> Callable[[Score], Score]:
    """Register a function as a score, for `find_score` and `peft-lntune fisher --score NAME`.

    Args:
        name: a new name.

    Returns:
        A decorator, which returns the function unchanged. It raises a `ConfigError` where the name is taken.

    Example:
        >>> @register_score("size")
        ... def size_scores(model, parameters=None):
        ...     return {name: torch.full_like(v, v.numel()) for name, v in find_parameters(model, parameters).items()}
        >>> find_score("size")(nn.Sequential(nn.LayerNorm(2)))["0.bias"]
        tensor([2., 2.])
        >>> del SCORES["size"]
    """

    def register(function: Score) -> Score:
        if name in SCORES:
            raise ConfigError(f"there is a score {name!r} already, {SCORES[name].__qualname__}. Choose another name.")
        SCORES[name] = function
        return function

    return register


def find_score(name: str) -> Callable[..., dict[str, Tensor]]:
    """Look up a score function by name.

    Args:
        name: a key of `SCORES`, such as `"fisher"` or `"magnitude"`.

    Returns:
        The function.

    Raises:
        ConfigError: no score has this name.

    Example:
        >>> find_score("magnitude") is magnitude_scores
        True
    """
    if name not in SCORES:
        raise ConfigError(f"score={name!r}: choose one of {', '.join(map(repr, SCORES))}.")
    return SCORES[name]


@register_score("magnitude")
def magnitude_scores(model: nn.Module, parameters: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Score parameters by the absolute value of each entry.

    Args:
        model: any model; for a model with adapters, its present base parameters are scored, including merged adapters.
        parameters: names in the base model; None: weight and bias of every norm.

    Returns:
        For each parameter its scores, of its shape, in float32 or wider.

    Raises:
        ConfigError: a name is unknown, or the model has no norm.

    Example:
        >>> magnitude_scores(nn.Sequential(nn.LayerNorm(2)))["0.weight"]
        tensor([1., 1.])
    """
    return {name: _wide(value).abs() for name, value in find_parameters(model, parameters).items()}


@register_score("median-distance")
def median_distance_scores(model: nn.Module, parameters: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Score parameters by the distance of each entry from the median of its parameter, `|w - median(w)|`.

    The gains of a norm cluster around one value, so outliers on either side are not always the largest gains. Unlike
    the mean, the median does not move with a few outliers.

    Source: ours. Outliers by distance from the mean of their own vector: Kovaleva et al. 2021 (arXiv 2105.06990).

    Args:
        model: any model; for a model with adapters, its present base parameters are scored, including merged adapters.
        parameters: names in the base model; None: weight and bias of every norm. A parameter of more dimensions counts
            as one vector.

    Returns:
        For each parameter its scores, of its shape. The median of an even number of entries is the lower of the two
        middle values.

    Raises:
        ConfigError: a name is unknown, or the model has no norm.

    Example:
        >>> norm = nn.LayerNorm(3)
        >>> _ = norm.weight.data.copy_(torch.tensor([0.1, 0.6, 0.8]))
        >>> median_distance_scores(nn.Sequential(norm))["0.weight"]
        tensor([0.5000, 0.0000, 0.2000])
    """
    wide = {name: _wide(value) for name, value in find_parameters(model, parameters).items()}
    return {name: (value - value.median()).abs() for name, value in wide.items()}


def change_scores(
    before: nn.Module | Mapping[str, Tensor],
    after: nn.Module | Mapping[str, Tensor],
    parameters: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Score parameters by how far each entry moved in training, `|after - before|`.

    LT-SFT ranks by this score, resets the model, and trains only the entries with the highest scores.

    Source: Ansell et al. 2022 (LT-SFT, arXiv 2110.07560).

    Args:
        before: the model before training, or its parameters by name. For a model with adapters, the active adapters are
            merged into the parameters; bottlenecks and prefixes change no parameter and do not count.
        after: the same model after training, or its parameters by name.
        parameters: names in the base model; None: weight and bias of every norm of a model, or all given tensors.

    Returns:
        For each parameter its scores, of its shape, in float32 or wider.

    Raises:
        ConfigError: parameters or shapes differ, or a name is unknown.

    Example:
        >>> change_scores({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.5, 0.0])})
        {'w': tensor([0.5000, 2.0000])}
    """
    names = None if parameters is None else list(parameters)
    one, two = _named(before, names), _named(after, names)
    differing = sorted(one.keys() ^ two.keys()) or [name for name in one if one[name].shape != two[name].shape]
    if differing:
        raise ConfigError(
            f"before and after should have the same parameters, but {differing[0]} (and {len(differing) - 1} more) is "
            "missing in one of them or has another shape."
        )
    return {name: (_wide(two[name]).to(value.device) - _wide(value)).abs() for name, value in one.items()}


@register_score("random")
def random_scores(model: nn.Module, parameters: Iterable[str] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random scores, uniform in [0, 1): the control for all other scores.

    Args:
        model: any model; for a model with adapters, its base parameters are scored.
        parameters: names in the base model; None: weight and bias of every norm.
        seed: the scores depend only on the seed and the parameters' names and shapes.

    Returns:
        For each parameter its scores, of its shape, in float32.

    Raises:
        ConfigError: a name is unknown, or the model has no norm.

    Example:
        >>> scores = random_scores(nn.Sequential(nn.LayerNorm(2)), seed=1)
        >>> scores["0.bias"].shape
        torch.Size([2])
    """
    return {
        name: torch.rand(value.shape, generator=generator(seed, name)).to(value.device)
        for name, value in find_parameters(model, parameters).items()
    }


def _named(given: nn.Module | Mapping[str, Tensor], names: list[str] | None) -> Mapping[str, Tensor]:
    if isinstance(given, nn.Module):
        effective = effective_parameters(given)
        first = {id(base): name for name, base in find_parameters(given, effective).items()}
        return {name: effective[first[id(base)]] for name, base in find_parameters(given, names).items()}
    if names is None:
        return given
    missing = [name for name in names if name not in given]
    if missing:
        raise ConfigError(f"tensor {missing[0]!r} (and {len(missing) - 1} more) not found.")
    return {name: given[name] for name in names}


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
