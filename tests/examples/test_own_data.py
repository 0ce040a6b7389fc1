"""Data as users have it: what each kind of file is taken for, and what is refused before anything is trained."""

import json
import math

import datasets
import pandas
import pytest
import training
from image_data import draw_images, read_images
from methods import METHODS, Method
from question_answering import read_questions
from sentence_embeddings import make_evaluator, read_pairs
from sft import main as sft
from sft import read_rows
from task_data import PARTS, read_data
from text_classification import main
from token_classification import read_tagged
from training import Run, warn_of_chance

from peft_lntune.errors import DataError

pytestmark = [
    # PEFT reads transformers' gradient checkpointing property under its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def write(folder, train, validation=None, ending="csv"):
    folder.mkdir(exist_ok=True)
    for part, text in zip(PARTS, (train, train if validation is None else validation), strict=True):
        (folder / f"{part}.{ending}").write_text(text, encoding="utf-8")
    return folder


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# Text classification: file, options -> problem, classes, labels of the training rows.

TAKEN = {
    "names": ("csv", "text,label\na,no\nb,yes\n", {}, ("single", ("no", "yes"), [0, 1])),
    "semicolons, whole numbers with a point": ("csv", "text;label\na;2.0\nb;1.0\n", {}, ("single", ("1", "2"), [1, 0])),
    "counted from one": ("csv", "text,label\na,1\nb,2\nc,3\n", {}, ("single", ("1", "2", "3"), [0, 1, 2])),
    "other columns": (
        "csv",
        "id,body,topic\n1,a,x\n2,b,y\n",
        {"text_columns": ["body"], "label_columns": ["topic"]},
        ("single", ("x", "y"), [0, 1]),
    ),
    "a pair": (
        "csv",
        "title,body,label\na,b,x\nc,d,y\n",
        {"text_columns": ["title", "body"]},
        ("single", ("x", "y"), [0, 1]),
    ),
    "a scale": (
        "csv",
        "text,label\na,60\nb,75\nc,100\n",
        {"regression": True},
        ("regression", (), [60.0, 75.0, 100.0]),
    ),
    "a scale of classes": (
        "csv",
        "text,label\na,60\nb,75\nc,100\n",
        {"regression": False},
        ("single", ("60", "75", "100"), [0, 1, 2]),
    ),
    "several columns": (
        "csv",
        "text,toxic,insult\na,1,0\nb,1,1\nc,0,0\n",
        {"label_columns": ["toxic", "insult"]},
        ("multi", ("toxic", "insult"), [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]),
    ),
    "lists": (
        "jsonl",
        lines({"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}),
        {},
        ("multi", ("x", "y"), [[1.0, 1.0], [0.0, 0.0]]),
    ),
    "texts with line breaks": ("csv", 'text,label\n"a\nb",x\nc,y\n', {}, ("single", ("x", "y"), [0, 1])),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_files_are_taken_for(case, tmp_path):
    ending, text, options, (problem, names, labels) = TAKEN[case]
    data = read_data(data_dir=write(tmp_path, text, ending=ending), **options)
    assert data.labels.problem_type.startswith(problem)
    assert data.labels.names == names
    assert data.train["label"][:] == labels


REFUSED = {
    "empty": ("", None, {}, r"train\.csv has no rows"),
    "no validation rows": ("text,label\na,x\nb,y\n", "text,label\n", {}, r"validation\.csv has no rows"),
    "a missing column": (
        "text,topic\na,x\n",
        None,
        {},
        r"train\.csv has the columns text, topic; wanted are .*--label-col",
    ),
    "a missing column there": (
        "text,label\na,x\nb,y\n",
        "text,topic\na,x\n",
        {},
        r"validation\.csv has the columns text, topic; wanted are text, label",
    ),
    "an empty text": ("text,label\na,x\n,y\n", None, {}, r"row 1 of .*train\.csv has no text in 'text'"),
    "a missing label": ("text,label\na,x\nb,\n", None, {}, r"train\.csv: the label of row 1 is '': it is missing"),
    "NaN": ("text,label\na,0\nb,NaN\n", None, {}, r"train\.csv: the label of row 1 is 'NaN', which is not a finite"),
    "a class of validation only": (
        "text,label\na,x\nb,y\n",
        "text,label\na,x\nb,z\n",
        {},
        r"validation\.csv: row 1 has the class 'z', which no training row has; those have x, y",
    ),
    "a scale": ("text,label\na,60\nb,75\nc,100\n", None, {}, r"look like a scale\. Say --regression"),
    "one class": ("text,label\na,x\nb,x\n", None, {}, r"every label is 'x'"),
    "flags that are none": (
        "text,toxic,insult\na,1,0\nb,2,1\n",
        None,
        {"label_columns": ["toxic", "insult"]},
        r"train\.csv: row 1 has '2' in 'toxic'; several label columns hold 0 or 1",
    ),
    "latin-1": ("text,label\na,x\nb,y\n", None, {"encoding": "utf-16"}, r"train\.csv is not utf-16.*--encoding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_training(case, tmp_path):
    train, validation, options, said = REFUSED[case]
    with pytest.raises(DataError, match=said):
        read_data(data_dir=write(tmp_path, train, validation), **options)


def test_a_rare_class_is_measured_beside_accuracy(tmp_path):
    rare = "text,label\n" + "a,x\n" * 8 + "b,y\n" * 2
    assert read_data(data_dir=write(tmp_path, rare)).metrics == "imbalanced"
    assert read_data(data_dir=write(tmp_path, "text,label\na,x\nb,y\nc,x\nd,y\ne,x\n")).metrics == "classification"


def test_chance(tmp_path):
    def chance(*labels, **options):
        text = lines(*({"text": "a", "label": label} for label in labels))
        return read_data(data_dir=write(tmp_path, text, ending="jsonl"), **options).chance

    assert chance("x", "y") == pytest.approx(math.log(2))
    assert chance(0.0, 2.0, regression=True) == pytest.approx(1.0)  # the variance
    assert chance([1, 0], [1, 1]) == pytest.approx(math.log(2) / 2)  # the mean of 0 and log 2


def test_several_classes_train_and_answer(tiny_bert, tmp_path, capsys):
    rows = [{"text": f"The soup was {i}", "label": [["x", "y"], ["x"], []][i % 3]} for i in range(12)]
    data, out = write(tmp_path / "data", lines(*rows), ending="jsonl"), tmp_path / "out"
    (tmp_path / "test.csv").write_text("id,text\n7,The soup\n8,null\n")
    flags = ["--max-steps", "2", "--batch-size", "4", "--model", tiny_bert, "--out", str(out)]
    main(["--data-dir", str(data), "--predict", str(tmp_path / "test.csv"), *flags])
    said = capsys.readouterr()
    assert "data: 12 train rows and 12 validation rows; texts in text, 0 of them cut at 128 tokens" in said.err
    assert "labels: 2 classes, several per row: x (8), y (4)" in said.err
    assert "micro_f1  macro_f1  accuracy" in said.out
    answers = pandas.read_csv(out / "ln" / "predictions.csv", keep_default_na=False)
    assert list(answers) == ["id", "text", "prediction", "score_x", "score_y"]
    assert answers["text"].to_list() == ["The soup", "null"]
    assert ((answers["score_x"] > 0.5) == answers["prediction"].str.contains("x")).all()
    config = json.loads((out / "ln" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"


def test_predictions_are_checked_before_training(tiny_bert, tmp_path):
    data = write(tmp_path / "data", "text,label\na,x\nb,y\n")
    (tmp_path / "test.csv").write_text("body\na\n")
    with pytest.raises(SystemExit, match=r"test\.csv has the columns body; wanted are text"):
        main(["--data-dir", str(data), "--model", tiny_bert, "--predict", str(tmp_path / "test.csv")])


def test_setups_are_tried_first_and_what_is_finished_is_shown(tiny_bert, tmp_path, monkeypatch, capsys):
    def fail(model, task):
        raise ValueError("Please specify `target_modules`")

    data = write(tmp_path / "data", "text,label\na,x\nb,y\n")
    flags = ["--data-dir", str(data), "--model", tiny_bert, "--max-steps", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setitem(METHODS, "lora", Method(1e-3, fail))
    with pytest.raises(SystemExit, match=r"the method lora cannot be set up on .*: Please specify"):
        main([*flags, "--method", "head", "lora"])
    assert not (tmp_path / "out" / "head").exists()

    train_method = training.train_method

    def stop(run, *args, **options):
        if run.method == "full":
            raise KeyboardInterrupt
        return train_method(run, *args, **options)

    monkeypatch.setattr(training, "train_method", stop)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, "--method", "head", "full"])
    assert "\nhead " in capsys.readouterr().out


def test_losses_of_chance_are_told(capsys):
    class Task:
        chance = 0.693

    for losses, told in (([0.9, 0.5, 0.4], False), ([0.9, 0.8], True), ([float("nan")], True), ([], False)):
        warn_of_chance(Run("ln", "", ""), Task, losses)
        assert ("not below that of chance (0.693)" in capsys.readouterr().err) == told


# Other tasks.


def test_conll(tmp_path):
    text = "-DOCSTART- -X- O\n\nRick NNP B-PER\nSanchez NNP E-PER\nsaw VBD O\nOhio NNP S-LOC\n\n\nMorty NNP S-PER\n"
    rows = read_tagged(write(tmp_path, text, ending="conll"))["train"]
    assert rows["ner_tags"][:] == [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER"]]
    assert rows["tokens"][1] == ["Morty"]


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        ("", None, r"train\.conll has no rows"),
        ("a O\nb O\n", None, "every tag is O"),
        ("a B-x\nb NOUN\n", None, r"train\.conll: row 0 has the tag 'NOUN'; a tag is O, or B-"),
        ("a B-x\n\nb B-\n", None, r"train\.conll: row 1 has the tag 'B-'"),
        ("a B-x\nb\n", None, r"line 2 of .*train\.conll has no tag: 'b'"),
        ("a B-x\n", "a O\n\nb I-y\n", r"validation\.conll: row 1 has an entity of type y, which no training row has"),
    ],
)
def test_tags_that_are_refused(train, validation, said, tmp_path):
    with pytest.raises(DataError, match=said):
        read_tagged(write(tmp_path, train, validation, "conll"))


ANSWERS = {"text": ["b"], "answer_start": [2]}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"question": " "}, r"row 1 of .*train\.jsonl has no text in 'question'"),
        ({"answers": "b"}, r"train\.jsonl, row 0: answers has to be"),
        ({"answers": {"text": ["b"], "answer_start": []}}, r"row 1: answer_start has to be the first character"),
        ({"answers": {"text": None, "answer_start": None}}, r"row 1: no answer"),
    ],
)
def test_questions_that_are_refused(changed, said, tmp_path):
    row = {"question": "which", "context": "a b", "answers": ANSWERS}
    rows = [{**row, **changed}] * 2 if isinstance(changed.get("answers"), str) else [row, {**row, **changed}]
    with pytest.raises(DataError, match=said):
        read_questions(write(tmp_path, lines(*rows), ending="jsonl"))


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"prompt": "a", "completion": "b"}, {"text": "a"}], ids=list)
def test_rows_for_sft(row, tmp_path):
    folder = write(tmp_path, lines({**row, "id": 1}), ending="jsonl")
    assert read_rows(folder, None, 0)["train"][:] == {name: [value] for name, value in row.items()}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": ""}, r"train\.jsonl: text of row 0 is empty or no text: ''"),
        ({"prompt": "a", "completion": None}, r"completion of row 0 is empty"),
        ({"messages": []}, "messages of row 0 is empty"),
        ({"messages": CHAT[:1]}, "messages of row 0 do not end with a turn of the assistant"),
        ({"messages": [{"from": "user", "value": "a"}]}, r"messages of row 0 has to hold turns"),
    ],
)
def test_rows_that_sft_refuses(row, said, tmp_path):
    with pytest.raises(DataError, match=said):
        read_rows(write(tmp_path, lines(row), ending="jsonl"), None, 0)


def test_chats_need_a_template(tiny_llama, tmp_path, capsys):
    folder = write(tmp_path / "data", lines(*[{"messages": CHAT}] * 4), ending="jsonl")
    flags = ["--model", tiny_llama, "--data-dir", str(folder), "--max-steps", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(
        SystemExit, match=r"the rows are chats, and the tokenizer of .* has no chat template\. Give --chat"
    ):
        sft(flags)


def test_pairs_triplets_and_scores(tmp_path):
    score = read_pairs(write(tmp_path, "sentence1,sentence2,score\na,b,1\nc,d,3\n"), False, 0)["train"]
    assert score["score"][:] == [0.0, 1.0]
    assert make_evaluator(score)[1] == "spearman_cosine"
    pairs = read_pairs(write(tmp_path, "anchor,positive\na,b\nc,d\n"), False, 0)["train"]
    assert make_evaluator(pairs)[1] == "mean_accuracy"
    triplets = read_pairs(write(tmp_path, "anchor;positive;negative\na;b;c\n"), False, 0)["train"]
    assert make_evaluator(triplets)[1] == "cosine_accuracy"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("anchor,positive\na,\n", r"row 0 of .*train\.csv has no text in 'positive'"),
        ("sentence1,sentence2,score\na,b,\n", r"train\.csv: the label of row 0 is '': it is missing"),
        ("sentence1,sentence2,score\na,b,alike\n", r"the label of row 0 is 'alike', which is not a number"),
        ("sentence1,sentence2,score\na,b,1\nc,d,1\n", r"every label is .1., so there is nothing to learn"),
        ("a,b\nc,d\n", r"train\.csv has the columns a, b; wanted are anchor, positive, negative or"),
    ],
)
def test_pairs_that_are_refused(text, said, tmp_path):
    with pytest.raises(DataError, match=said):
        read_pairs(write(tmp_path, text), False, 0)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    picture = draw_images(1, 16, seed=0)[0]["image"]

    def save(*files):
        for file in files:
            (tmp_path / "images" / file).parent.mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "images" / file)
        return tmp_path / "images"

    return save


def test_a_corrupt_image(images, capsys):
    files = [f"{part}/{kind}/{i}.png" for part in PARTS for kind in ("cat", "dog") for i in range(2)]
    folder = images(*files)
    assert read_images(folder, None)["train"]["label"][:] == [0, 0, 1, 1]
    assert "data: 4 train images and 4 validation images; 2 classes: cat (2), dog (2)" in capsys.readouterr().err
    broken = folder / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train/dog/1\.png is no image that can be read"):
        read_images(folder, None)


def test_classes_of_images(images):
    folder = images("train/cat/0.png", "train/dog/0.png", "validation/cat/0.png", "validation/fox/0.png")
    with pytest.raises(DataError, match="has the class fox, which no training image has"):
        read_images(folder, None)
