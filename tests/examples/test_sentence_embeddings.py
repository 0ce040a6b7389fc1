"""A sentence encoder by sentence-transformers' trainer: the config goes into `add_adapter`, files come back."""

import json
import re

import datasets
import numpy as np
import pytest
from demo_data import sentences
from peft import PeftModel
from safetensors.torch import load_file
from sentence_embeddings import main, read_pairs
from sentence_transformers import SentenceTransformer
from training import default_model
from transformers import AutoModel

# PEFT reads transformers' gradient checkpointing property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = ["The soup was cold.", "Nobody liked the ending."]


@pytest.fixture
def moods(tmp_path, monkeypatch):
    """A folder with pairs that are alike where their moods are; the same ones for training and validation."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [*sentences("train", 10, seed=0)]
    pairs = [(rows[i], rows[j]) for i in range(8) for j in (i + 1, i + 2)]
    lines = [
        {
            "sentence1": one["sentence"],
            "sentence2": other["sentence"],
            "label": 5.0 * (one["sentiment"] == other["sentiment"]),
        }
        for one, other in pairs
    ]
    assert {line["label"] for line in lines} == {0.0, 5.0}
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.mark.end_to_end
def test_minilm_learns_and_comes_back(moods, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--max-steps", "5", "--batch-size", "8", "--lr", "5e-3", "--data-dir", str(moods)]
    main([*flags, "--out", str(out)])
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"pairs: (-?[\d.]+) before, (-?[\d.]+) after", printed).groups())
    assert after > before + 0.1
    assert printed.startswith(f"{13 * 2 * 384:,} of ")
    assert "bit-equal" in printed
    assert not (out / "model.safetensors").exists()
    assert sum(value.numel() for value in load_file(out / "adapter_model.safetensors").values()) == 13 * 2 * 384

    tuned = SentenceTransformer(str(out)).encode(TEXTS)
    plain = SentenceTransformer(default_model())
    assert not np.allclose(plain.encode(TEXTS), tuned, atol=1e-3)
    # Merged, it is a plain encoder.
    plain[0].model = PeftModel.from_pretrained(AutoModel.from_pretrained(default_model()), str(out)).merge_and_unload()
    plain.save_pretrained(str(tmp_path / "merged"))
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "merged")).encode(TEXTS), tuned, atol=1e-6)


def test_pairs_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0.0, 2.5, 5.0)]
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pairs(tmp_path, False, 0)["train"]["score"][:] == [0.0, 0.5, 1.0]


def test_the_demos_pairs():
    pairs = read_pairs(None, False, 0)
    assert set(pairs["train"]["score"]) == {0.0, 0.5, 1.0}
    assert pairs["train"][:5] == read_pairs(None, False, 0)["train"][:5]


def test_errors(tmp_path):
    with pytest.raises(SystemExit, match="error: no such file"):
        main(["--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: no model 'no-such-model': "):
        main(["--model", "no-such-model"])
