"""Plots of results; they compute nothing that a table does not have. Each is made to be read at 900 pixels."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.looks import find_look

WIDTH = 9.0  # inches, so that a point of type is more than a pixel at 900 pixels
DPI = 150
ROW = 0.24  # inches that a row of a dot plot is high
COLUMNS = 2  # panels beside each other
ABOUT_ACROSS = "The dashed lines are full fine-tuning and the head alone."
ABOUT_DOTS = "Each marker is the mean over the seeds, each bar leads from the worst seed to the best."


class Dot(NamedTuple):
    """One row of a dot plot.

    Attributes:
        label: of the row; dots of one label share it.
        method: whose colour it has, see `looks`.
        scores: one per seed.
        hollow: whether the marker is.
    """

    label: str
    method: str
    scores: Sequence[float]
    hollow: bool = False


class Panel(NamedTuple):
    """One panel of a dot plot.

    Attributes:
        title: above it; the task is in it.
        along: what the scores are.
        groups: heading -> dots; an empty heading has no row.
        across: methods whose mean is also a line from the top to the bottom.
        bounds: values that are dotted lines from the top to the bottom.
    """

    title: str
    along: str
    groups: Mapping[str, Sequence[Dot]]
    across: Sequence[str] = ()
    bounds: Sequence[float] = ()


class Line(NamedTuple):
    """A line, or the scores of one place, which are drawn across the panel.

    Attributes:
        method: whose colour it has.
        points: places and the scores there, one per seed.
        across: whether the first point is drawn across the panel.
    """

    method: str
    points: Sequence[tuple[float, Sequence[float]]]
    across: bool = False


Lines = Mapping[str, Line]
Place = tuple[str, str]  # heading, label


def plot_dots(path: Path, panels: Sequence[Panel], title: str, hollow: Sequence[str] = ()) -> None:
    """Draw the scores of methods, a row for each method and a panel for each task.

    Panels beside each other have the same rows. A row of which a panel has no dot is empty there.

    Args:
        path: PNG file.
        panels: in order; two stand beside each other.
        title: above the panels.
        hollow: what filled and hollow markers are, where there are both.
    """
    beside = [panels[at : at + COLUMNS] for at in range(0, len(panels), COLUMNS)]
    rows = [_rows(each) for each in beside]
    heights = [ROW * len(places) + 0.9 for places in rows]
    with _figure(path, [len(each) for each in beside], title, sum(heights) + 0.5, heights) as axes:
        for axis_row, each, places in zip(axes, beside, rows, strict=True):
            for axis, panel in zip(axis_row, each, strict=True):
                _dots(axis, panel, places)
            for axis in axis_row[1:]:
                axis.tick_params(labelleft=False)
        if hollow and any(dot.hollow for panel in panels for dots in panel.groups.values() for dot in dots):
            _legend_of_fills(axes[0][0].figure, hollow)


def plot_along(
    path: Path, panels: Mapping[str, Lines], title: str, along: str, upright: Mapping[str, str], whole: bool = False
) -> None:
    """Draw scores along a linear axis, a panel for each task.

    Args:
        path: PNG file.
        panels: title, which names the task -> label -> line.
        title: above the panels.
        along: what the axis is.
        upright: title -> what the scores are.
        whole: whether places are whole numbers.
    """
    from matplotlib.ticker import MaxNLocator

    with _figure(path, [len(panels)], title, 4.2, [4.2]) as axes:
        for axis, (said, lines) in zip(axes[0], panels.items(), strict=True):
            for label, line in lines.items():
                _line(axis, label, line)
            axis.set(title=said, xlabel=along, ylabel=upright[said])
            if whole:
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
        handles, labels = axes[0][0].get_legend_handles_labels()
        axes[0][0].figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def plot_matrices(
    path: Path, panels: Mapping[str, Sequence[Sequence[float | None]]], names: Sequence[str], title: str
) -> None:
    """Draw square, symmetric tables of correlations in hundredths as heat maps with one range of colours.

    The diagonal, which is 100 everywhere, is left out of the range and out of the pictures.

    Args:
        path: PNG file.
        panels: title -> values (names, names); None is left empty.
        names: of the rows and of the columns.
        title: above the panels.
    """
    others = [
        abs(value)
        for values in panels.values()
        for y, row in enumerate(values)
        for x, value in enumerate(row)
        if x != y and value is not None
    ]
    largest = max(others, default=1.0) or 1.0
    with _figure(path, [len(panels)], title, 3.3, [3.3]) as axes:
        for axis, (said, values) in zip(axes[0], panels.items(), strict=True):
            shown = [
                [math.nan if value is None or x == y else value for x, value in enumerate(row)]
                for y, row in enumerate(values)
            ]
            axis.set_facecolor("#d9d9d9")
            image = axis.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest)
            for y, row in enumerate(shown):
                for x, value in enumerate(row):
                    text = "" if math.isnan(value) else f"{round(value)}"
                    dark = abs(value) > 0.6 * largest
                    axis.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
            axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(len(names)), names)
            axis.set_title(said)
        for axis in axes[0][1:]:
            axis.tick_params(labelleft=False)
        bar = axes[0][0].figure.colorbar(image, ax=list(axes[0]), shrink=0.7)
        bar.set_label("in hundredths; grey: with itself")


def _rows(panels: Sequence[Panel]) -> list[Place]:
    """Return headings and labels of panels beside each other, from the top to the bottom."""
    headings = dict.fromkeys(heading for panel in panels for heading in panel.groups)
    found: list[Place] = []
    for heading in headings:
        if heading:
            found.append((heading, ""))
        labels = dict.fromkeys(dot.label for panel in panels for dot in panel.groups.get(heading, ()))
        found += [(heading, label) for label in labels]
    return found


def _dots(axis: Any, panel: Panel, places: Sequence[Place]) -> None:
    """Draw one panel; the mean is a marker, and a bar leads from the worst seed to the best."""
    at = {place: number for number, place in enumerate(places)}
    for heading, dots in panel.groups.items():
        for dot in dots:
            look, mean = find_look(dot.method), statistics.mean(dot.scores)
            twins = sum(other.label == dot.label for other in dots) > 1
            y = at[heading, dot.label] + (0.18 if dot.hollow else -0.18) * twins
            axis.errorbar(
                mean,
                y,
                xerr=[[mean - min(dot.scores)], [max(dot.scores) - mean]],
                fmt=look.marker,
                color=look.colour,
                mfc="white" if dot.hollow else look.colour,
                mec=look.colour if dot.hollow else "black",
                mew=1.2 if dot.hollow else 0.5,
                markersize=6.5,
                elinewidth=1.8,
                capsize=2.5,
            )
            if dot.method in panel.across and not dot.hollow:
                axis.axvline(mean, color=look.colour, linestyle="--", linewidth=1, alpha=0.6, zorder=0)
    for bound in panel.bounds:
        axis.axvline(bound, color="black", linestyle=":", linewidth=1.2, zorder=0)
    names = [label or heading for heading, label in places]
    axis.set_yticks(range(len(places)), names)
    for name, (_, label) in zip(axis.get_yticklabels(), places, strict=True):
        if not label:
            name.set_fontweight("bold")
    axis.set_ylim(len(places) - 0.4, -0.6)
    axis.set(title=panel.title, xlabel=panel.along)
    axis.grid(alpha=0.3)


def _legend_of_fills(figure: Any, said: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "black"}
    handles = [Line2D([], [], mfc=fill, **look) for fill in ("black", "white")]
    figure.legend(handles, said, loc="outside lower center", ncols=2, frameon=False)


def _line(axis: Any, label: str, line: Line) -> None:
    look = find_look(line.method)
    means = [statistics.mean(scores) for _, scores in line.points]
    if line.across:
        scores = line.points[0][1]
        axis.axhspan(min(scores), max(scores), color=look.colour, alpha=0.12, linewidth=0)
        axis.axhline(means[0], color=look.colour, linestyle="--", label=label)
        return
    below = [mean - min(scores) for mean, (_, scores) in zip(means, line.points, strict=True)]
    above = [max(scores) - mean for mean, (_, scores) in zip(means, line.points, strict=True)]
    places = [place for place, _ in line.points]
    style = {"fmt": f"{look.marker}-", "color": look.colour, "capsize": 3, "markersize": 7}
    axis.errorbar(places, means, yerr=[below, above], label=label, **style)


@contextmanager
def _figure(
    path: Path, counts: Sequence[int], title: str, height: float, heights: Sequence[float]
) -> Iterator[list[list[Any]]]:
    """Make rows of panels as wide as the page, and write them after they are drawn.

    Args:
        path: PNG file.
        counts: panels of each row.
        title: above all.
        height: of the figure, in inches.
        heights: of the rows, in any unit.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(WIDTH, height), layout="constrained")
    try:
        most = max(counts)
        grid = figure.add_gridspec(len(counts), most, height_ratios=heights)
        yield [[figure.add_subplot(grid[y, x]) for x in range(count)] for y, count in enumerate(counts)]
        figure.suptitle(title)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    finally:
        pyplot.close(figure)
