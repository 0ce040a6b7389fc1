"""The GPU benchmark: its plan, what becomes of failures, and a whole run with tiny models on a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.harness.arms import find_arm
from benchmarks.harness.made import made_inputs
from benchmarks.harness.mixed import add_copies
from benchmarks.harness.rows import Rows
from benchmarks.harness.timing import LEAST, take_turns
from benchmarks.on_gpu import checks, report, worker
from benchmarks.on_gpu.bench import Bench, SkippedError
from benchmarks.on_gpu.plan import MINUTES, PARTS, START, cells_of, deadlines

CPU = torch.device("cpu")
DRY = ["--device", "cpu", "--small"]


def test_the_plan_fits_its_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ends = list(deadlines(PARTS, 60 * MINUTES).values())
    assert ends == sorted(ends)
    assert ends[0] > START
    assert ends[-1] == pytest.approx(60 * MINUTES)
    assert all(set(part.needs) <= set(checks.CHECKS) and set(part.cells[0]) for part in PARTS)
    assert PARTS[0].name == "checks", "what they guard is measured later"
    assert set(report.WRITERS) == {part.name for part in PARTS}
    assert gpu.main(["--list", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{sum(len(part.cells) for part in PARTS)} cells in at most 9.0 min:")
    assert all(f"  {part.name}: " in said for part in PARTS)
    assert gpu.main(["--report", "--results", str(tmp_path)]) == 0
    assert "no page was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [float("nan"), 2e-3])
def test_a_check_that_is_wrong_or_not_a_number_does_not_pass(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.CHECKS, "mixed", (lambda bench: {"a": error, "b": 1e-9}, 1e-3, "equal"))
    row = checks.run_cell({"check": "mixed"}, Bench(CPU, small=True))
    assert not row["passed"]
    json.dumps(row, allow_nan=False)


def test_failures_and_absent_packages_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(cell: Any, bench: Bench) -> dict[str, Any]:
        raise cell["error"]

    class Broken:
        pass

    part = Broken()
    part.run = run  # type: ignore[attr-defined]
    monkeypatch.setattr(worker, "find_part", lambda name: part)
    bench = Bench(CPU, small=True)
    row = worker.run_cell({"part": "training", "error": ValueError("no room\nfor it")}, bench)
    assert (row["status"], row["reason"], row["device"]) == ("failed", "ValueError: no room", "cpu")
    row = worker.run_cell({"part": "training", "error": SkippedError("not installed")}, bench)
    assert (row["status"], row["reason"]) == ("skipped", "not installed")
    assert row["versions"]["torch"] == torch.__version__
    assert row["seed"] == worker.SEED


def test_a_box_ends_the_rounds() -> None:
    calls: list[int] = []
    seconds = take_turns({"a": lambda: calls.append(0)}, 50, CPU, warm_up=1, box=0.0)
    assert len(seconds["a"]) == LEAST
    assert len(calls) == LEAST + 1


@pytest.mark.parametrize("arm", ["ln", "lora"])
def test_copied_adapters_answer_like_the_one_they_were_copied_from(arm: str) -> None:
    model: Any = find_arm(arm).tune(Bench(CPU, small=True).model("llama-3.2-1b", "float32")).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    add_copies(model, ["tenant0", "tenant1"])
    inputs = made_inputs(3, 2, CPU)
    with torch.no_grad():
        expected = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
        rows = model(**inputs, adapter_names=["tenant1", "__base__", "tenant0"]).logits
    torch.testing.assert_close(rows[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(rows[1], base[1])
    assert not torch.allclose(rows[0], base[0])


@pytest.mark.end_to_end
def test_a_whole_run_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Time that no machine uses up: parts that are cut off are the next test's.
    assert gpu.main([*DRY, "--results", str(tmp_path), "--minutes", "60"]) == 0
    rows = list(Rows(tmp_path / "gpu.jsonl"))
    assert len(rows) == sum(len(part.cells) for part in PARTS)
    statuses = {json.dumps(row["cell"]): row["status"] for row in rows}
    assert set(statuses.values()) <= {"success", "skipped"}
    assert list(statuses.values()).count("skipped") <= 2, "flash_attn and bitsandbytes"
    ran = [row for row in rows if row["status"] == "success"]
    assert all(row["device"] == "cpu" and row["seed"] == 0 and row["versions"]["torch"] for row in ran)
    assert all(row["passed"] for row in ran if row["cell"]["part"] == "checks")
    moved = [row["moved"] for row in ran if row["cell"]["part"] == "half precision" and row["cell"]["arm"] == "ln"]
    assert moved == [1.0] * 6
    page = (tmp_path / "gpu_small.md").read_text()
    assert all(f"### {part.title}\n" in page for part in PARTS)
    assert "test the script" in page
    capsys.readouterr()
    assert gpu.main([*DRY, "--results", str(tmp_path)]) == 0
    assert len(list(Rows(tmp_path / "gpu.jsonl"))) == len(rows), "a cell that has a row is not run again"


@pytest.mark.end_to_end
def test_a_failed_check_stops_what_it_guards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Rows(tmp_path / "gpu.jsonl")
    for cell in cells_of(PARTS[0], "small", "cpu"):
        passed = cell["check"] != "bank"
        outcome = {"passed": passed, "largest": 0.5, "tolerance": 0.1, "wanted": "equal rows"}
        if cell["check"] != "prefix":
            rows.append({"cell": cell, "status": "success", **outcome})
    arguments = [*DRY, "--results", str(tmp_path), "--parts", "tenants", "attention", "quantized"]
    assert gpu.main(arguments) == 0
    found = {part: [] for part in ("tenants", "attention", "quantized")}
    for row in Rows(tmp_path / "gpu.jsonl"):
        if row["cell"]["part"] != "checks":
            found[row["cell"]["part"]].append((row["status"], row.get("reason")))
    assert found["tenants"] == [("stopped", "the check 'bank' failed: 0.5 instead of at most 0.1")] * 3
    assert not found["attention"], "its check has no row"
    assert found["quantized"][0][0] == "success"
    assert "not run: attention, sdpa: the check 'prefix' has no row" in capsys.readouterr().out
    page = (tmp_path / "gpu_small.md").read_text()
    assert "| bank | equal rows | 5.0e-01 | 0.1 | **failed** |" in page
    assert "- tenants, eager, 1 tenants: stopped: the check 'bank' failed" in page


@pytest.mark.end_to_end
def test_what_takes_too_long_is_killed_and_a_new_process_goes_on() -> None:
    process = worker.Worker("cpu", True, None)
    try:
        process.start(120)
        cell = cells_of(PARTS[0], "small", "cpu")[0]
        row = process.measure(cell, 1.0, 0.0)
        assert row == {"status": "failed", "reason": "not finished after 0 s"}
        process.start(120)
        row = process.measure(cell, 60.0, 120.0)
        assert row["passed"]
    finally:
        process.kill()
