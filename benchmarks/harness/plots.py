"""Plots of results; they compute nothing that a table does not have."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Points of one arm keep their colour and marker in every panel.
COLOURS = ("#1b6ca8", "#d1495b", "#6a994e", "#8d6cab", "#e09f3e", "#5c677d", "#3aafa9", "#a44a3f")
MARKERS = "osD^vPX*"
SMALLEST = 1000  # below this many entries the axis is linear, so that an arm with none of its own has a place
Scores = Mapping[str, Mapping[str, Sequence[float]]]


def plot_against_size(path: Path, panels: Mapping[str, Scores], sizes: Mapping[str, int], title: str) -> None:
    """Draw mean and reach of each arm against the entries it tunes, one panel a task.

    Args:
        path: PNG file.
        panels: task -> dtype of the base -> arm -> scores in per cent, one a seed; the first dtype is drawn with
            filled markers, the others with hollow ones.
        sizes: arm -> tuned entries beside the head.
        title: above the panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.6 * len(panels), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (task, scores) in zip(axes[0], panels.items(), strict=True):
        for number, dtype in enumerate(scores):
            _draw(axis, scores[dtype], sizes, hollow=number > 0)
        axis.set_xscale("symlog", linthresh=SMALLEST)
        largest = max([SMALLEST, *sizes.values()])
        axis.set_xlim(-SMALLEST / 2, 3 * largest)
        axis.set_xticks([0, *(10**power for power in range(3, len(str(largest))))])
        axis.set(title=task, xlabel="tuned entries beside the head", ylabel="accuracy, %")
        axis.grid(alpha=0.3)
    named = {label: drawn for axis in axes[0] for drawn, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _draw(axis: Any, scores: Mapping[str, Sequence[float]], sizes: Mapping[str, int], hollow: bool) -> None:
    """Draw one point an arm, with bars to its best and its worst seed."""
    for arm, values in scores.items():
        if not values:
            continue
        number = list(sizes).index(arm)
        colour = COLOURS[number % len(COLOURS)]
        look = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "mfc": "white" if hollow else colour}
        mean = statistics.mean(values)
        reach = [[mean - min(values)], [max(values) - mean]]
        label = f"{arm}, bf16 base" if hollow else arm
        # Arms of one size stand beside each other; the axis is logarithmic, so a factor is a shift.
        twins = [name for name in sizes if sizes[name] == sizes[arm]]
        shift = 1.3 ** (2 * twins.index(arm) + hollow - len(twins) + 0.5)
        axis.errorbar(
            [sizes[arm] * shift], [mean], yerr=reach, capsize=3, linestyle="none", markersize=7, label=label, **look
        )
