"""Magnitudes and outliers from the command line, and what the mask of a saved adapter tunes of them."""

import csv

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from peft_lntune import BottleneckConfig, FisherLNConfig, LNTuningConfig, UnifiedConfig
from peft_lntune.analysis import find_outliers, magnitude, outlier_overlap, outliers
from peft_lntune.analysis.sizes import SIZES
from peft_lntune.cli.magnitude import magnitude_of, overlap_with_adapter
from tests.analysis.test_plots import png_size
from tests.cli.saved import refused, run, save_adapter, save_model

PLANTED = {
    ("bert.embeddings.LayerNorm.weight", 3): 30.0,
    ("bert.encoder.layer.1.output.LayerNorm.bias", 5): -8.0,
    ("bert.encoder.layer.0.output.LayerNorm.weight", 0): 9.0,
    ("bert.encoder.layer.0.attention.self.query.bias", 7): 4.0,
}
# Two equal values in a vector of 16 lie 2.6 standard deviations from its mean.
NEAR = {("bert.embeddings.LayerNorm.bias", 0): 1.0, ("bert.embeddings.LayerNorm.bias", 1): 1.0}


@pytest.fixture
def model(tmp_path):
    """A classifier with four outliers, three of them in norms, and two that are nearly so."""
    folder = save_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for (name, position), value in (PLANTED | NEAR).items():
        tensors[name][position] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def masks():
    """Two of the three outliers of norms, and four entries more, in three of the ten parameters of norms."""
    chosen = {
        "bert.embeddings.LayerNorm.weight": [3, 4, 5],
        "bert.encoder.layer.1.output.LayerNorm.bias": [5, 6],
        "bert.encoder.layer.1.output.LayerNorm.weight": [0],
    }
    return {name: torch.isin(torch.arange(16), torch.tensor(places)) for name, places in chosen.items()}


def written(file):
    with file.open() as opened:
        return list(csv.reader(opened))


def found(number, deviations):
    """The sentence below the table."""
    far = f"{deviations} standard deviations from the mean of their own vector"
    return f"{number} entries of gains and biases lie more than {far}."


def as_written(table):
    return [list(table.columns), *[["" if value is None else str(value) for value in row] for row in table.rows]]


@pytest.mark.parametrize("layers", [True, False])
def test_outliers_are_counted_beside_the_magnitudes(model, layers):
    wanted, table = magnitude(model, layers=layers), magnitude_of(model, layers=layers)
    assert table.columns == (*wanted.columns, "outliers")
    assert [row[:-1] for row in table.rows] == list(wanted.rows)
    key = ("component", "layer", "parameter") if layers else ("component", "parameter")
    counts = {tuple(place): number for *place, number in zip(*map(table.column, (*key, "outliers")), strict=True)}
    where = {"embedding norm": None, "FFN norm": 0, "query": 0}
    for component, layer in where.items():
        parameter = "bias" if component == "query" else "weight"
        assert counts[(component, layer, parameter) if layers else (component, parameter)] == 1
    assert counts[("query", 0, "weight") if layers else ("query", "weight")] is None
    assert counts[("attention norm", 1, "bias") if layers else ("attention norm", "bias")] == 0
    assert sum(number or 0 for number in counts.values()) == len(PLANTED)


def test_what_is_printed_and_written(model, tmp_path):
    files = {name: tmp_path / name for name in ("c.csv", "o.csv", "p.png")}
    result = run("magnitude", model, "--csv", files["c.csv"], "--outliers", files["o.csv"], "--plot", files["p.png"])
    assert result.exit_code == 0
    table = magnitude_of(model)
    assert result.stdout == f"{table}\n\n{found(4, 3)}\n"
    assert written(files["c.csv"]) == as_written(table)
    assert written(files["o.csv"]) == as_written(outliers(model))
    assert {(row[0], int(row[4])) for row in written(files["o.csv"])[1:]} == set(PLANTED)
    assert png_size(files["p.png"])[0] > 300


@pytest.mark.parametrize("measure", SIZES)
def test_every_measure_is_drawn(measure, model, tmp_path):
    assert run("magnitude", model, "--plot", tmp_path / "p.png", "--measure", measure).exit_code == 0
    assert png_size(tmp_path / "p.png")[0] > 300


def test_options(model):
    shown = run("magnitude", model / "model.safetensors", "--no-layers", "--deviations", 2).stdout
    assert shown.startswith(f"{magnitude_of(model, layers=False, deviations=2)}\n\n")
    assert shown.endswith(f"\n\n{found(6, 2)}\n")


@pytest.mark.parametrize(
    "config",
    [
        lambda: FisherLNConfig(task_type="SEQ_CLS", density=0.1),
        lambda: UnifiedConfig(task_type="SEQ_CLS", preset="prefix+mha-adapter+fisher-ln"),
    ],
    ids=["alone", "combined"],
)
def test_the_mask_of_an_adapter(config, model, tmp_path):
    adapter = save_adapter(tmp_path / "a", model, config=config(), masks=masks())
    result = run("magnitude", model, "--fisher-mask", adapter, "--overlap", tmp_path / "o.csv")
    assert result.exit_code == 0
    # The base model, not the adapted one; and parameters of which nothing is tuned count for what chance gives.
    base = hf.BertForSequenceClassification.from_pretrained(model)
    every = [name for name, _ in base.named_parameters() if "LayerNorm" in name]
    wanted = outlier_overlap(find_outliers(base), {n: masks().get(n, torch.zeros(16, dtype=torch.bool)) for n in every})
    assert overlap_with_adapter(str(model), str(adapter)) == wanted
    assert result.stdout.endswith(f"\n\n{found(4, 3)}\n\n{wanted}\n")
    assert written(tmp_path / "o.csv") == as_written(wanted)
    assert wanted.rows[-1][3:8] == (160, 3, 6, 2, 2 / 3)


def test_outliers_as_far_as_asked(model, tmp_path):
    adapter = save_adapter(tmp_path / "a", model, masks=masks())
    far, near = (overlap_with_adapter(str(model), str(adapter), deviations=number) for number in (3, 2))
    assert [far.rows[-1][4], near.rows[-1][4]] == [3, 5]
    assert run("magnitude", model, "--fisher-mask", adapter, "--deviations", 2).stdout.endswith(f"\n\n{near}\n")


def test_adapters_that_say_nothing_of_outliers(model, tmp_path):
    files = ["--csv", tmp_path / "c.csv", "--outliers", tmp_path / "o.csv"]
    for config in (LNTuningConfig(task_type="SEQ_CLS"), BottleneckConfig(task_type="SEQ_CLS")):
        whole = save_adapter(tmp_path / config.kind, model, config=config)
        assert refused(run("magnitude", model, "--fisher-mask", whole, *files), f"{whole} has no mask")
    masked = save_adapter(tmp_path / "masked", model, masks=masks())
    file = model / "model.safetensors"
    assert refused(run("magnitude", file, "--fisher-mask", masked, *files), "is a file, and the masks of an adapter")
    query = {"bert.encoder.layer.0.attention.self.query.weight": torch.eye(16, dtype=torch.bool)}
    config = LNTuningConfig(task_type="SEQ_CLS", target_modules=["query"], tune="weight")
    matrix = save_adapter(tmp_path / "matrix", model, config=config, masks=query)
    assert refused(run("magnitude", model, "--fisher-mask", matrix, *files), "the masks share no parameter with the")
    other = save_model(tmp_path / "other", num_hidden_layers=4)
    assert refused(run("magnitude", other, "--fisher-mask", masked, *files), "were chosen among 160 entries")
    assert refused(run("magnitude", model, "--fisher-mask", tmp_path / "none", *files), "none")
    assert not list(tmp_path.glob("*.csv"))
