"""The benchmark of many tasks end to end on a tiny encoder."""

from pathlib import Path

import pytest

from benchmarks.costs import many_tasks
from benchmarks.harness.rows import Rows


@pytest.mark.end_to_end
def test_many_tasks(monkeypatch: pytest.MonkeyPatch, tiny_bert: str, tmp_path: Path) -> None:
    monkeypatch.setattr(many_tasks, "PROTOCOLS", {"cpu": {"rounds": 2, "batch": 4, "tokens": 4}})
    monkeypatch.setattr(many_tasks, "TASKS", (1, 2))
    many_tasks.main(["--model", tiny_bert, "--results", str(tmp_path), "--device", "cpu", "--threads", "1"])
    rows = {row["cell"]["head"]: row for row in Rows(tmp_path / "many_tasks.jsonl")}
    assert rows.keys() == many_tasks.HEADS.keys()
    for row in rows.values():
        assert list(row["arms"]) == list(row["operations"]) == ["one", "one again", "1 task", "2 tasks"]
        counts = row["operations"]
        assert counts["one"] == counts["one again"]
        # The passes are the same for any number of tasks; losses apart and a fused step a task are what is added.
        assert counts["1 task"] < counts["2 tasks"] < counts["1 task"] + 40
    norms, head, pooler = 5 * 2 * 16, 2 * 16 + 2, 16 * 16 + 16
    assert rows["classifier"]["entries"] == norms + head
    assert rows["pooler and classifier"]["entries"] == norms + head + pooler
    page = (tmp_path / "many_tasks.md").read_text()
    assert page.count("at most 1.10 of the time of one. Measured: ") == 4
    assert "not run" not in page


def test_many_tasks_without_rows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many_tasks.main(["--list", "--results", str(tmp_path)])
    assert capsys.readouterr().out.startswith("2 groups left")
    many_tasks.main(["--report", "--protocol", "gpu", "--results", str(tmp_path)])
    assert (tmp_path / "many_tasks_gpu.md").read_text().count("not run") == 2
