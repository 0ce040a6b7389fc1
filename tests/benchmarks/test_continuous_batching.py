"""The benchmark of continuous batching end to end on a tiny decoder, and what does not depend on the model's size."""

from pathlib import Path

import pytest

from benchmarks.costs import continuous_batching
from benchmarks.harness.rows import Rows
from tests.continuous.engines import speaking


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Few tenants and few tokens, and a decoder of random weights in a folder."""
    tiny = {"rounds": 2, "tenants": 4, "prompt": (2, 5), "new": 4}
    monkeypatch.setattr(continuous_batching, "PROTOCOLS", {"cpu": tiny})
    monkeypatch.setattr(continuous_batching, "COUNTED", (1, 4))
    monkeypatch.setattr(continuous_batching, "SPREAD", 1.0)
    speaking().unload().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.end_to_end
def test_continuous_batching(small: str, tmp_path: Path) -> None:
    arguments = ["--model", small, "--results", str(tmp_path), "--device", "cpu", "--threads", "1"]
    assert continuous_batching.main(arguments) == 0
    rows = {row["cell"]["measure"]: row for row in Rows(tmp_path / "continuous_batching.jsonl")}
    assert (rows["tokens"]["equal"], rows["tokens"]["other_than_base"]) == (4, 4)
    counts = rows["operations"]["operations"]
    assert counts["1"] == counts["4"]
    assert all(1 < ours / base < 1.5 for ours, base in zip(counts["1"], counts["base"], strict=True))
    assert list(rows["time"]["arms"]) == ["base", "base again", "bank"]
    page = (tmp_path / "continuous_batching.md").read_text()
    assert page.count("- Claim: ") == 3
    assert "not run" not in page


def test_without_rows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    continuous_batching.main(["--list", "--results", str(tmp_path)])
    assert capsys.readouterr().out.startswith("3 groups left")
    continuous_batching.main(["--report", "--protocol", "gpu", "--results", str(tmp_path)])
    assert (tmp_path / "continuous_batching_gpu.md").read_text().count("not run") == 3
