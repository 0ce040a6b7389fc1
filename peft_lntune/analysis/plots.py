"""Plots of the tables of this folder. They compute nothing beyond the tables."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from peft_lntune.analysis.tables import Table
from peft_lntune.core.choices import DISTANCES, MEASURES, SIZES
from peft_lntune.errors import ConfigError

__all__ = ["plot_change", "plot_closeness", "plot_magnitude", "plot_overlap", "plot_score_map", "plot_sparsity"]

FilePath = str | PathLike[str]
Grid = Sequence[Sequence[float | None]]

_SAID = {
    "mean_change": "mean |change|",
    "relative_to_mean": "mean |change| / mean |w0|",
    "relative_to_std": "mean |change| / std(w0)",
    "mean_magnitude": "mean |w|",
    "std": "standard deviation",
    "largest": "max |w|",
    "over_others": "mean |w| / that of weights outside norms",
    "mean_score": "mean score",
    "sum_of_scores": "sum of scores",
    "share_tuned": "share of tuned entries",
    "entries_tuned": "tuned entries",
    "sparsity": "share of weights switched off",
    "sparsity_before": "share of weights off at the start",
    "flipped": "share of weights turned off or on",
}
_DISTANCES = {
    "mean_l1": "mean L1 distance",
    "relative_l1": "L1 distance / L1 norm before",
    "angle": "angle / pi",
}
_NAMED = ("component", "parameter")
_LAYERS = "layer (none: outside the layers; grey: no value)"
_WIDTH = 9.0  # inches, so that names can be read where a page shows the picture 900 pixels wide
_DPI = 150
_TICK = 0.28  # inches that the name of a layer takes


def plot_change(
    table: Table,
    path: FilePath,
    measure: str = "mean_change",
    *,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a `parameter_change` table: components by layers, on a logarithmic colour scale, one panel per parameter.

    Args:
        table: made with `layers=True`.
        path: PNG file, or another format that matplotlib knows by its ending.
        measure: the column to show: `"mean_change"`, `"relative_to_mean"` or `"relative_to_std"`.
        title: of the picture, such as the task or the model; what is drawn stands below it.
        limits: smallest and largest value of the colours, so that several pictures can be compared; None takes those
            of the table.

    Raises:
        ConfigError: the measure is unknown, the limits leave out a value, or the table has no layers.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if measure not in MEASURES:
        raise ConfigError(f"measure={measure!r}: choose one of {', '.join(MEASURES)}.")
    drawn = f"{_capital(_SAID[measure])} of each component and layer"
    _draw_places(table, path, measure, _titled(title, drawn), limits, logarithmic=True)


def plot_closeness(
    table: Table,
    path: FilePath,
    measure: str = "angle",
    *,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a `closeness` table by component: the two models and the controls, on one logarithmic scale.

    Args:
        table: made with `by="component"`, with or without pooled layers.
        path: PNG file, or another format that matplotlib knows by its ending.
        measure: `"mean_l1"`, `"relative_l1"` or `"angle"`.
        title: of the picture, such as the task or the model; what is drawn stands below it.
        limits: smallest and largest value of the colours, so that several pictures can be compared; None takes those
            of the table.

    Raises:
        ConfigError: the measure is unknown, the limits leave out a value, or the table is not by component.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if measure not in DISTANCES:
        raise ConfigError(f"measure={measure!r}: choose one of {', '.join(DISTANCES)}.")
    if "component" not in table.columns or "tensor" in table.columns:
        raise ConfigError(
            f'a table of closeness(by="component") is needed, but this one has {", ".join(table.columns)}.'
        )
    said = {
        measure: "Before and after",
        f"noise_{measure}": "Noise as long as the step",
        f"random_{measure}": "Two random starts",
    }
    layered = "layer" in table.columns
    layers = table.column("layer") if layered else [None] * len(table.rows)
    rows = [f"{component}, {parameter}" for component, parameter in zip(*map(table.column, _NAMED), strict=True)]
    values = {
        (said[column], row, layer): value
        for column in said
        if column in table.columns
        for row, layer, value in zip(rows, layers, table.column(column), strict=True)
    }
    drawn = f"{_capital(_DISTANCES[measure])} of each component" + (" and layer" if layered else "")
    _draw_layers(values, path, _titled(title, drawn), _DISTANCES[measure], limits, logarithmic=True, layered=layered)


def plot_magnitude(
    table: Table,
    path: FilePath,
    measure: str = "mean_magnitude",
    *,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a `magnitude` table: components by layers, on a logarithmic colour scale, one panel per parameter.

    Args:
        table: made with `layers=True`.
        path: PNG file, or another format that matplotlib knows by its ending.
        measure: the column to show: `"mean_magnitude"`, `"std"`, `"largest"` or `"over_others"`.
        title: of the picture, such as the task or the model; what is drawn stands below it.
        limits: smallest and largest value of the colours, so that several pictures can be compared; None takes those
            of the table.

    Raises:
        ConfigError: the measure is unknown, the limits leave out a value, or the table has no layers.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if measure not in SIZES:
        raise ConfigError(f"measure={measure!r}: choose one of {', '.join(SIZES)}.")
    drawn = f"{_capital(_SAID[measure])}, by component and layer"
    _draw_places(table, path, measure, _titled(title, drawn), limits, logarithmic=True)


def plot_score_map(table: Table, path: FilePath, *, title: str = "", limits: tuple[float, float] | None = None) -> None:
    """Draw the last column of a `score_map` table: components by layers, one panel per parameter.

    Args:
        table: scores, drawn on a logarithmic colour scale, or masks, drawn on a linear one.
        path: PNG file, or another format that matplotlib knows by its ending.
        title: of the picture, such as the task or the model; what is drawn stands below it.
        limits: smallest and largest value of the colours, so that several pictures can be compared; None takes those
            of the table.

    Raises:
        ConfigError: the table is not one of `score_map`, or the limits leave out a value.
        ModuleNotFoundError: matplotlib is not installed.
    """
    quantity = table.columns[-1]
    if quantity not in _SAID:
        raise ConfigError(f"a table of score_map is needed, but the last column of this one is {quantity!r}.")
    drawn = f"{_capital(_SAID[quantity])} by component and layer"
    _draw_places(table, path, quantity, _titled(title, drawn), limits, logarithmic="score" in quantity)


def plot_sparsity(
    table: Table,
    path: FilePath,
    measure: str = "sparsity",
    *,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a `sparsity` table: components by layers, on a linear colour scale.

    Args:
        table: made with `by="component"`.
        path: PNG file, or another format that matplotlib knows by its ending.
        measure: `"sparsity"`; or, for a table made with `start`, `"sparsity_before"` or `"flipped"`.
        title: of the picture, such as the task or the model; what is drawn stands below it.
        limits: smallest and largest value of the colours, so that several pictures can be compared; None takes those
            of the table.

    Raises:
        ConfigError: the measure is unknown, the limits leave out a value, or the table is not by component.
        ModuleNotFoundError: matplotlib is not installed.
    """
    measures = [column for column in ("sparsity", "sparsity_before", "flipped") if column in table.columns]
    if measure not in measures:
        raise ConfigError(f"measure={measure!r}: choose one of {', '.join(measures) or 'those of a sparsity table'}.")
    drawn = f"{_capital(_SAID[measure])}, by component and layer"
    _draw_places(table, path, measure, _titled(title, drawn), limits, logarithmic=False)


def plot_overlap(table: Table, path: FilePath) -> None:
    """Draw an `overlap_matrix` or `off_overlap` table: the overlap of each pair of tasks, and that of random masks.

    Args:
        table: one row per task.
        path: PNG file, or another format that matplotlib knows by its ending.

    Raises:
        ConfigError: the table is of neither kind.
        ModuleNotFoundError: matplotlib is not installed.
    """
    tasks = table.column("task")
    sparse = table.columns[1] == "sparsity"
    share, what, said = ("sparsity", "weights switched off", "off") if sparse else ("density", "masks", "tuned")
    rows = [f"{task}\n({value:.1%} {said})" for task, value in zip(tasks, table.column(share), strict=True)]
    panels = {
        _capital(what): [table.column(task) for task in tasks],
        "Random masks of the same sizes, mean": [table.column(f"{task}, by chance") for task in tasks],
    }
    if sparse:
        panels["The same sizes in each tensor"] = [table.column(f"{task}, by chance a tensor") for task in tasks]
    grids = {said: list(zip(*columns, strict=True)) for said, columns in panels.items()}
    quantity = "Jaccard index: entries in both / in either"
    figure, colors = _matplotlib()
    longest = max(map(len, tasks))
    size = (4.0 + 0.08 * longest + 0.8 * len(panels) * len(tasks), max(3.8, 2.4 + 0.7 * len(tasks)))
    drawing = figure(figsize=size, layout="constrained")
    axes = _draw(drawing, grids, rows, tasks, colors.Normalize(0, 1), quantity)
    for axis, grid in zip(axes, grids.values(), strict=True):
        if longest > 8:
            for name in axis.get_xticklabels():
                name.set(rotation=30, ha="right", rotation_mode="anchor")
        _write(axis, grid)
    drawing.suptitle(f"Overlap of {what} between tasks")
    drawing.savefig(path, dpi=_DPI)


def _titled(title: str, drawn: str) -> str:
    return f"{title}\n{drawn}" if title else drawn


def _draw_places(
    table: Table, path: FilePath, column: str, title: str, limits: tuple[float, float] | None, *, logarithmic: bool
) -> None:
    """Draw one column of a table with one row per place: one panel for weights and one for biases."""
    cells = zip(*map(table.column, ("component", "layer", "parameter", column)), strict=True)
    values = {(parameter, component, layer): value for component, layer, parameter, value in cells}
    _draw_layers(values, path, title, _SAID[column], limits, logarithmic=logarithmic)


def _draw_layers(
    values: Mapping[tuple[str, str, int | None], float | None],
    path: FilePath,
    title: str,
    quantity: str,
    limits: tuple[float, float] | None,
    *,
    logarithmic: bool,
    layered: bool = True,
) -> None:
    """Draw values by panel, row and layer, panels side by side on one colour scale; `layered`: not pooled."""
    panels = list(dict.fromkeys(panel for panel, _, _ in values))
    rows = list(dict.fromkeys(row for _, row, _ in values))
    layers = sorted({layer for _, _, layer in values}, key=lambda layer: -1 if layer is None else layer)
    grids = {panel: [[values.get((panel, row, layer)) for layer in layers] for row in rows] for panel in panels}
    known = [value for value in values.values() if value is not None]
    figure, colors = _matplotlib()
    norm = _norm(colors, known, logarithmic, limits)
    beside = 0.085 * max(map(len, rows)) + 1.6  # inches of the names at the left and of the bar at the right
    broad = min(0.42 * len(layers) + 0.2, (_WIDTH - beside) / len(grids))
    wide = max(beside + len(grids) * max(broad, 1.2), 0.1 * max(map(len, title.split("\n"))))
    size = (wide, 1.9 + 0.2 * title.count("\n") + max(1.6, 0.28 * len(rows)))
    drawing = figure(figsize=size, layout="constrained")
    heads = ["none" if layer is None else str(layer) for layer in layers] if layered else ["all"]
    _draw(drawing, grids, rows, heads, norm, quantity)
    drawing.supxlabel(_LAYERS if layered else "layers pooled; grey: no value", fontsize="medium")
    drawing.suptitle(title)
    drawing.savefig(path, dpi=_DPI)


def _draw(
    drawing: Any, grids: Mapping[str, Grid], rows: Sequence[str], heads: Sequence[str], norm: Any, quantity: str
) -> Any:
    """Draw heat maps side by side, with one scale and one bar, and return their axes.

    Args:
        drawing: the figure.
        grids: by the panel's title, values `(rows, heads)`; None is an empty cell.
        rows: names of the rows, on the left panel.
        heads: names of the columns; where there are many, only some are shown.
        norm: maps values to the colour scale.
        quantity: label of the colour bar.
    """
    axes = drawing.subplots(1, len(grids), squeeze=False, sharey=True)[0]
    most = max(1, int(drawing.get_figwidth() * 0.8 / len(grids) / _TICK)) if len(heads) > 1 else 1
    ticks = range(0, len(heads), -(-len(heads) // most))
    for axis, (said, grid) in zip(axes, grids.items(), strict=True):
        axis.set_facecolor("#d9d9d9")
        # 0 has no logarithm, so it is drawn as a value below the scale.
        shown = [[math.nan if value is None else max(value, norm.vmin / 10) for value in row] for row in grid]
        image = axis.imshow(shown, norm=norm, cmap=_colours(), aspect="auto", interpolation="nearest")
        axis.set_title(textwrap.fill(said, max(10, int(drawing.get_figwidth() / len(grids) / 0.15))))
        axis.set_xticks(ticks, [heads[tick] for tick in ticks], fontsize="small")
        axis.set_yticks(range(len(rows)), rows)
    zeros = norm.vmin > 0 and any(
        value is not None and value <= 0 for grid in grids.values() for row in grid for value in row
    )
    bar = drawing.colorbar(image, ax=list(axes), extend="min" if zeros else "neither")
    bar.set_label(f"{quantity} (white: 0)" if zeros else quantity)
    return axes


def _norm(colors: Any, values: Sequence[float], logarithmic: bool, limits: tuple[float, float] | None = None) -> Any:
    """The colour scale for these values, or between limits."""
    positive = [value for value in values if value > 0]
    if limits is not None:
        low, high = limits
        shown = positive if logarithmic else values
        if not low < high or (logarithmic and low <= 0) or any(not low <= value <= high for value in shown):
            reach = f", which reach from {min(shown):g} to {max(shown):g}" if shown else ""
            raise ConfigError(
                f"limits={limits!r}: the smaller one comes first, {'both are above 0, ' if logarithmic else ''}and all "
                f"values lie between them{reach}."
            )
        return colors.LogNorm(low, high) if logarithmic else colors.Normalize(low, high)
    if not (logarithmic and positive):
        return colors.Normalize(min([0.0, *values]), max([*values, 0.0]) or 1.0)
    low, high = min(positive), max(positive)
    return colors.LogNorm(low, high if high > low else 2 * low)


def _write(axis: Any, grid: Grid) -> None:
    """Write each value, from 0 to 1, into its cell."""
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            colour = "white" if value is not None and value < 0.6 else "black"
            axis.text(x, y, "-" if value is None else f"{value:.2f}", ha="center", va="center", color=colour)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _colours() -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"].with_extremes(bad=(0, 0, 0, 0), under="white")


def _matplotlib() -> tuple[Any, Any]:
    """matplotlib's `Figure` and `colors`; not pyplot, whose windows and backend belong to the user."""
    try:
        from matplotlib import colors
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'matplotlib>=3.9'") from error
    return Figure, colors
