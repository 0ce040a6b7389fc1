"""Local files in every format, the Hub's columns, and what is said when something is missing."""

import datasets
import pytest
from task_data import read_data

from peft_lntune.errors import DataError

ROWS = {"sentence": ["a good one", "a bad one", "fine"], "label": [1, 0, 1], "idx": [0, 1, 2]}


def write(folder, ending, rows=ROWS, parts=("train", "validation")):
    data = datasets.Dataset.from_dict(rows)
    for part in parts:
        {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[ending](f"{folder}/{part}.{ending}")
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_formats(tmp_path, ending):
    data = read_data("sst2", write(tmp_path, ending))
    assert (data.columns, data.num_labels, data.metrics) == (("sentence",), 2, "sst2")
    assert data.train["label"][:] == [1, 0, 1]


def test_columns_without_task(tmp_path):
    pairs = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0.5, 4.0]}
    data = read_data(data_dir=write(tmp_path, "jsonl", pairs))
    assert (data.columns, data.num_labels, data.metrics) == (("sentence1", "sentence2"), 1, "regression")


def test_hub_task(monkeypatch):
    pairs = datasets.Dataset.from_dict({"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 2]})
    pairs = pairs.cast_column("label", datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]))
    asked = []

    def load_dataset(*args):
        asked.append(args)
        return {"train": pairs, "validation_matched": pairs}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = read_data("mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert (data.columns, data.num_labels) == (("premise", "hypothesis"), 3)


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"cannot load nyu-mll/glue sst2: Couldn't reach .*\. Give --data-dir, a folder"
    ):
        read_data("sst2")


def test_missing_file_names_what_was_looked_for(tmp_path):
    write(tmp_path, "csv", parts=["train"])
    with pytest.raises(DataError, match=r"no such file, looked for: .*validation\.jsonl, .*validation\.parquet"):
        read_data("sst2", tmp_path)


def test_two_files_for_one_part(tmp_path):
    write(write(tmp_path, "csv"), "jsonl")
    with pytest.raises(DataError, match=r"keep one of: .*train\.jsonl, .*train\.csv"):
        read_data("sst2", tmp_path)


def test_missing_columns(tmp_path):
    with pytest.raises(DataError, match="has the columns sentence, label, idx; wanted are sentence1, sentence2, label"):
        read_data("mrpc", write(tmp_path, "jsonl"))


def test_unknown_columns_without_task(tmp_path):
    with pytest.raises(DataError, match=r"has the columns body, label; wanted are .* or text, label"):
        read_data(data_dir=write(tmp_path, "jsonl", {"body": ["a"], "label": [0]}))


def test_unknown_task():
    with pytest.raises(DataError, match="unknown task 'sst3'; known are cola, mnli"):
        read_data("sst3")


def test_neither_task_nor_folder():
    with pytest.raises(DataError, match="give a data folder, or a task"):
        read_data()


def test_labels_that_are_no_classes(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl: labels of classes are counted from 0, but that of row 0 is -1"):
        read_data("sst2", write(tmp_path, "jsonl", {**ROWS, "label": [-1, 0, 1]}))
