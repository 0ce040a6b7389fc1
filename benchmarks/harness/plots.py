"""Plots of results; they compute nothing that a table does not have."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

# Points of one arm keep their colour and marker in every panel.
COLOURS = ("#1b6ca8", "#d1495b", "#6a994e", "#8d6cab", "#e09f3e", "#5c677d", "#3aafa9", "#a44a3f")
MARKERS = "osD^vPX*"
Scores = Mapping[str, Sequence[float]]


def plot_against_size(path: Path, panels: Mapping[str, Scores], sizes: Mapping[str, int], title: str) -> None:
    """Draw mean and spread of each arm against the entries it tunes, one panel a task, on a log scale.

    Args:
        path: PNG file.
        panels: task -> arm -> scores in per cent, one a seed; an arm without scores is left out.
        sizes: arm -> trained entries, the head counted.
        title: above the panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = list(dict.fromkeys(arm for scores in panels.values() for arm in scores if scores[arm]))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False, layout="constrained"
    )
    for axis, (task, scores) in zip(axes[0], panels.items(), strict=True):
        for number, arm in enumerate(arms):
            if not scores.get(arm):
                continue
            mean = statistics.mean(scores[arm])
            reach = [[mean - min(scores[arm])], [max(scores[arm]) - mean]]
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            axis.errorbar(
                [sizes[arm]], [mean], yerr=reach, capsize=3, linestyle="none", markersize=7, label=arm, **look
            )
        axis.set_xscale("log")
        axis.set_title(task)
        axis.set_xlabel("trained entries, head included")
        axis.set_ylabel("accuracy, %")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
