"""Files of many kinds and what each gets; labels: which are classes, which are values, and which are refused."""

import json
import math

import datasets
import pytest

from peft_lntune.cli.data import (
    NAME_COLUMNS,
    TEXT_COLUMNS,
    count_cut,
    find_columns,
    find_labels,
    read_table,
    read_texts,
)
from peft_lntune.errors import DataError

# Files: bytes, and the columns that they get.

TWO = {"text": ["good", "bad"], "label": ["1", "0"]}
READ = {
    "commas.csv": (b"text,label\ngood,1\nbad,0\n", TWO),
    "semicolons.csv": (
        b"text;label\ngood, in fact;1\nbad;0\n",
        {"text": ["good, in fact", "bad"], "label": ["1", "0"]},
    ),
    "tabs.tsv": (b"text\tlabel\ngood\t1\nbad\t0\n", TWO),
    "tabs.csv": (b"text\tlabel\ngood\t1\nbad\t0\n", TWO),
    "byte order mark.csv": (b"\xef\xbb\xbftext,label\r\ngood,1\r\nbad,0\r\n", TWO),
    "quoted mark in the header.csv": (b'"text",label,"a;b;c;d"\ngood,1,x\nbad,0,x\n', {**TWO, "a;b;c;d": ["x", "x"]}),
    "line break in a text.csv": (
        b'text,label\n"good\nday",1\nbad,0\n',
        {"text": ["good\nday", "bad"], "label": ["1", "0"]},
    ),
    "quotes in a text.csv": (
        b'text,label\n"a ""good"" one",1\nit\'s "fine",0\n',
        {"text": ['a "good" one', 'it\'s "fine"'], "label": ["1", "0"]},
    ),
    "blank lines.csv": (b"text,label\n\ngood,1\n\n\nbad,0\n\n", TWO),
    "no number is changed.csv": (b"text,label\n007,2.0\n1e3,1\n", {"text": ["007", "1e3"], "label": ["2.0", "1"]}),
    # https://github.com/huggingface/datasets/issues/4467: a text of one word, null, was read as missing
    "words for nothing.csv": (b"text,label\nnull,None\nNA,nan\n", {"text": ["null", "NA"], "label": ["None", "nan"]}),
    "one column.csv": (b"text\nhello there, you\n", None),
    "lines.jsonl": (b'{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n', {**TWO, "label": [1, 0]}),
    "lines.json": (b'{"text": "good", "label": 1}\n\n{"text": "bad", "label": 0}', {**TWO, "label": [1, 0]}),
    "array.json": (b'[{"text": "good", "label": 1}, {"text": "bad", "label": 0}]', {**TWO, "label": [1, 0]}),
    # https://github.com/UKGovernmentBEIS/inspect_ai/issues/5353: the mark was part of the first column's name
    "byte order mark.jsonl": (
        b'\xef\xbb\xbf{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n',
        {**TWO, "label": [1, 0]},
    ),
    "missing key.jsonl": (b'{"text": "good", "label": 1}\n{"text": "bad"}\n', {**TWO, "label": [1, None]}),
    "numbers and words.jsonl": (
        b'{"text": "good", "label": 1}\n{"text": "bad", "label": "x"}\n',
        {**TWO, "label": [1, "x"]},
    ),
    "lists.jsonl": (
        b'{"text": "good", "label": ["a", "b"]}\n{"text": "bad", "label": []}\n',
        {**TWO, "label": [["a", "b"], []]},
    ),
    "blank lines.conll": (
        b"-DOCSTART- -X- -X- O\n\nRick NNP I-NP B-person\nsmiles VBZ O O\n\n\n \nOhio NNP B-NP B-location",
        {"tokens": [["Rick", "smiles"], ["Ohio"]], "ner_tags": [["B-person", "O"], ["B-location"]]},
    ),
    "tabs.conll": (
        b"New York\tB-place\r\n#1\tO\r\n\r\n",
        {"tokens": [["New York", "#1"]], "ner_tags": [["B-place", "O"]]},
    ),
}


@pytest.mark.parametrize("name", [name for name, (_, wanted) in READ.items() if wanted])
def test_files_that_are_read(name, tmp_path):
    text, wanted = READ[name]
    (tmp_path / name).write_bytes(text)
    assert read_table(tmp_path / name)[:] == wanted


def test_parquet(tmp_path):
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=names).to_parquet(tmp_path / "d.parquet")
    assert read_table(tmp_path / "d.parquet").features == names


@pytest.mark.parametrize(
    ("name", "encoding"), [("d.csv", "latin-1"), ("d.csv", "utf-16"), ("d.jsonl", "cp1252"), ("d.conll", "latin-1")]
)
def test_other_encodings(name, encoding, tmp_path):
    text = {"d.csv": "text,label\ncafé,1\n", "d.jsonl": '{"text": "café", "label": 1}\n', "d.conll": "café O\n"}[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert "café" in str(read_table(tmp_path / name, encoding)[0])
    likely = "utf-16" if encoding == "utf-16" else "cp1252"
    with pytest.raises(DataError, match=f"{name} is not utf-8.*--encoding {likely}"):
        read_table(tmp_path / name)


def test_a_changed_file_is_read_again(tmp_path):
    for label in (0, 1):
        (tmp_path / "d.jsonl").write_text(json.dumps({"text": "a", "label": label}))
        assert read_table(tmp_path / "d.jsonl")["label"][:] == [label]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("d.txt", "x", r"d.txt should end in one of .jsonl, .json, .csv, .tsv, .parquet, .conll"),
        *((f"d.{ending}", "", r"has no rows") for ending in ("csv", "tsv", "jsonl", "json", "conll")),
        ("d.csv", "text,label\n", "has no rows"),
        ("d.jsonl", "\n\n", "has no rows"),
        ("d.conll", "-DOCSTART- O\n\n", "has no rows"),
        (
            "d.csv",
            "text,label\na,0\nb, c,1\n",
            r"d.csv is not a table with 2 columns, separated by ','.*line 3.*Quote texts",
        ),
        ("d.csv", "text,label\na, b,0\nc, d,1\n", "is not a table with 2 columns"),  # else each label were ' b'
        ("d.csv", 'text,label\n"a,0\nb,1\n', r"is not a table.*the row that begins in line 2 has a quotation mark too"),
        ("d.jsonl", '{"text": "a", "label": 0}\n{', r"line 2 of .* is not JSON"),
        ("d.json", '[{"text": "a"}, {', "d.json cannot be read"),
        ("d.parquet", "x", "d.parquet cannot be read"),
        ("d.conll", "Rick B-person\nsmiles\n", r"line 2 of .* has no tag: 'smiles'"),
    ],
)
def test_files_that_are_refused(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_table(tmp_path / name)


def test_no_file_and_no_datasets(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no such file: .*d\.csv"):
        read_table(tmp_path / "d.csv")
    (tmp_path / "d.csv").write_text("text\na\n")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs datasets: pip install datasets"):
        read_table(tmp_path / "d.csv")


# Columns and texts.


@pytest.mark.parametrize(
    ("present", "columns"),
    [
        (["idx", "sentence", "label"], ("sentence",)),
        (["question", "sentence", "label"], ("question", "sentence")),
        (["sentence1", "sentence2", "label"], ("sentence1", "sentence2")),
        (["hypothesis", "premise", "label"], ("premise", "hypothesis")),
    ],
)
def test_columns(present, columns):
    assert find_columns(present, TEXT_COLUMNS, "d.csv") == columns
    with pytest.raises(DataError, match=r"d\.csv has the columns .*; wanted are body\. Name yours: --text-column"):
        find_columns(present, [("body",)], "d.csv", NAME_COLUMNS)


@pytest.mark.parametrize("value", [None, "", " \n", math.nan, ["a"]], ids=repr)
def test_texts(value):
    assert read_texts(["a", 3], "text", "d.csv") == ["a", "3"]
    with pytest.raises(DataError, match=r"row 1 of d\.csv has no text in 'text'"):
        read_texts(["a", value], "text", "d.csv")


def test_texts_that_are_cut():
    def tokenizer(*columns, truncation, max_length):
        assert truncation
        return {"input_ids": [" ".join(row).split()[:max_length] for row in zip(*columns, strict=True)]}

    assert count_cut(tokenizer, [["a b c", "a b"], ["d", "e"]], 3) == 1


# Labels.


def encode_labels(labels, known=None):
    found = find_labels(labels, "d.csv", known=known)
    return found.encode(labels, "d.csv"), len(found.names) or 1


TAKEN = {
    "text of whole numbers": (["0", "1", "2"], [0, 1, 2], 3),
    "floats that are whole": ([0.0, 1.0, 2.0], [0, 1, 2], 3),
    "text of floats that are whole": (["0.0", "1.0", "2.0"], [0, 1, 2], 3),
    "some with a point": (["2", "1.0", "2.0"], [1, 0, 1], 2),
    "counted from one": ([1, 2, 3], [0, 1, 2], 3),
    "zero and four": (["0", "4", "4"], [0, 1, 1], 2),
    "ten and more in the order of numbers": ([*range(12)], [*range(12)], 12),
    "bools": ([True, False], [1, 0], 2),
    "words for bools": (["True", "False"], [1, 0], 2),
    "values": (["0.5", "1"], [0.5, 1.0], 1),
    "names": (["yes", "no", "yes"], [1, 0, 1], 2),
    "names with spaces around": (["yes", " no", "yes "], [1, 0, 1], 2),
    "names and a number": (["yes", "3"], [1, 0], 2),
    "a name for nothing beside names": (["for", "none", "against"], [1, 2, 0], 3),
    "several names": ([["a", "b"], [], ["b"]], [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]], 2),
    "several numbers": ([[2, 10], [1]], [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], 3),
    "a vector per row": ([[0, 1, 1], [0, 0, 0]], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], 3),
}


@pytest.mark.parametrize("case", TAKEN)
def test_labels_become_numbers(case):
    labels, expected, classes = TAKEN[case]
    found = encode_labels(labels)
    assert found == (expected, classes)
    assert {type(label) for label in found[0]} == {type(expected[0])}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", "it is missing"),
        (" ", "it is missing"),
        (None, "it is missing"),
        ("nan", "not a finite number"),
        (math.nan, "not a finite number"),
        ("-inf", "not a finite number"),
        ([0, 1], "Either all labels are lists, or none"),
        ({"a": 1}, "of type dict"),
        ("['a', 'b']", "text that looks like a list"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("known", [{}, {"0": 0, "1": 1}], ids=["no head", "head"])
def test_what_is_no_label_is_refused_with_its_row(wrong, message, known):
    with pytest.raises(DataError, match=f"d.csv: the label of row 1 is .*{message}"):
        encode_labels(["0", wrong, "1"], known)


@pytest.mark.parametrize("word", ["NA", "n/a", "null", "None", "-"])
def test_a_missing_number_is_no_class(word):
    with pytest.raises(DataError, match=rf"the label of row 2 is '{word}', which is not a number"):
        encode_labels(["1", "2", word])


def test_negative_classes_and_unknown_names():
    with pytest.raises(DataError, match="that of row 1 is '-1'"):
        encode_labels(["0", "-1"])
    with pytest.raises(DataError, match="head knows yes, no, and the data has maybe"):
        encode_labels(["maybe"], {"yes": 0, "no": 1})
    assert encode_labels([1, 0], {"yes": 0, "no": 1}) == ([1, 0], 2)
    with pytest.raises(DataError, match="the data has 6 classes, and the head of the model 2"):
        encode_labels([0, 5], {"yes": 0, "no": 1})


def test_several_classes_of_a_head():
    known = {"toxic": 0, "insult": 1}  # in the order of the head, not of the names
    for labels in ([["insult"], ["toxic", "insult"]], [[1], [0, 1]], [[0, 1], [1, 1]]):
        assert encode_labels(labels, known) == ([[0.0, 1.0], [1.0, 1.0]], 2)
    with pytest.raises(DataError, match="head knows toxic, insult, and the data has rude"):
        encode_labels([["rude"]], known)
    with pytest.raises(DataError, match="the data has 3 classes"):
        encode_labels([[0, 1, 1]], known)


@pytest.mark.parametrize("labels", [[10, 20, 30], [0, 1, 5], ["60", "75.0", "100"], [*range(30)]], ids=str)
def test_a_scale_is_asked_about(labels):
    with pytest.raises(DataError, match=r"look like a scale\. Say --regression to learn values, or --no-regression"):
        find_labels(labels, "d.csv")
    assert find_labels(labels, "d.csv", regression=True).encode(labels, "d.csv") == [float(label) for label in labels]
    assert len(find_labels(labels, "d.csv", regression=False).names) == len(labels)


def test_labels_that_teach_nothing():
    with pytest.raises(DataError, match="every label is '1', so there is nothing to learn"):
        find_labels(["1", "1.0"], "d.csv")
    with pytest.raises(DataError, match=r"30 classes in 30 rows\. Is this the label column"):
        find_labels([f"id {row}" for row in range(30)], "d.csv")
    with pytest.raises(DataError, match="the label of row 1 is 'high', which is not a number"):
        find_labels(["3", "high"], "d.csv", regression=True)


@pytest.mark.parametrize("labels", [["a", "b"], [["a"], ["b"]], [1, 2], ["1.0", "2.0"]], ids=str)
def test_a_class_that_training_does_not_have(labels):
    strange = [["c"]] if isinstance(labels[0], list) else ["3"]
    with pytest.raises(
        DataError, match=r"validation: row 0 has the class '[c3]', which no training row has; those have"
    ):
        find_labels(labels, "train").encode(strange, "validation")
    with pytest.raises(DataError, match="validation: the label of row 1 is 'x', and the others are numbers"):
        find_labels([0.5, 1.5], "train").encode(["1", "x"], "validation")


def test_what_is_said_of_labels():
    assert find_labels(["b", "a", "b"], "").describe([1, 0, 1]) == "2 classes: a (1), b (2)"
    assert find_labels([["a"], ["b", "a"]], "").describe([[1, 0], [1, 1]]) == "2 classes, several per row: a (2), b (1)"
    assert find_labels([0.5, 3], "").describe([0.5, 3]) == "values from 0.5 to 3"
    assert find_labels([*range(12)] * 2, "").describe([*range(12)]).endswith("9 (1) and 2 more")
