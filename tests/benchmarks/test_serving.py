"""The serving benchmark end to end on a tiny encoder, and the bounds that do not depend on the model's size."""

from pathlib import Path

import pytest

from benchmarks.costs import serving
from benchmarks.harness.rows import Rows


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and few adapters."""
    tiny = {"rounds": 2, "batch": 6, "tokens": 4, "short": 1, "sizes": (3, 9), "loaded": 2}
    monkeypatch.setattr(serving, "PROTOCOLS", {"cpu": tiny})
    monkeypatch.setattr(serving, "DISTINCT", (1, 3))
    monkeypatch.setattr(serving, "MANY", 6)
    monkeypatch.setattr(serving, "MIXED", 3)


@pytest.mark.end_to_end
@pytest.mark.usefixtures("small")
def test_serving(tiny_bert: str, tmp_path: Path) -> None:
    arguments = ["--model", tiny_bert, "--results", str(tmp_path), "--device", "cpu", "--threads", "1"]
    assert serving.main(arguments) == 0
    rows = {row["cell"]["measure"]: row for row in Rows(tmp_path / "serving.jsonl")}
    counts = {count for by_distinct in rows["operations"]["operations"].values() for count in by_distinct.values()}
    assert len(counts) == 1
    mixed = rows["mixed"]["by_tokens"]
    assert [list(arms) for arms in mixed.values()] == [["bank", "bank again", "ln", "lora", "road"]] * 2
    assert all(2 * arms["bank"]["operations"] < arms["lora"]["operations"] for arms in mixed.values())
    assert list(rows["switching"]["whole"]) == ["3", "9"]
    assert rows["loading"]["adapters"] == {"bank file": 9, "directories": 2, "load_adapter": 2}
    assert min(rows["loading"]["a_second"].values()) > 0
    assert rows["memory"]["row_bytes"] == 4 * 16 * 2 * 5  # weight and bias of five norms
    page = (tmp_path / "serving.md").read_text()
    assert page.count("- Claim: ") == 8
    assert "not run" not in page


def test_serving_without_rows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serving.main(["--list", "--results", str(tmp_path)])
    assert capsys.readouterr().out.startswith("6 groups left")
    serving.main(["--report", "--protocol", "gpu", "--results", str(tmp_path)])
    assert (tmp_path / "serving_gpu.md").read_text().count("not run") == 6
