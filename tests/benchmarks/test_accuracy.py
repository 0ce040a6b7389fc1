"""The accuracy experiment end to end on a tiny model: order, resume, list, table."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.harness.classification import PROTOCOLS, best_rates, search_cells
from benchmarks.harness.rows import Rows
from benchmarks.papers import accuracy


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bert: str, tiny_data: Path) -> list[str]:
    """The command line of a run of two steps a cell."""
    protocol = dataclasses.replace(PROTOCOLS["cpu"], steps=2, search_steps=2, batch_size=4)
    monkeypatch.setitem(PROTOCOLS, "cpu", protocol)
    places = ["--data-dir", str(tiny_data), "--model", tiny_bert, "--results", str(tmp_path)]
    return [*places, "--tasks", "sst2", "--seeds", "0", "--jobs", "1", "--device", "cpu"]


def test_run_resume_list_and_report(short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*short, "--arms", "head", "bitfit", "--dtypes", "float32"]
    accuracy.main(chosen)
    path = tmp_path / "accuracy.jsonl"
    whole = path.read_text()
    assert len(whole.splitlines()) == 2 * (3 + 1)

    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    accuracy.main([*chosen, "--list"])
    assert capsys.readouterr().out.startswith("1 runs left")
    accuracy.main(chosen)
    first, second = Rows(path), whole.splitlines()
    assert len(first) == len(second)

    table = (tmp_path / "accuracy_cpu-tiny_bert0.md").read_text()
    assert "| lora |" not in table
    assert "- float32 base, sst2: stock-ln" not in table
    assert "all but " in table.partition("## Not run here")[2]
    assert "(1 of 3 runs)" in table
    assert (tmp_path / "accuracy_cpu-tiny_bert0.png").stat().st_size > 0
    assert (tmp_path / "environment.json").exists()


def test_a_repeated_run_gives_the_same_figures(short: list[str], tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        folder = tmp_path / name
        accuracy.main([*short, "--results", str(folder), "--arms", "lora", "--dtypes", "float32"])
        found.append([(row["cell"], row["metrics"]) for row in Rows(folder / "accuracy.jsonl")])
    assert found[0] == found[1]


def test_equal_scores_choose_the_smaller_rate(tmp_path: Path) -> None:
    rows, protocol = Rows(tmp_path / "rows.jsonl"), PROTOCOLS["cpu"]
    place = ("sst2", "ln", "float32")
    for cell in reversed(search_cells(protocol, *place)):
        assert best_rates(rows, protocol, [place]) == {}
        rows.append({"cell": cell, "learning_rate": cell["learning_rate"], "metrics": {"held_out_accuracy": 0.5}})
    assert best_rates(rows, protocol, [place])[place] == min(row["learning_rate"] for row in rows)
