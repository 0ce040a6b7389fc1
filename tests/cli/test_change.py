"""Change between saved models, and between a model and an adapter."""

import pytest
import transformers as hf
from peft import PeftModel

from peft_lntune.analysis import parameter_change
from peft_lntune.cli.change import change_between
from tests.analysis.test_change import moved
from tests.analysis.test_plots import png_size
from tests.cli.saved import refused, run, save_adapter, save_model


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def tuned(model, tmp_path):
    moved(hf.BertForSequenceClassification.from_pretrained(model)).save_pretrained(
        tmp_path / "tuned", max_shard_size="5KB"
    )
    return tmp_path / "tuned"


def rows(table):
    return sorted(table.rows, key=str)


def test_two_models(model, tuned, tmp_path):
    one, two = map(hf.BertForSequenceClassification.from_pretrained, (model, tuned))
    wanted = parameter_change(one, two)
    assert rows(change_between(str(model), str(tuned))) == rows(wanted)
    result = run("change", model, tuned, "--csv", tmp_path / "c.csv", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0
    assert result.stdout == f"{change_between(str(model), str(tuned))}\n"
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + len(wanted.rows)
    assert png_size(tmp_path / "p.png")[0] > 300


def test_layers_as_one(model, tuned):
    one, two = map(hf.BertForSequenceClassification.from_pretrained, (model, tuned))
    assert rows(change_between(str(model), str(tuned), layers=False)) == rows(parameter_change(one, two, layers=False))
    assert run("change", model, tuned, "--no-layers").stdout.split()[:2] == ["component", "parameter"]


def test_an_adapter(model, tmp_path):
    adapter = save_adapter(tmp_path / "a", model)
    base = hf.BertForSequenceClassification.from_pretrained(model)
    wanted = parameter_change(
        base, PeftModel.from_pretrained(hf.BertForSequenceClassification.from_pretrained(model), adapter)
    )
    found = change_between(str(model), str(adapter))
    assert rows(found) == rows(wanted)
    changed = {row[0] for row in found.rows if row[4]}
    assert changed == {"embedding norm", "attention norm", "FFN norm", "head"}


def test_a_head_that_the_model_does_not_have_has_not_moved(tmp_path):
    model = save_model(tmp_path / "model", labels=None)
    table = change_between(str(model), str(save_adapter(tmp_path / "a", model)))
    assert "head" not in table.column("component")
    assert any(table.column("mean_change"))


def test_heads_of_other_sizes(model, tmp_path):
    other = save_model(tmp_path / "other", labels=5)
    assert refused(run("change", model, other), "classifier.bias is (3,) before and (5,) after")
    result = run("change", model, other, "--shared")
    assert result.exit_code == 0
    assert "head" not in result.stdout
