"""Data as users have it: what each kind of file is taken for, and what is refused before anything is trained."""

import json
import math
from typing import ClassVar

import datasets
import pandas
import pytest
import training
from image_data import draw_images, read_images
from methods import METHODS, Method
from PIL import Image
from sentence_embeddings import make_evaluator, read_pairs
from sft import main as sft
from task_data import PARTS, read_data
from text_classification import main
from training import warn_of_chance

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
    (tmp_path / "test.csv").write_text("text,prediction\na,x\n")
    with pytest.raises(
        SystemExit, match=r"test\.csv has the column 'prediction', which predictions\.csv would overwri"
    ):
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


@pytest.mark.parametrize(
    ("losses", "told"), [([0.9, 0.5, 0.4], False), ([0.9, 0.8], True), ([float("nan")], True), ([], False)]
)
def test_losses_of_chance_are_told(losses, told, capsys):
    class Trainer:
        class state:
            log_history: ClassVar = [*({"loss": loss} for loss in losses), {"train_runtime": 1.0}]

    warn_of_chance("ln", 5e-3, 0.693, Trainer)
    assert ("not below that of chance (0.693)" in capsys.readouterr().err) == told
    warn_of_chance("ln", 5e-3, None, Trainer)
    assert capsys.readouterr().err == ""


# Other tasks.


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


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


def test_images_that_are_refused(images, capsys):
    files = [f"{part}/{kind}/{i}.png" for part in PARTS for kind in ("cat", "dog") for i in range(2)]
    folder = images(*files)
    assert read_images(folder, None)["train"]["label"][:] == [0, 0, 1, 1]
    assert "data: 4 train images and 4 validation images; 2 classes: cat (2), dog (2)" in capsys.readouterr().err
    broken = folder / "train" / "dog" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"train/dog/1\.png is no image that can be read"):
        read_images(folder, None)
    Image.new("I;16", (8, 8)).save(broken)
    with pytest.raises(DataError, match=r"train/dog/1\.png has more than 8 bits per channel \(mode I;16\)\. Rescale"):
        read_images(folder, None)
    broken.write_bytes(whole)
    Image.new("RGBA", (8, 8)).save(folder / "train" / "dog" / "2.png")
    Image.new("P", (8, 8)).save(folder / "train" / "cat" / "2.png")
    assert len(read_images(folder, None)["train"]) == 6


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("train/cat/0.png", "train/dog/0.png", "validation/fox/0.png"), "has the class fox, which no training image"),
        (("train/cat/0.png", "validation/cat/0.png"), r"train has the only class cat\. Wanted are two or more"),
        (("train/0.png", "validation/0.png"), r"train has no folders of classes\. Wanted are two or more"),
        (("train/cat/0.png", "train/dog/old/0.png"), "train/dog/old is a folder inside of a class"),
        (("train/cat/0.png", "train/dog/0.png"), "has no part validation; it has train"),
    ],
)
def test_folders_of_images_that_are_refused(files, said, images):
    with pytest.raises(DataError, match=said):
        read_images(images(*files), None)
