"""Plots of results: one colour for each method, and every point where its score is."""

import re
from itertools import combinations
from pathlib import Path

import numpy
import pytest

from benchmarks.harness import plots
from benchmarks.harness.arms import ARMS
from benchmarks.harness.looks import FAMILIES, LOOKS, find_look

# Who sees no red, no green, no blue: linear RGB as they see it (Machado, Oliveira and Fernandes, 2009, severity 1).
SEEN = {
    "all colours": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
NOTICEABLE = 2.3  # in CIELAB, what a person with the two side by side can just tell apart


def lab(colour: str, seen: str) -> numpy.ndarray:
    """CIELAB of `#rrggbb` under daylight."""
    srgb = numpy.array([int(part, 16) / 255 for part in re.findall("[0-9a-f]{2}", colour)])
    linear = numpy.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = numpy.array(TO_XYZ) @ (numpy.array(SEEN[seen]) @ linear).clip(0, 1) / [0.9505, 1, 1.089]
    root = numpy.where(xyz > 0.008856, numpy.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return numpy.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def distance(one: str, other: str, seen: str) -> float:
    return float(numpy.linalg.norm(lab(one, seen) - lab(other, seen)))


@pytest.mark.parametrize("seen", SEEN)
def test_families_are_told_apart_by_colour(seen: str) -> None:
    for (one, _, _), (other, _, _) in combinations(FAMILIES.values(), 2):
        assert distance(one, other, seen) > 4 * NOTICEABLE, (one, other)


def test_no_two_methods_have_one_colour() -> None:
    for one, other in combinations(LOOKS, 2):
        assert distance(LOOKS[one].colour, LOOKS[other].colour, "all colours") > NOTICEABLE, (one, other)


def test_every_method_that_is_reported_has_a_colour() -> None:
    timed = {"plain", "road"}  # in tables of costs alone
    assert set(ARMS) - timed <= set(LOOKS)
    with pytest.raises(ValueError, match=r"'lune' has no colour. Add the method to one of the families"):
        find_look("lune")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The figures that are made."""
    from matplotlib.figure import Figure

    figures: list[object] = []
    keep = Figure.savefig

    def save(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        keep(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def test_dots_stand_where_their_scores_are(tmp_path: Path, drawn: list) -> None:
    first = {"": [plots.Dot("ln", "ln", [80, 82]), plots.Dot("ln", "ln", [70], hollow=True)]}
    second = {"": [plots.Dot("full", "full", [90])], "one tenth": [plots.Dot("ln", "ln", [60, 61, 68])]}
    panels = [plots.Panel(task, "accuracy, %", groups, ("full",)) for task, groups in (("a", first), ("b", second))]
    plots.plot_dots(tmp_path / "p.png", panels, "Accuracy", ("float32 base", "bf16 base"))
    left, right = drawn[0].axes
    assert (left.get_title(), right.get_title()) == ("a", "b")
    assert [name.get_text() for name in left.get_yticklabels()] == ["ln", "full", "one tenth", "ln"]
    means = [float(container[0].get_xdata()[0]) for axis in (left, right) for container in axis.containers]
    assert means == [81, 70, 90, 63]
    heights = [float(container[0].get_ydata()[0]) for axis in (left, right) for container in axis.containers]
    assert [round(height) for height in heights] == [0, 0, 1, 3]
    assert heights[0] < heights[1]  # the two of one row
    bars = right.containers[1][2][0].get_segments()[0][:, 0]
    assert bars.tolist() == [60, 68]


def test_names_and_legend_stand_clear_of_titles(tmp_path: Path, drawn: list) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    dots = [plots.Dot("a name as long as any of them", "ln", [1, 2]), plots.Dot("ln", "ln", [3], hollow=True)]
    plots.plot_dots(tmp_path / "p.png", [plots.Panel("task", "loss", {"": dots})], "One panel", ("filled", "hollow"))
    lines = {"ln": plots.Line("ln", [(0, [1, 2]), (1, [2])]), "full": plots.Line("full", [(0, [3])], across=True)}
    plots.plot_along(tmp_path / "p.png", {"task": lines}, "One panel", "layer", {"task": "loss"}, whole=True)
    plots.plot_matrices(tmp_path / "p.png", {"task": [[100, 4], [4, None]]}, ["one", "other"], "One panel")
    for figure in drawn:
        renderer = FigureCanvasAgg(figure).get_renderer()
        title = figure._suptitle.get_window_extent(renderer)
        boxes = [axis.get_tightbbox(renderer) for axis in figure.axes]
        boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
        assert not any(title.overlaps(box) for box in boxes)
        assert all(box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)
    assert len(drawn) == 3


def test_matrices_share_one_range_without_their_diagonals(tmp_path: Path, drawn: list) -> None:
    plots.plot_matrices(
        tmp_path / "p.png", {"a": [[100, 4], [4, 100]], "b": [[100, -30], [-30, 100]]}, ["x", "y"], "Correlation"
    )
    *panels, _ = drawn[0].axes
    assert {panel.get_images()[0].get_clim() for panel in panels} == {(-30, 30)}
    assert panels[0].get_images()[0].get_array().mask.tolist() == [[True, False], [False, True]]
