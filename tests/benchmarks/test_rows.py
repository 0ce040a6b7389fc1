"""Rows survive a kill: what is written stays, what is torn runs again."""

from pathlib import Path

import pytest

from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.runner import run_cells

CELLS = [{"arm": arm, "seed": seed} for arm in ("ln", "full") for seed in (0, 1)]


def test_a_row_that_exists_is_not_run_again(tmp_path: Path) -> None:
    ran: list[object] = []

    def run(cell: Row) -> Row:
        ran.append(cell)
        return {"metrics": {"accuracy": 0.5}}

    run_cells(CELLS[:2], Rows(tmp_path / "rows.jsonl"), run, jobs=1, title="first")
    run_cells(CELLS, Rows(tmp_path / "rows.jsonl"), run, jobs=1, title="second")
    assert ran == CELLS


def test_a_torn_line_is_run_again_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = Rows(path)
    for cell in CELLS[:2]:
        rows.append({"cell": cell})
    path.write_bytes(path.read_bytes()[:-9])
    again = Rows(path)
    assert CELLS[0] in again
    assert CELLS[1] not in again
    again.append({"cell": CELLS[1]})
    assert [row["cell"] for row in Rows(path)] == CELLS[:2]


def test_a_second_row_of_a_cell_is_refused(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append({"cell": CELLS[0]})
    with pytest.raises(ValueError, match="has a row already"):
        rows.append({"cell": CELLS[0]})


def test_a_run_that_raises_leaves_no_row_and_the_others_go_on(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")

    def run(cell: Row) -> Row:
        if cell == CELLS[0]:
            raise RuntimeError("out of memory")
        return {}

    run_cells(CELLS, rows, run, jobs=1, title="test")
    assert CELLS[0] not in rows
    assert len(rows) == len(CELLS) - 1


def test_rows_of_another_experiment_are_known_but_not_its_own(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append({"cell": {"task": "sst2"}, "accuracy": 0.5})
    rows.adopt([{"cell": {"task": "sst2"}, "accuracy": 0.9}, {"cell": {"task": "stsb"}, "accuracy": 0.8}])
    assert [row["accuracy"] for row in rows] == [0.5, 0.8]
    assert [row["accuracy"] for row in rows.own()] == [0.5]
