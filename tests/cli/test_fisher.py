"""Masks from labelled texts: the same as in Python, from every kind of file, and what is refused."""

import csv
import json

import datasets
import pytest
import torch
import transformers as hf
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from peft_lntune import LNTuningConfig, fisher_scores, select
from peft_lntune.cli import main
from peft_lntune.cli.data import class_names, read_labels
from peft_lntune.cli.fisher import fisher_masks, load_classifier
from peft_lntune.errors import ConfigError, DataError
from peft_lntune.selection.scores import SCORES
from tests.cli.saved import refused, run, save_model, task, write_rows


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", labels=2)


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "train.jsonl", task())


def test_masks_scores_and_table(model, data, tmp_path):
    out, scores, table = tmp_path / "m.safetensors", tmp_path / "s.safetensors", tmp_path / "t.csv"
    result = run(
        *("fisher", "--model", model, "--data", data, "--density", 0.25, "--out", out, "--scores", scores),
        *("--csv", table, "--plot", tmp_path / "shares.png"),
    )
    assert result.exit_code == 0
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(model)
    tokens = hf.AutoTokenizer.from_pretrained(model)([row["text"] for row in task()], return_tensors="pt", padding=True)
    wanted = fisher_scores(loaded, [{**tokens, "labels": torch.tensor([row["label"] for row in task()])}])
    found, masks = load_file(scores), load_file(out)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)
    assert all(torch.equal(masks[name], mask) for name, mask in select(found, density=0.25).items())
    with safe_open(out, framework="pt") as opened:
        source = json.loads(opened.metadata()["mask_source"])
    assert source == {
        "made": "fisher",
        "kind": "empirical",
        "samples": 12,
        "seed": 0,
        "density": 0.25,
        "scope": "global",
    }
    tuned = sum(int(mask.sum()) for mask in masks.values())
    assert f"{tuned:,} entries (25.0%) chosen by 12 samples" in result.stdout
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["tuned"]) for row in rows) == tuned
    assert {row["component"] for row in rows} == {"embedding norm", "attention norm", "FFN norm"}
    first = wanted["bert.embeddings.LayerNorm.weight"]
    assert float(rows[0]["mean_score"]) == pytest.approx(float(first.mean()), rel=1e-4)


def test_at_most_so_many_per_norm(model, data, tmp_path):
    out, scores = tmp_path / "m.safetensors", tmp_path / "s.safetensors"
    options = ("--density", 1, "--max-per-norm", 5, "--out", out, "--scores", scores, "--json")
    result = run("fisher", "--model", model, "--data", data, *options)
    assert result.exit_code == 0
    masks = load_file(out)
    wanted = select(load_file(scores), density=1, max_per_norm=5)
    assert all(torch.equal(masks[name], mask) for name, mask in wanted.items())
    per_norm = {name.rpartition(".")[0]: 0 for name in masks}
    for name, mask in masks.items():
        per_norm[name.rpartition(".")[0]] += int(mask.sum())
    assert set(per_norm.values()) == {5}
    assert json.loads(result.stdout)["source"]["max_per_norm"] == 5
    none = run("fisher", "--model", model, "--data", data, "--max-per-norm", 0, "--out", out)
    assert none.exit_code == 2


def test_the_masks_fit_an_adapter(model, data, tmp_path):
    assert (
        run("fisher", "--model", model, "--data", data, "--count", 7, "--out", tmp_path / "m.safetensors").exit_code
        == 0
    )
    base = hf.AutoModelForSequenceClassification.from_pretrained(model)
    peft_model = get_peft_model(base, LNTuningConfig())
    peft_model.set_masks(load_file(tmp_path / "m.safetensors"))
    assert sum(p.numel() for p in peft_model.parameters() if p.requires_grad) == 7


def test_settings_reach_the_scores(model):
    texts, labels = [(row["text"],) for row in task()], [row["label"] for row in task()]
    loaded, tokenizer, *_ = load_classifier(str(model), labels)
    options = {"progress": False}
    plain = fisher_masks(loaded, tokenizer, texts, labels, **options)
    small = fisher_masks(loaded, tokenizer, texts, labels, batch_size=5, **options)
    name = next(iter(plain.scores))
    torch.testing.assert_close(small.scores[name], plain.scores[name])
    few = fisher_masks(loaded, tokenizer, texts, labels, num_samples=3, seed=1, **options)
    assert few.source["samples"] == 3
    assert not torch.allclose(few.scores[name], plain.scores[name], rtol=1e-3, atol=0)
    exact = fisher_masks(loaded, tokenizer, texts, labels, kind="exact", **options)
    assert not torch.equal(exact.scores[name], plain.scores[name])
    each = fisher_masks(loaded, tokenizer, texts, labels, density=0.25, scope="tensor", **options)
    assert {int(mask.sum()) for mask in each.masks.values()} == {4}
    short = fisher_masks(loaded, tokenizer, texts, labels, max_length=2, **options)
    assert not torch.allclose(short.scores[name], plain.scores[name], rtol=1e-3, atol=0)


def test_a_pair_from_the_command_line(model, tmp_path):
    rows = [{"p": "the film", "h": "is good", "gold": row % 2} for row in range(4)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    columns = ["--text-column", "p", "--text-column", "h", "--label-column", "gold"]
    assert run("fisher", "--model", model, "--data", data, *columns, "--out", tmp_path / "m.safetensors").exit_code == 0
    assert refused(
        run("fisher", "--model", model, "--data", data),
        "has the columns p, h, gold; wanted are premise, hypothesis, label or",
    )


def test_what_was_understood_is_said(tmp_path):
    body = save_model(tmp_path / "body", labels=None)
    data = write_rows(
        tmp_path / "d.jsonl", [{"text": f"the film {i}", "label": ["x|y", "x", "y"][i % 3]} for i in range(6)]
    )
    options = ["--model", body, "--data", data, "--out", tmp_path / "m.safetensors"]
    assert refused(run("fisher", *options), "'x|y', which looks like several classes. Say --label-separator '|'")
    said = run("fisher", *options, "--label-separator", "|", "--max-length", 2).stderr
    assert f"data: 6 rows of {data}; texts in text, 6 of them cut at 2 tokens; " in said
    assert "labels: 2 classes, several per row: x (4), y (4)" in said


@pytest.mark.parametrize(
    "own", [{}, {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}], ids=["no names", "names"]
)
def test_names_of_classes_that_come_with_the_data(own, model, tmp_path):
    config = hf.AutoConfig.from_pretrained(model)
    config.update(own)
    config.save_pretrained(model)
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}, features=names)
    labels = load_classifier(str(model), read_labels(rows, ["label"], "d"), names=class_names(rows, "label"))[2]
    assert labels == ([0, 1] if own else [1, 0])  # by the names of the head; without names, by the data's numbers


# Labels.


@pytest.mark.parametrize(
    ("labels", "encoded", "classes"),
    [
        ([0, 2, 1], [0, 2, 1], 3),
        (["0", "1"], [0, 1], 2),
        (["no", "yes", "no"], [0, 1, 0], 2),
        ([0.5, 1.0], [0.5, 1.0], 1),
        (["0.5", "3"], [0.5, 3.0], 1),
        ([True, False], [1, 0], 2),
    ],
)
def test_labels_of_a_fresh_head(labels, encoded, classes, tmp_path):
    body = save_model(tmp_path / "body", labels=None)
    loaded, _, found, _ = load_classifier(str(body), labels)
    assert found == encoded
    assert [type(label) for label in found] == [type(label) for label in encoded]
    assert loaded.config.num_labels == classes


def test_a_fresh_head_is_seeded(tmp_path):
    body = save_model(tmp_path / "body", labels=None)
    state = torch.get_rng_state()
    heads = [load_classifier(str(body), [0, 1], seed)[0].classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_names_that_the_head_knows(model):
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}
    (model / "config.json").write_text(json.dumps(config))
    assert load_classifier(str(model), ["no", "yes"])[2] == [1, 0]
    with pytest.raises(DataError, match="the model's head knows yes, no, and the data has maybe, no"):
        load_classifier(str(model), ["no", "maybe"])


@pytest.mark.parametrize(
    ("labels", "said"),
    [([0, 5], "the data has 6 classes, and the head of .* 2"), ([-1, 0], "counted from 0, but that of row 0 is -1")],
)
def test_labels_that_do_not_fit(labels, said, model):
    with pytest.raises(DataError, match=said):
        load_classifier(str(model), labels)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scope", "global"], "is more than the"),
        (["--scope", "tensor"], "is more than the"),
    ],
)
def test_budgets(options, said, model, data, tmp_path):
    out = tmp_path / "m.safetensors"
    options = [*options, "--count", "100000"]
    assert refused(run("fisher", "--model", model, "--data", data, "--out", out, *options), said)
    assert not out.exists()


def test_the_help_names_every_score():
    option = next(option for option in main.commands["fisher"].params if option.name == "score")
    assert all(name in option.help for name in SCORES)


def test_no_rows(model):
    loaded, tokenizer, *_ = load_classifier(str(model), [0, 1])
    with pytest.raises((ConfigError, DataError), match=r"no sample|no scores"):
        fisher_masks(loaded, tokenizer, [], [])
