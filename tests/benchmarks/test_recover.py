"""Damage to linear maps, and the benchmark of its repair on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.costs import recover
from benchmarks.harness.damage import DAMAGES, damage, prune_smallest, round_to_bits
from benchmarks.harness.rows import Rows
from tests.cli.saved import WORDS, save_model
from tests.recover.pairs import teacher_of


def weights() -> torch.Tensor:
    return torch.randn(6, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["round", "hqq"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_group_has_as_many_values_as_bits_allow_and_is_near(kind: str, bits: int) -> None:
    if kind == "hqq":
        pytest.importorskip("torchao", reason="torchao is missing")
    before = weights()
    after = DAMAGES[f"{kind}-{bits}"](before)
    assert after.shape == before.shape
    groups, own = after.reshape(-1, 64), before.reshape(-1, 64)
    assert max(group.unique().numel() for group in groups) <= 2**bits
    step = (own.amax(1) - own.amin(1)) / (2**bits - 1)
    # HQQ may clip, so only its mean error is bounded: rounding alone gives a quarter of a step.
    assert ((groups - own).abs().mean(1) < 0.35 * step).all()
    if kind == "round":
        assert ((groups - own).abs() <= 0.5001 * step[:, None]).all()
        torch.testing.assert_close(groups.aminmax(dim=1), own.aminmax(dim=1))


def test_equal_weights_stay_what_they_are() -> None:
    assert torch.equal(round_to_bits(torch.full((2, 64), 0.3), 3), torch.full((2, 64), 0.3))


def test_the_smallest_half_becomes_zero_and_the_rest_stays() -> None:
    before = weights()
    after = prune_smallest(before, 0.5)
    kept = after != 0
    assert int(kept.sum()) == before.numel() // 2
    assert torch.equal(after[kept], before[kept])
    assert before[~kept].abs().max() <= before[kept].abs().min()


def test_the_head_and_norms_are_not_damaged() -> None:
    model, before = teacher_of(), teacher_of().state_dict()
    damage(model, "prune-50")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "proj" in name}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A tiny model and texts, few steps, and three kinds of cells."""
    model = save_model(tmp_path / "model")
    teacher_of().save_pretrained(model)
    for domain, columns in recover.DOMAINS.items():
        (tmp_path / "data" / domain).mkdir(parents=True)
        row = json.dumps(dict.fromkeys(columns, " ".join(WORDS[4:] * 6)))
        for part in ("train", "validation"):
            (tmp_path / "data" / domain / f"{part}.jsonl").write_text(f"{row}\n" * 20)
    first = recover.cell_of("undamaged", "none")
    cells = [first, *(recover.cell_of("prune-50", arm) for arm in ("none", "norms", "lora", "closed-ridge"))]
    monkeypatch.setattr(recover, "cells", lambda: cells)
    monkeypatch.setattr(recover, "LENGTH", 8)
    monkeypatch.setattr(recover, "STEPS", 3)
    monkeypatch.setattr(recover, "HELD_OUT", 4)
    monkeypatch.setattr(recover, "CALIBRATION", 4)
    monkeypatch.setattr(recover, "ROUNDS", 1)
    return ["--model", str(model), "--data-dir", str(tmp_path / "data"), "--results", str(tmp_path / "results")]


@pytest.mark.end_to_end
def test_the_rows_say_what_was_done(small: list[str], tmp_path: Path) -> None:
    assert recover.main(small) == 0
    rows = {(row["cell"]["damage"], row["cell"]["arm"]): row for row in Rows(tmp_path / "results/recover.jsonl")}
    assert rows["undamaged", "none"]["metrics"]["gsm8k"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert rows["prune-50", "none"]["metrics"]["gsm8k"]["divergence"] > 0.01
    assert (rows["prune-50", "norms"]["steps"], rows["prune-50", "norms"]["num_method_params"]) == (3, 80)
    lora = rows["prune-50", "lora"]
    assert lora["steps"] == max(1, round(3 / lora["step_ratio"]))
    assert rows["prune-50", "closed-ridge"]["losses"] == []
    page = (tmp_path / "results/recover.md").read_text()
    assert "| 50 % pruned | norms |" in page
    assert "Not run yet" not in page


def test_without_rows_the_page_says_so_and_no_cell_is_listed_twice(tmp_path: Path) -> None:
    assert len({json.dumps(cell) for cell in recover.cells()}) == len(recover.cells())
    assert recover.main(["--report", "--results", str(tmp_path)]) == 0
    assert "Nothing was run." in (tmp_path / "recover.md").read_text()
