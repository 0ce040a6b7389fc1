"""A vision transformer on drawings, and on a checkpoint and a folder of images as a user has them."""

import re

import datasets
import image_classification
import numpy as np
import pytest
import torch
from image_classification import TINY, load_model, main
from image_data import SHAPES, draw_images, read_images
from peft import PeftModel
from safetensors.torch import load_file
from task_data import PARTS
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from peft_lntune.errors import DataError

# PEFT reads transformers' gradient checkpointing property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def images(tmp_path):
    """A folder of images, as `--data-dir` takes it; the same ones for training and validation."""
    for part in PARTS:
        for i, row in enumerate(draw_images(12, 20, seed=0)):
            folder = tmp_path / "images" / part / SHAPES[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{i}.png")
    return tmp_path / "images"


def figures(printed, name):
    found = re.search(rf"^{name} .*: ([\d.]+) before, ([\d.]+) after", printed, re.MULTILINE)
    return [float(figure) for figure in found.groups()]


def test_a_checkpoint_and_a_folder(images, cache, tmp_path, capsys):
    model, out = str(tmp_path / "vit"), tmp_path / "out"
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, intermediate_size=96, num_labels=7)).save_pretrained(model)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(model)
    flags = [
        "--max-steps",
        "30",
        "--batch-size",
        "12",
        "--lr",
        "2e-2",
        "--head-learning-rate",
        "2e-2",
        "--out",
        str(out),
    ]
    main(["--model", model, "--data-dir", str(images), *flags])
    printed = capsys.readouterr().out
    before, after = figures(printed, "loss")
    assert after < before - 0.2
    assert "all 12 logits are bit-equal" in printed
    assert f"trainable params: {7 * 2 * 48 + 49 * 3:,} " in printed  # seven norms, and a head for three classes
    saved = load_file(out / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in saved} == {"classifier", "lntune_weight", "lntune_bias"}
    loaded = PeftModel.from_pretrained(load_model(model, sorted(SHAPES), 0)[0], out).eval()
    with torch.no_grad():
        tuned = loaded(torch.ones(1, 3, 32, 32)).logits
        torch.testing.assert_close(loaded.merge_and_unload()(torch.ones(1, 3, 32, 32)).logits, tuned)


def test_without_anything(tmp_path, capsys, monkeypatch):
    told = []
    monkeypatch.setattr(image_classification, "warn_of_chance", lambda *arguments: told.append(arguments))
    main(["--max-steps", "1", "--batch-size", "4", "--out", str(tmp_path / "out")])
    assert "all 60 logits are bit-equal" in capsys.readouterr().out
    assert told[0][:3] == ("ln", 1e-3, pytest.approx(np.log(3)))  # as many drawings of each shape


def test_equal_seeds_give_equal_drawings():
    first, again, other = (draw_images(3, 16, seed)["image"][2].tobytes() for seed in (1, 1, 2))
    assert first == again != other


def test_errors(images, cache, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*nowhere.train has no folders of classes\. Wanted are two"):
        main(["--data-dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="error: no model 'no-such-model': "):
        main(["--model", "no-such-model"])
    with pytest.raises(DataError, match="train has no folders of classes"):
        read_images(images / "train", None)
