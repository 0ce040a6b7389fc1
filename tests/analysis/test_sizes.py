"""Magnitudes and outliers as plain Python counts them, and how many outliers masks choose by chance."""

import importlib
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_lntune.analysis import Checkpoint, find_outliers, magnitude, outlier_overlap, outliers
from peft_lntune.architectures.components import find_components, group_by_place
from peft_lntune.errors import ConfigError
from tests import adapted
from tests.cases import build


def expected(values):
    return (
        len(values),
        math.fsum(map(abs, values)) / len(values),
        statistics.stdev(values) if len(values) > 1 else None,
        max(map(abs, values)),
    )


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
def test_against_plain_python(family, layers, monkeypatch):
    monkeypatch.setattr(importlib.import_module("peft_lntune.analysis.pooling"), "CHUNK", 100)
    model = adapted.build(family)
    tensors = dict(model.named_parameters())
    places = find_components(tensors)
    norms = {f"{name}.{p}" for name in adapted.norm_names(model) for p in ("weight", "bias")}
    rest = [n for n, place in places.items() if place.parameter == "weight" and n not in norms]
    rest = [abs(value) for name in rest for value in tensors[name].flatten().tolist()]
    typical = math.fsum(rest) / len(rest)
    table = magnitude(model, layers=layers)
    groups = group_by_place(places, layers=layers)
    assert len(groups) == len(table.rows)
    for row, (place, names) in zip(table.rows, groups.items(), strict=True):
        assert row[:-5] == (tuple(place) if layers else (place.component, place.parameter))
        wanted = expected([value for name in names for value in tensors[name].flatten().tolist()])
        assert row[-5] == wanted[0]
        assert row[-4:-1] == pytest.approx(wanted[1:], rel=1e-9, abs=1e-12)
        assert row[-1] == pytest.approx(wanted[1] / typical, rel=1e-9)


def test_norms_stand_out():
    table = magnitude(build("bert"), layers=False)
    over = dict(zip(zip(table.column("component"), table.column("parameter"), strict=True), table.column("over_others"), strict=True))  # fmt: skip # noqa: E501
    assert over["FFN norm", "weight"] > 20
    assert 0.5 < over["query", "weight"] < 2


@pytest.mark.parametrize(
    ("tensors", "row"),
    [
        ({"w": torch.tensor([2.0])}, (1, 2.0, None, 2.0, 1.0)),
        ({"w": torch.ones(0)}, (0, None, None, 0.0, None)),
        ({"norm.weight": torch.ones(2)}, (2, 1.0, 0.0, 1.0, None)),
        ({"w.bias": torch.zeros(2)}, (2, 0.0, 0.0, 0.0, None)),
    ],
)
def test_edges(tensors, row):
    assert magnitude(tensors).rows[0][3:] == row


@pytest.mark.parametrize(
    "name", ["h.0.ln_1", "ln_f", "input_layernorm", "LayerNorm", "norm1", "q_norm", "x.ln1", "x.ln"]
)
def test_norms_of_unknown_role_are_norms(name):
    tensors = {f"{name}.weight": torch.ones(2), "dense.weight": torch.full((2, 2), 0.5)}
    assert dict(zip(tensors, magnitude(tensors).column("over_others"), strict=True))[f"{name}.weight"] == 2.0


# Outliers.


def far(values, deviations=3.0):
    mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0
    return [std > 0 and abs(value - mean) > deviations * std for value in values]


@given(
    st.lists(st.sampled_from([0.0, 1.0, 1.1, -1.0, 50.0]), min_size=1, max_size=60), st.sampled_from([1.0, 2.5, 3.0])
)
@settings(max_examples=80, deadline=None)
def test_outliers_against_plain_python(values, deviations):
    tensor = torch.tensor(values, dtype=torch.float64)
    found = find_outliers({"w": tensor}, deviations=deviations)["w"].tolist()
    mean, std = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0
    clear = [abs(abs(value - mean) - deviations * std) > 1e-9 for value in values]
    assert [f for f, c in zip(found, clear, strict=True) if c] == [
        w for w, c in zip(far(values, deviations), clear, strict=True) if c
    ]


def planted():
    torch.manual_seed(0)
    tensors = {f"h.{layer}.norm.{p}": torch.randn(200).clamp(-2.9, 2.9) for layer in (0, 1) for p in ("weight", "bias")}
    tensors["h.0.norm.weight"][[7, 90]] = torch.tensor([12.0, -9.0])
    tensors["h.1.norm.bias"][3] = 30.0
    tensors["h.0.dense.weight"] = torch.randn(20, 20)
    tensors["h.0.dense.weight"][2, 5] = 40.0
    return tensors


def test_positions_and_values():
    tensors = planted()
    table = outliers(tensors)
    assert table.column("tensor") == ["h.0.norm.weight", "h.0.norm.weight", "h.1.norm.bias"]
    assert table.column("position") == [7, 90, 3]
    assert table.column("value") == [12.0, -9.0, 30.0]
    own = tensors["h.0.norm.weight"].double()
    assert table.column("deviations")[1] == pytest.approx(float((-9 - own.mean()) / own.std()))
    assert table.rows[2][1:4] == ("h.norm", 1, "bias")


def test_masks_have_the_shapes_of_the_vectors():
    tensors = planted()
    found = find_outliers(tensors)
    assert list(found) == [name for name, value in tensors.items() if value.dim() == 1]
    assert found["h.0.norm.weight"].nonzero().flatten().tolist() == [7, 90]
    assert not found["h.1.norm.weight"].any()
    assert all(mask.dtype == torch.bool for mask in found.values())


def test_named_parameters_of_any_shape():
    found = find_outliers(planted(), ["h.0.dense.weight"])
    assert found["h.0.dense.weight"].nonzero().tolist() == [[2, 5]]
    assert outliers(planted(), ["h.0.dense.weight"]).column("position") == [45]


def test_equal_entries_have_no_outliers():
    # No sum of three 0.1 is 0.3, so their mean is none of them.
    assert outliers({"w": torch.full((3,), 0.1, dtype=torch.float64)}, deviations=0.5).rows == ()


def test_files(tmp_path):
    save_file(planted(), tmp_path / "model.safetensors")
    assert sorted(outliers(tmp_path).rows) == sorted(outliers(planted()).rows)
    assert sorted(magnitude(tmp_path).rows, key=str) == sorted(magnitude(planted()).rows, key=str)


def test_of_a_file_only_vectors_are_read(tmp_path, monkeypatch):
    save_file(planted(), tmp_path / "model.safetensors")
    read, keep = [], Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: (read.append(name), keep(self, name))[1])
    found = find_outliers(tmp_path)
    assert sorted(read) == sorted(found)  # and each of them once


# Outliers and masks.


def mask(chosen, size=200):
    found = torch.zeros(size, dtype=torch.bool)
    found[list(chosen)] = True
    return found


def test_overlap_counts_and_chance():
    masks = {"h.0.norm.weight": mask([7, 8, 9, 10]), "h.1.norm.bias": mask(range(20)), "h.0.norm.bias": mask([])}
    table = outlier_overlap(find_outliers(planted()), masks)
    rows = {row[:3]: row[3:] for row in table.rows}
    assert rows["h.norm", 0, "weight"] == (200, 2, 4, 1, 0.5, 0.02, 0.02)
    assert rows["h.norm", 0, "bias"] == (200, 0, 0, 0, None, 0.0, None)
    assert rows["h.norm", 1, "bias"] == (200, 1, 20, 1, 1.0, 0.1, 0.1)
    # Of three outliers, two lie where 4 of 200 are chosen, and one where 20 are.
    assert rows["all", None, None] == (600, 3, 24, 2, 2 / 3, 24 / 600, pytest.approx((2 * 0.02 + 0.1) / 3))
    assert list(rows)[-1] == ("all", None, None)


def test_chance_is_what_random_masks_give():
    found = find_outliers(planted())
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(400):
        masks = {name: torch.rand(200, generator=generator) < 0.3 for name in found}
        shares.append(outlier_overlap(found, masks).rows[-1])
    assert statistics.mean(row[7] for row in shares) == pytest.approx(0.3, abs=0.05)
    assert statistics.mean(row[8] for row in shares) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({}, "they name 'nothing'"),
        ({"other": mask([1])}, "no parameter with the 4 .* they name 'other'"),
        ({"h.0.norm.weight": mask([1], 3)}, r"shape \(200,\), but is torch.bool of shape \(3,\)"),
        ({"h.0.norm.weight": torch.ones(200)}, "but is torch.float32"),
    ],
)
def test_masks_of_another_model(masks, said):
    with pytest.raises(ConfigError, match=said):
        outlier_overlap(find_outliers(planted()), masks)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: magnitude({}), "the source is empty"),
        (lambda: magnitude({"w": torch.tensor([math.inf])}), "w has NaN or infinite entries"),
        (lambda: find_outliers({"w": torch.tensor([1.0, math.nan])}), "w has NaN or infinite entries"),
        (lambda: find_outliers(planted(), ["x", "y"]), r"parameter 'x' \(and 1 more\) not found among 5"),
        (lambda: find_outliers({"w": torch.ones(2, 2)}), "no tensor has one dimension"),
        (lambda: outliers(planted(), deviations=0), "deviations=0 should be above 0"),
    ],
)
def test_errors(call, said):
    with pytest.raises(ConfigError, match=said):
        call()
