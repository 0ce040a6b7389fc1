"""Each picture is written, shows what its table has, and names it; without matplotlib people learn what to install."""

import struct
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from peft_lntune.analysis import (
    Table,
    magnitude,
    off_overlap,
    overlap_matrix,
    parameter_change,
    plot_change,
    plot_magnitude,
    plot_overlap,
    plot_score_map,
    plot_sparsity,
    plots,
    score_map,
    sparsity,
)
from peft_lntune.errors import ConfigError
from tests.analysis.test_change import moved
from tests.cases import build

matplotlib = pytest.importorskip("matplotlib")


def change_table(family="bert"):
    return parameter_change(build(family), moved(build(family)))


def masks(*seeds):
    found = {}
    for seed in seeds:
        torch.manual_seed(seed)
        found[f"task {seed}"] = {"h.0.ln_1.weight": torch.rand(50) < 0.3, "h.1.ln_1.bias": torch.rand(50) < 0.1}
    return found


def sparsity_table(by="component"):
    keep = {f"h.{layer}.attn.c_proj.weight": torch.rand(9, 9) < 0.2 * layer for layer in range(4)}
    return sparsity(keep, {name: torch.rand(9, 9) < 0.5 for name in keep}, by=by)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made."""
    from matplotlib.figure import Figure

    figures = []
    keep = Figure.__init__

    def init(self, *args, **kwargs):
        keep(self, *args, **kwargs)
        figures.append(self)

    monkeypatch.setattr(Figure, "__init__", init)
    return figures


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def texts(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


DRAWINGS = {
    "change": lambda path: plot_change(change_table(), path),
    "relative change": lambda path: plot_change(change_table(), path, "relative_to_std"),
    "no change": lambda path: plot_change(parameter_change(build("t5"), build("t5")), path),
    "magnitude": lambda path: plot_magnitude(magnitude(build("bert")), path),
    "magnitude over the rest": lambda path: plot_magnitude(magnitude(build("t5")), path, "over_others"),
    "scores": lambda path: plot_score_map(score_map({"a.0.weight": torch.tensor([0.1, 3.0])}), path),
    "masks": lambda path: plot_score_map(score_map(masks(0)["task 0"]), path),
    "overlap": lambda path: plot_overlap(overlap_matrix(masks(0, 1, 2)), path),
    "sparsity": lambda path: plot_sparsity(sparsity_table(), path),
    "flipped": lambda path: plot_sparsity(sparsity_table(), path, "flipped"),
    "what is off": lambda path: plot_overlap(off_overlap(masks(0, 1, 2)), path),
    "overlap of one": lambda path: plot_overlap(overlap_matrix({"one and only task": masks(3)["task 3"]}), path),
}


@pytest.mark.parametrize("drawing", DRAWINGS)
def test_pictures(drawing, tmp_path, drawn):
    backend = matplotlib.get_backend(auto_select=False)
    DRAWINGS[drawing](tmp_path / "p.png")
    width, height = png_size(tmp_path / "p.png")
    assert width > 300
    assert height > 200
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert matplotlib.get_backend(auto_select=False) == backend  # the user's, in a notebook
    assert_inside(drawn[0])


def assert_inside(figure):
    """Nothing is clipped at the edges, and no two names of an axis lie on each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for axis in figure.axes:
        box = axis.get_tightbbox(renderer)
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1
        assert box.y1 <= figure.bbox.y1 + 1
        ticks = [label.get_window_extent(renderer) for label in axis.get_yticklabels() if label.get_text()]
        assert not any(a.overlaps(b) for a, b in pairwise(ticks))


def test_change_shows_the_table(tmp_path, drawn):
    table = change_table()
    plot_change(table, tmp_path / "p.png")
    weight, bias, bar = drawn[0].axes
    assert (weight.get_title(), bias.get_title()) == ("weight", "bias")
    assert texts(weight) == list(dict.fromkeys(table.column("component")))
    assert [label.get_text() for label in weight.get_xticklabels()] == ["none", "0", "1"]
    assert bar.get_ylabel() == "mean |change|"
    assert "change" in drawn[0].get_suptitle()
    for axis in (weight, bias):
        shown = axis.get_images()[0].get_array()
        for y, component in enumerate(texts(axis)):
            for x, layer in enumerate((None, 0, 1)):
                place = (component, layer, axis.get_title())
                row = [row for row in table.rows if row[:3] == place]
                assert shown.mask[y, x] if not row else shown[y, x] == row[0][4]


def test_magnitude_shows_its_measure(tmp_path, drawn):
    table = magnitude(build("bert"))
    plot_magnitude(table, tmp_path / "p.png", "largest")
    weight, _, bar = drawn[0].axes
    assert bar.get_ylabel() == "max |w| (white: 0)"
    shown = weight.get_images()[0].get_array()
    (query,) = [row for row in table.rows if row[:3] == ("query", 1, "weight")]
    assert shown[texts(weight).index("query"), 2] == query[table.columns.index("largest")]


def test_zeros_on_a_logarithmic_scale(tmp_path, drawn):
    plot_score_map(
        score_map({"a.0.weight": torch.tensor([0.0]), "a.1.weight": torch.tensor([2.0])}), tmp_path / "p.png"
    )
    panel, bar = drawn[0].axes
    image = panel.get_images()[0]
    zero, two = image.cmap(image.norm(image.get_array()))[0]
    assert tuple(zero) == (1, 1, 1, 1)
    assert tuple(two) != (1, 1, 1, 1)
    assert bar.get_ylabel() == "mean score (white: 0)"


def test_overlap_shows_the_table(tmp_path, drawn):
    table = overlap_matrix(masks(0, 1))
    plot_overlap(table, tmp_path / "p.png")
    left, right, _ = drawn[0].axes
    assert left.get_images()[0].get_array().tolist() == [table.column("task 0"), table.column("task 1")]
    assert right.get_images()[0].get_array()[0, 1] == table.column("task 1, by chance")[0]
    assert texts(left)[0].startswith("task 0\n(")


def test_overlap_of_what_is_off_has_both_controls(tmp_path, drawn):
    table = off_overlap(masks(0, 1))
    plot_overlap(table, tmp_path / "p.png")
    *panels, _ = drawn[0].axes
    ends = ("", ", by chance", ", by chance a tensor")
    assert [p.get_images()[0].get_array()[0, 1] for p in panels] == [table.column(f"task 1{end}")[0] for end in ends]
    assert texts(panels[0])[0].endswith("% off)")
    assert drawn[0].get_suptitle() == "Overlap of weights switched off between tasks"


@pytest.mark.parametrize("measure", ["sparsity", "sparsity_before", "flipped"])
def test_sparsity_shows_the_table(measure, tmp_path, drawn):
    table = sparsity_table()
    plot_sparsity(table, tmp_path / "p.png", measure)
    panel, bar = drawn[0].axes
    assert panel.get_images()[0].get_array()[0].tolist() == table.column(measure)
    assert bar.get_ylabel() == plots._SAID[measure]


def test_limits_make_pictures_comparable(tmp_path, drawn):
    plot_change(change_table(), tmp_path / "p.png", title="Tuned on sst2", limits=(1e-9, 10.0))
    assert drawn[0].axes[0].get_images()[0].get_clim() == (1e-9, 10.0)
    assert drawn[0].get_suptitle() == "Tuned on sst2\nMean |change| of each component and layer"
    plot_sparsity(sparsity_table(), tmp_path / "q.png", limits=(0, 2))
    assert drawn[1].axes[0].get_images()[0].get_clim() == (0, 2)


def test_pictures_are_no_wider_than_a_page(tmp_path, drawn):
    components = [f"{side} attention {part}" for side in ("encoder", "decoder") for part in ("query", "output norm")]
    rows = [(c, layer, p, 4, 0.5) for c in components for layer in range(48) for p in ("weight", "bias")]
    plot_score_map(Table(("component", "layer", "parameter", "entries", "mean_score"), rows), tmp_path / "p.png")
    assert drawn[0].get_figwidth() == pytest.approx(9.0)
    assert_inside(drawn[0])


def test_many_layers_are_named_with_gaps(tmp_path, drawn):
    rows = tuple(("query", layer, "weight", 4, 0.5) for layer in range(80))
    plot_score_map(Table(("component", "layer", "parameter", "entries", "mean_score"), rows), tmp_path / "p.png")
    assert len(drawn[0].axes[0].get_xticklabels()) <= 26
    assert_inside(drawn[0])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plot_change(change_table(), "p.png", "rank_mean_change"), "measure='rank_mean_change'"),
        (
            lambda: plot_change(parameter_change(build("bert"), build("bert"), layers=False), "p.png"),
            "no column 'layer'",
        ),
        (
            lambda: plot_magnitude(magnitude(build("bert")), "p.png", "entries"),
            "measure='entries': choose one of mean_",
        ),
        (lambda: plot_magnitude(magnitude(build("bert"), layers=False), "p.png"), "no column 'layer'"),
        (lambda: plot_change(change_table(), "p.png", limits=(1e-9, 1e-8)), "all values lie between them, which reach"),
        (lambda: plot_change(change_table(), "p.png", limits=(0, 1)), "both are above 0"),
        (lambda: plot_sparsity(sparsity_table(), "p.png", limits=(1, 0)), "the smaller one comes first"),
        (lambda: plot_score_map(change_table(), "p.png"), "last column of this one is 'rank_relative_to_std'"),
        (lambda: plot_overlap(change_table(), "p.png"), "no column 'task'"),
        (lambda: plot_sparsity(sparsity_table(), "p.png", "off"), "measure='off': choose one of sparsity, sparsity_b"),
        (lambda: plot_sparsity(change_table(), "p.png"), "choose one of those of a sparsity table"),
        (lambda: plot_sparsity(sparsity_table(by="tensor"), "p.png"), "no column 'component'"),
    ],
)
def test_errors(call, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        call()
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'matplotlib"):
        plot_overlap(overlap_matrix(masks(0, 1)), tmp_path / "p.png")


@pytest.mark.end_to_end
def test_importing_takes_neither_matplotlib_nor_pandas():
    # An older transformers brings pandas itself, through scikit-learn.
    code = """
import sys
import peft
before = set(sys.modules)
from peft_lntune.analysis import plots
print({'matplotlib', 'pandas'} & set(sys.modules) - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_every_column_that_is_drawn_has_its_words():
    columns = (
        set(change_table().columns)
        | set(magnitude(build("bert")).columns)
        | set(sparsity_table().columns)
        | {"mean_score", "sum_of_scores", "share_tuned", "entries_tuned"}
    )
    assert set(plots._SAID) <= columns
