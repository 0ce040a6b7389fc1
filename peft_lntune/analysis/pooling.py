"""Shared by the tables of this folder: which parameters make one row, and values read piece by piece in float64."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from peft_lntune.architectures.components import ParameterPlace, group_by_place
from peft_lntune.errors import ConfigError

__all__ = ["CHUNK", "Moments", "moments", "pieces", "pool", "ratio", "rows_by_place"]

CHUNK = 2**20
"""Number of entries held in float64 at a time."""


def rows_by_place(
    places: Mapping[str, ParameterPlace], *, layers: bool = True
) -> tuple[tuple[str, ...], dict[tuple[Any, ...], list[str]]]:
    """The first columns of a table with one row per place, and the parameters that each row pools.

    Args:
        places: the place of each parameter, from `find_components`.
        layers: True: one row per component and layer; False: one row per component, its layers pooled.

    Returns:
        The names of the columns, and for each row (its cells in these columns) the names of its parameters, in order
        of first appearance.

    Example:
        >>> places = {f"h.{layer}.ln_1.bias": ParameterPlace("attention norm", layer, "bias") for layer in (0, 1)}
        >>> rows_by_place(places, layers=False)
        (('component', 'parameter'), {('attention norm', 'bias'): ['h.0.ln_1.bias', 'h.1.ln_1.bias']})
    """
    columns = ParameterPlace._fields if layers else ("component", "parameter")
    groups = group_by_place(places, layers=layers)
    return columns, {tuple(getattr(place, column) for column in columns): names for place, names in groups.items()}


def pieces(name: str, tensor: Tensor, when: str = "") -> Iterator[Tensor]:
    """The entries of a tensor, at most `CHUNK` at a time, in float64 on the CPU.

    Args:
        name: name of the tensor, for errors.
        tensor: any shape, dtype and device.
        when: which of several tensors with this name it is, for errors, such as `" before"`.

    Yields:
        Vectors of one to `CHUNK` entries.

    Raises:
        ConfigError: an entry is NaN or infinite.

    Example:
        >>> [piece.dtype for piece in pieces("w", torch.ones(2, 3, dtype=torch.bfloat16))]
        [torch.float64]
    """
    for piece in tensor.detach().reshape(-1).split(CHUNK):
        wide = piece.cpu().double()
        if not wide.isfinite().all():
            raise ConfigError(f"{name} has NaN or infinite entries{when}. Use a checkpoint from before it diverged.")
        if len(wide):
            yield wide


class Moments(NamedTuple):
    """Sums over the entries of one or several tensors.

    Attributes:
        entries: number of entries.
        magnitude: sum of the absolute values.
        largest: largest absolute value.
        mean: mean of the entries.
        squares: sum of the squared distances from the mean.
    """

    entries: int = 0
    magnitude: float = 0.0
    largest: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def mean_magnitude(self) -> float | None:
        """Mean of the absolute values; None without entries."""
        return ratio(self.magnitude, self.entries)

    @property
    def std(self) -> float | None:
        """Standard deviation with n - 1 in the denominator; None for fewer than two entries."""
        return math.sqrt(self.squares / (self.entries - 1)) if self.entries > 1 else None


def moments(values: Iterable[Tensor]) -> Moments:
    """The moments of the entries of several vectors; for equal entries, `squares` is exactly 0.

    Args:
        values: float64 vectors, none of them empty, such as `pieces` yields.

    Returns:
        The moments over all entries.

    Example:
        >>> moments([torch.tensor([1.0, -3.0])]).std
        2.8284271247461903
    """
    return pool(_moments(piece) for piece in values)


def _moments(piece: Tensor) -> Moments:
    beside = piece - piece[0]
    mean = beside.mean()
    sizes = piece.abs()
    values = (sizes.sum(), sizes.max(), piece[0] + mean, (beside - mean).square().sum())
    return Moments(len(piece), *map(float, values))


def pool(parts: Iterable[Moments]) -> Moments:
    """The moments of several tensors together.

    Args:
        parts: the moments of each tensor.

    Returns:
        The moments of all entries, as if they belonged to one tensor.

    Example:
        >>> pool([Moments(1, 1.0, 1.0, 1.0, 0.0), Moments(1, 3.0, 3.0, 3.0, 0.0)]).mean
        2.0
    """
    found = Moments()
    for part in parts:
        both = max(1, found.entries + part.entries)
        apart, share = part.mean - found.mean, part.entries / both
        found = Moments(
            found.entries + part.entries,
            found.magnitude + part.magnitude,
            max(found.largest, part.largest),
            found.mean + apart * share,
            found.squares + part.squares + apart**2 * found.entries * share,
        )
    return found


def ratio(value: float | None, by: float | None) -> float | None:
    """Divide, with None where a value is missing or the denominator is 0.

    Args:
        value: the numerator, or None.
        by: the denominator, or None.

    Returns:
        `value / by`; None where either is None, or `by` is 0.

    Example:
        >>> ratio(1.0, 4), ratio(1.0, 0)
        (0.25, None)
    """
    return None if value is None or not by else value / by
