"""Plots of results; they compute nothing that a table does not have."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.metrics import metric_of

# Points of one arm keep their colour and marker in every panel.
COLOURS = (
    *("#1b6ca8", "#d1495b", "#6a994e", "#8d6cab", "#e09f3e", "#5c677d", "#3aafa9", "#a44a3f"),
    *("#111111", "#c77dff", "#7f5539", "#80b918", "#ff8fab"),
)
MARKERS = "osD^vPX*<>phd"
SMALLEST = 1000  # below this many entries the axis is linear, so that an arm with none of its own has a place
SMALLEST_MASK = 50  # the same where masks of few entries are drawn
Scores = Mapping[str, Mapping[str, Sequence[float]]]
Curves = Mapping[str, Sequence[tuple[float, Sequence[float]]]]


def plot_against_size(path: Path, panels: Mapping[str, Scores], sizes: Mapping[str, int], title: str) -> None:
    """Draw mean and reach of each arm against the entries it tunes, one panel a task.

    Args:
        path: PNG file.
        panels: task -> dtype of the base -> arm -> scores, one per seed; the first dtype is drawn with
            filled markers, the others with hollow ones.
        sizes: arm -> tuned entries beside the head.
        title: above the panels.
    """
    with _figure(path, panels, title) as axes:
        for axis, (task, scores) in zip(axes, panels.items(), strict=True):
            for number, dtype in enumerate(scores):
                _draw(axis, scores[dtype], sizes, hollow=number > 0)
            _scale(axis, task, max([SMALLEST, *sizes.values()]), SMALLEST)


def plot_curves(
    path: Path,
    panels: Mapping[str, Curves],
    title: str,
    bands: Sequence[str] = (),
    smallest: int = SMALLEST_MASK,
) -> None:
    """Draw mean and reach of the scores against the tuned entries, one panel a task.

    Args:
        path: PNG file.
        panels: task -> name -> points, each the tuned entries and the scores, one per seed. The points of a
            name with several are joined.
        title: above the panels.
        bands: names of one point that are drawn across the panel, since they tune far more than the others.
        smallest: below this many entries the axis is linear.
    """
    names = _names(panels)
    sizes = [
        int(size)
        for curves in panels.values()
        for name, points in curves.items()
        for size, _ in points
        if name not in bands
    ]
    with _figure(path, panels, title) as axes:
        for axis, (task, curves) in zip(axes, panels.items(), strict=True):
            # Curves of equal sizes stand a little beside each other, so that every bar is seen.
            _curves(
                axis,
                curves,
                names,
                lambda size, place: size * 1.04**place,
                {name: f"{name} ({curves[name][0][0]:,})" for name in bands if name in curves},
            )
            _scale(axis, task, max([SMALLEST, *sizes]), smallest)


def plot_along(
    path: Path,
    panels: Mapping[str, Curves],
    title: str,
    along: str,
    upright: str | None = None,
    bands: Sequence[str] = (),
    ticks: Sequence[str] = (),
) -> None:
    """Draw mean and reach of the scores along a linear axis, one panel a task.

    Args:
        path: PNG file.
        panels: task -> name -> points, each its place and the scores, one per seed. The points of a name are joined.
        title: above the panels.
        along: what the axis is.
        upright: what the scores are; None: those of the task's metric.
        bands: names whose first point is drawn across the panel.
        ticks: what the places 0, 1 and so on are called, where they are no numbers.
    """
    names = _names(panels)
    places = [place for curves in panels.values() for points in curves.values() for place, _ in points]
    step = (max(places) - min(places)) / 200  # beside each other, as above
    with _figure(path, panels, title) as axes:
        for axis, (task, curves) in zip(axes, panels.items(), strict=True):
            _curves(axis, curves, names, lambda at, place: at + step * place, {name: name for name in bands})
            axis.set(title=task, xlabel=along, ylabel=upright or metric_of(task).said)
            if ticks:
                axis.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right", rotation_mode="anchor")
            axis.grid(alpha=0.3)


def plot_matrices(
    path: Path, panels: Mapping[str, Sequence[Sequence[float | None]]], names: Sequence[str], title: str
) -> None:
    """Draw square tables of correlations in hundredths as heat maps, one panel each; None is left empty.

    Args:
        path: PNG file.
        panels: title -> values (names, names).
        names: of the rows and of the columns.
        title: above the panels.
    """
    with _figure(path, panels, title, size=(1.9 + 0.62 * len(names), 1.6 + 0.62 * len(names))) as axes:
        for axis, (said, values) in zip(axes, panels.items(), strict=True):
            shown = [[math.nan if value is None else value for value in row] for row in values]
            axis.imshow(shown, cmap="RdBu_r", vmin=-100, vmax=100)
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    text = "-" if value is None else f"{value:.0f}"
                    dark = value is not None and abs(value) > 60
                    axis.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(len(names)), names)
            axis.set_title(said)


def _names(panels: Mapping[str, Curves]) -> list[str]:
    return list(dict.fromkeys(name for curves in panels.values() for name in curves))


def _curves(
    axis: Any,
    curves: Curves,
    names: Sequence[str],
    beside: Callable[[float, float], float],
    bands: Mapping[str, str],
) -> None:
    """Draw the curves of one panel.

    Args:
        axis: of the panel.
        curves: name -> points.
        names: of all panels, which choose the colours.
        beside: a place and how far to stand from the middle -> the place that is drawn.
        bands: names that are drawn across the panel, and how the legend has them.
    """
    for name, points in curves.items():
        number = names.index(name)
        if name in bands:
            _band(axis, points[0][1], label=bands[name], color=_look(number)["color"])
            continue
        look = {**_look(number), "linestyle": "-" if len(points) > 1 else "none", "alpha": 0.85}
        moved = [(beside(place, number - len(names) / 2), scores) for place, scores in points]
        _points(axis, moved, label=name, **look)


@contextmanager
def _figure(
    path: Path, panels: Iterable[str], title: str, size: tuple[float, float] = (5.6, 4.4)
) -> Iterator[Sequence[Any]]:
    """Make one panel a task beside each other, and after they are drawn a legend for all; write it.

    `size` is of a panel, in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count, (width, height) = len(list(panels)), size
    figure, axes = pyplot.subplots(1, count, figsize=(width * count, height), squeeze=False, layout="constrained")
    try:
        yield axes[0]
        named = {
            label: drawn for axis in axes[0] for drawn, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        if named:
            figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False)
        figure.suptitle(title)
        figure.savefig(path, dpi=120, metadata={"Software": None})
    finally:
        pyplot.close(figure)


def _scale(axis: Any, task: str, largest: int, smallest: int) -> None:
    """Make the axis of entries logarithmic from `smallest` on, with a place for no entries at all."""
    axis.set_xscale("symlog", linthresh=smallest)
    axis.set_xlim(-smallest / 2, 3 * largest)
    axis.set_xticks([0, *(10**power for power in range(len(str(smallest - 1)), len(str(largest))))])
    axis.set(title=task, xlabel="tuned entries beside the head", ylabel=metric_of(task).said)
    axis.grid(alpha=0.3)


def _draw(axis: Any, scores: Mapping[str, Sequence[float]], sizes: Mapping[str, int], hollow: bool) -> None:
    """Draw one point an arm, with bars to its best and its worst seed."""
    for arm, values in scores.items():
        if not values:
            continue
        look = _look(list(sizes).index(arm))
        # Arms of one size stand beside each other; the axis is logarithmic, so a factor is a shift.
        twins = [name for name in sizes if sizes[name] == sizes[arm]]
        shift = 1.3 ** (2 * twins.index(arm) + hollow - len(twins) + 0.5)
        look |= {"mfc": "white"} if hollow else {}
        label = f"{arm}, bf16 base" if hollow else arm
        _points(axis, [(sizes[arm] * shift, values)], label=label, linestyle="none", **look)


def _points(axis: Any, points: Sequence[tuple[float, Sequence[float]]], **look: Any) -> None:
    """Draw the mean of each point's scores, with bars to the best and the worst."""
    if not points:
        return
    means = [statistics.mean(scores) for _, scores in points]
    below = [mean - min(scores) for mean, (_, scores) in zip(means, points, strict=True)]
    above = [max(scores) - mean for mean, (_, scores) in zip(means, points, strict=True)]
    axis.errorbar([size for size, _ in points], means, yerr=[below, above], capsize=3, markersize=7, **look)


def _band(axis: Any, scores: Sequence[float], label: str, color: str) -> None:
    """Draw the mean of scores as a line across the panel, in a band from the worst to the best."""
    axis.axhspan(min(scores), max(scores), color=color, alpha=0.15, linewidth=0)
    axis.axhline(statistics.mean(scores), color=color, linestyle="--", label=label)


def _look(number: int) -> dict[str, Any]:
    again = number // len(COLOURS)  # where colours come again, each has another marker
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[(number + again) % len(MARKERS)]}
