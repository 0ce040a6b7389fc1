"""The sweep over model classes: its reference, a row, and a few classes as the whole would run them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from benchmarks.costs import architectures
from benchmarks.harness.architectures import model_classes, reference_norms
from benchmarks.harness.rows import Rows

CLASSES = (
    "bert.BertModel",
    "clip.CLIPVisionModel",
    "gemma2.Gemma2Model",
    "jamba.JambaModel",
    "mixtral.MixtralModel",
    "t5.T5Model",
    "wav2vec2.Wav2Vec2Model",
)


class MyRMSNorm(nn.LayerNorm):
    pass


class NoNorm(nn.LayerNorm):
    pass


def test_reference():
    model = nn.ModuleDict({"a": MyRMSNorm(2), "b": NoNorm(2), "c": nn.BatchNorm1d(2), "d": nn.Linear(2, 2)})
    model["e"] = nn.LayerNorm(2, elementwise_affine=False)
    assert reference_norms(model) == {"a": "MyRMSNorm"}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_exact(name):
    row = architectures.measure(model_classes([name.partition(".")[0]])[name])
    assert row["status"] == "success"
    assert row["norms"] == row["found"] > 0
    assert [row[key] for key in ("missed", "named", "extra", "without_role")] == [[]] * 4
    assert all(isinstance(row[part], int) or not row[part].startswith("fault") for part in architectures.OTHERS)
    assert json.loads(json.dumps(row)) == row


def test_a_class_that_does_not_build():
    class Strange(nn.Module):
        config_class = SimpleNamespace

        def __init__(self, config):
            raise ArithmeticError("no such config")

    assert architectures.measure(Strange) == {"status": "not built", "error": "ArithmeticError: no such config"}


def test_a_process_that_ends_leaves_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(batch):
        for name in batch:
            dead = name == "b"
            yield {"cell": {"model": name}, "status": "ended its process with -9" if dead else "success"}
            if dead:
                return

    monkeypatch.setattr(architectures, "_run", run)
    rows = Rows(tmp_path / "rows.jsonl")
    architectures.sweep(["a", "b", "c"], rows)
    architectures.sweep(["a", "b", "c", "d"], rows)
    assert [row["cell"]["model"] for row in rows] == ["a", "b", "c", "d"]


def test_report_counts(tmp_path: Path):
    rows = Rows(tmp_path / "rows.jsonl")
    row = {"norms": 3, "found": 2, "num_missed": 1, "named": [], "missed": ["x.norm (Norm)"], "extra": []}
    row |= {"status": "success", "modules": 9, "roles": {"ffn": 1}, "without_role": ["y.norm"]}
    row |= {"bottleneck": 2, "prefix": "UnsupportedError", "components": "fault: KeyError: 'x'"}
    rows.append({"cell": {"model": "a.A"}, **row})
    rows.append({"cell": {"model": "b.B"}, "status": "not built", "error": "ImportError: timm"})
    page = architectures.report(rows)
    assert "Of 2 model classes 1 build" in page
    assert "| norms missed without a word | 1 | 0 |" in page
    assert "| norms with a role | 1 (50.0%) | 90% |" in page
    assert "| plans of components that raise what is not ours | 1 | 0 |" in page
    assert "| b.B | ImportError: timm |" in page
