"""How close two models are, per tensor, component or layer, with random models and noise as controls."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from peft_lntune.analysis.checkpoints import CheckpointSource, match_tensors
from peft_lntune.analysis.pooling import pieces, ratio, rows_by_place
from peft_lntune.analysis.tables import Table
from peft_lntune.architectures.components import ParameterPlace, find_components
from peft_lntune.core.choices import BY, DISTANCES
from peft_lntune.errors import ConfigError
from peft_lntune.selection.parameters import generator

__all__ = ["BY", "CONTROLS", "DISTANCES", "closeness"]

CONTROLS = ("random", "noise")


def closeness(
    before: CheckpointSource,
    after: CheckpointSource,
    *,
    layers: bool = True,
    by: str = "component",
    shared: bool = False,
    controls: bool = True,
    initial: tuple[CheckpointSource, CheckpointSource] | None = None,
    init_std: float = 0.02,
    seed: int = 0,
    progress: bool = True,
) -> Table:
    """How close two models are in parameter space, by three distances, in float64.

    - `mean_l1`: `||w1 - w0||_1 / n`
    - `relative_l1`: `||w1 - w0||_1 / ||w0||_1`
    - `angle`: `arccos(<w0, w1> / (||w0||_2 ||w1||_2)) / pi`, from 0 (same direction) to 1 (opposite)

    Two controls give the same distances:

    - `random`: two random initializations of the same shapes, that is, models with nothing in common
    - `noise`: `w0` and `w0 + e`, with `e` Gaussian and `||e||_2 = ||w1 - w0||_2` in each tensor, that is, a step of the
      same length in a random direction

    The controls depend on the seed and the tensor's name only, not on any order. A small angle is computed from the
    difference, not by arccos, so it stays precise where the two models are nearly equal.

    Source: Radiya-Dixit and Wang 2020, How fine can fine-tuning be? (arXiv 2004.14129).

    Args:
        before: a model, plain or with adapters; tensors by name; or the path of a checkpoint in safetensors (a file,
            the index of a sharded one, or a folder). Files are read one tensor at a time, so two checkpoints of any
            size need the memory of their largest tensor.
        after: the model, tensors or path to compare with, with the names and shapes of `before`.
        layers: with `by="component"`: True: one row per component and layer; False: the layers of a component pooled.
        by: what one row pools: `"component"`, `"layer"` (all its components), or `"tensor"` (nothing).
        shared: True: compare the tensors that both have in the same shape, and leave out others, such as heads.
        controls: False: leave them out, which takes less than half the time.
        initial: two freshly initialized models for the control `random`. None: entries of tensors with two or more
            dimensions are drawn from N(0, init_std²), gains are 1 and biases 0; two such vectors are equal.
        init_std: standard deviation of these draws; `initializer_range` in the model's config.
        seed: seed of both controls.
        progress: show a progress bar where the comparison takes longer than a few seconds.

    Returns:
        Columns `component`, `layer` (None outside the layers) and `parameter` ("weight" or "bias"); with `by="layer"`
        only `layer`; with `by="tensor"` `tensor` before these three. Then `entries`, the three distances, and those of
        the controls as `random_mean_l1`, ..., `noise_angle`. Where a denominator is 0, the distance is None.

    Raises:
        ConfigError: architectures or shapes differ, values are NaN, infinite or quantized, or `by` is unknown.
        AdapterFileError: a checkpoint is missing, damaged, truncated, or not in safetensors.

    Example:
        >>> before = {"wte.weight": torch.tensor([[1.0, 0.0]]), "ln_f.weight": torch.tensor([1.0, 1.0])}
        >>> after = {"wte.weight": torch.tensor([[0.0, 1.0]]), "ln_f.weight": torch.tensor([1.5, 1.5])}
        >>> print(closeness(before, after, by="layer", controls=False))
        layer  entries  mean_l1  relative_l1  angle
        -      4        0.75     1            0.2355
        >>> [round(angle, 9) for angle in closeness(before, after, controls=False).column("angle")]
        [0.5, 0.0]
    """
    if by not in BY:
        raise ConfigError(f"by={by!r}: choose one of {', '.join(map(repr, BY))}.")
    if not layers and by != "component":
        raise ConfigError(f"layers=False pools the layers of components, and has no meaning with by={by!r}.")
    old, new = match_tensors(before, after, shared=shared)
    pairs = None if initial is None or not controls else _initial(initial, list(old))
    places = find_components(old)
    sums: dict[str, list[_Sums]] = {}
    for name in _with_bar(old, progress):
        one, two = old[name], new[name]
        drawn = _Drawn(name, two.dim(), init_std, seed) if controls else None
        given = None if pairs is None else (pairs[0][name], pairs[1][name])
        sums[name] = _sums_of(name, one, two, drawn, given)
        del one, two, given
    rows = []
    columns, groups = _groups(places, layers, by)
    for cells, names in groups.items():
        pooled = [sum(parts[1:], parts[0]) for parts in zip(*(sums[name] for name in names), strict=True)]
        measured = [value for part in pooled for value in part.distances()]
        rows.append((*cells, pooled[0].entries, *measured))
    shown = [*DISTANCES, *(f"{control}_{name}" for control in CONTROLS if controls for name in DISTANCES)]
    return Table((*columns, "entries", *shown), tuple(rows))


@dataclass(frozen=True)
class _Sums:
    """Sums from which the distances of two tensors follow; sums of several pairs add up. d is the difference."""

    entries: int = 0
    moved: float = 0.0  # sum |d|
    size: float = 0.0  # sum |w0|
    length: float = 0.0  # sum d²
    old: float = 0.0  # sum w0²
    new: float = 0.0  # sum w1²
    along: float = 0.0  # sum w0 d
    product: float = 0.0  # sum w0 w1

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def distances(self) -> tuple[float | None, ...]:
        return ratio(self.moved, self.entries), ratio(self.moved, self.size), self._angle()

    def _angle(self) -> float | None:
        """arccos(cosine) / pi; of small angles by 2 arcsin(||u1 - u0|| / 2) of the unit vectors, which they need."""
        a, b = math.sqrt(self.old), math.sqrt(self.new)
        if not a or not b:
            return None
        cosine = self.product / a / b
        if cosine < 0.9 or not 0.5 < b / a < 2:
            return math.acos(max(-1.0, min(1.0, cosine))) / math.pi
        longer = (2 * self.along + self.length) / (a + b)  # b - a
        aside = self.length - longer**2
        # A step along w0 leaves rounding here, and its root would look like an angle.
        chord = math.sqrt(aside / a / b) if aside > 64 * sys.float_info.epsilon * self.length else 0.0
        return 2 * math.asin(chord / 2) / math.pi


class _Drawn:
    """Entries of the controls for one tensor, drawn piece by piece."""

    def __init__(self, name: str, dimensions: int, std: float, seed: int) -> None:
        self.constant = None if dimensions > 1 else float(not name.endswith("bias"))
        self.std = std
        keys = ("one", "two", "noise")
        self.generators = {key: generator(seed, f"{key} {name}") for key in keys}

    def initial(self, length: int) -> tuple[Tensor, ...]:
        if self.constant is not None:
            same = torch.full((length,), self.constant, dtype=torch.float64)
            return same, same
        return tuple(self.std * self.normal(key, length) for key in ("one", "two"))

    def normal(self, key: str, length: int) -> Tensor:
        # Drawn in float32, which takes a fifth of the time, and summed in float64.
        return torch.randn(length, generator=self.generators[key]).double()


def _sums_of(
    name: str, before: Tensor, after: Tensor, drawn: _Drawn | None, given: tuple[Tensor, Tensor] | None
) -> list[_Sums]:
    """The sums of one tensor and of its two controls."""
    found, random, noise = _Sums(), _Sums(), _Sums()
    sources = zip((before, after, *(given or ())), (" before", " after", " in initial", " in initial"), strict=False)
    for old, new, *fresh in zip(*(pieces(name, tensor, when) for tensor, when in sources), strict=True):
        found += _of(old, new)
        if drawn is not None:
            random += _of(*(fresh or drawn.initial(len(old))))
            step = drawn.normal("noise", len(old))
            noise += _Sums(len(old), float(step.abs().sum()), length=float(step @ step), along=float(old @ step))
    if drawn is None:
        return [found]
    # The length of the step is known only now, so the noise is scaled in the sums, not per entry.
    scale = math.sqrt(found.length / noise.length) if noise.length else 0.0
    moved, along = scale * noise.moved, scale * noise.along
    reached = max(0.0, found.old + 2 * along + found.length)
    noise = _Sums(found.entries, moved, found.size, found.length, found.old, reached, along, found.old + along)
    return [found, random, noise]


def _of(old: Tensor, new: Tensor) -> _Sums:
    d = new - old
    sizes = (d.abs().sum(), old.abs().sum(), d @ d, old @ old, new @ new, old @ d, old @ new)
    return _Sums(len(old), *map(float, sizes))


def _initial(
    initial: tuple[CheckpointSource, CheckpointSource], names: Sequence[str]
) -> tuple[Mapping[str, Tensor], ...]:
    one, two = match_tensors(*initial)
    lost = [name for name in names if name not in one]
    if lost:
        raise ConfigError(
            f"initial should hold two models of the same architecture as before, but has no {lost[0]} (and "
            f"{len(lost) - 1} more)."
        )
    return one, two


def _groups(
    places: Mapping[str, ParameterPlace], layers: bool, by: str
) -> tuple[tuple[str, ...], dict[tuple[Any, ...], list[str]]]:
    """The first columns of the table, and for each row its cells there with the names of its tensors."""
    if by == "tensor":
        return ("tensor", *ParameterPlace._fields), {(name, *place): [name] for name, place in places.items()}
    if by == "layer":
        _, groups = rows_by_place({name: ParameterPlace("", place.layer, "") for name, place in places.items()})
        return ("layer",), {(layer,): names for (_, layer, _), names in groups.items()}
    return rows_by_place(places, layers=layers)


def _with_bar(names: Mapping[str, Tensor], progress: bool) -> Iterator[str]:
    from tqdm.auto import tqdm

    with tqdm(names, desc="Closeness", unit="tensor", delay=3, disable=not progress) as bar:
        yield from bar
