"""The cost benchmarks end to end on a tiny encoder, and the bounds that do not depend on the model's size."""

from pathlib import Path

import pytest

from benchmarks.costs import fisher_cost, module_cost, operations, size, speed
from benchmarks.harness.rows import Rows


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder alone, and few rows of batch."""
    monkeypatch.setattr(operations, "MODELS", ("minilm",))
    monkeypatch.setattr(operations, "ADAPTERS", (1, 3))
    monkeypatch.setattr(operations, "BATCH", 6)
    tiny = {"rounds": 2, "batch": 2, "tokens": 4, "new_tokens": 2, "layers": 2, "width": 16, "dtype": "float32"}
    monkeypatch.setattr(speed, "PROTOCOLS", {"cpu": tiny})


@pytest.mark.end_to_end
@pytest.mark.usefixtures("small")
def test_operations(tiny_bert: str, tmp_path: Path) -> None:
    operations.main(["--model", tiny_bert, "--results", str(tmp_path)])
    rows = {(row["cell"]["measure"], row["cell"]["arm"]): row for row in Rows(tmp_path / "operations.jsonl")}
    base = rows["evaluation", "base"]["operations"]
    assert rows["evaluation", "ln"]["operations"] == base
    assert rows["trainable", "ln"]["operations"] <= base + rows["trainable", "ln"]["tuned_tensors"]
    assert rows["trainable", "plain"]["operations"] == base
    more = rows["training", "ln"]["operations"] - rows["training", "plain"]["operations"]
    assert more <= 2 * rows["training", "ln"]["tuned_tensors"]
    assert rows["training", "full"]["operations"] > rows["training", "plain"]["operations"]
    table = (tmp_path / "operations.md").read_text()
    assert table.count("Verdict: holds.") == 4


def test_operations_without_rows_say_so(tmp_path: Path) -> None:
    operations.main(["--report", "--results", str(tmp_path)])
    assert "| ln | not run | not run |" in (tmp_path / "operations.md").read_text()


@pytest.mark.end_to_end
def test_size(tiny_bert: str, tmp_path: Path) -> None:
    size.main(["--model", tiny_bert, "--results", str(tmp_path)])
    rows = {(row["cell"]["arm"], row["cell"]["dtype"]): row for row in Rows(tmp_path / "size.jsonl")}
    assert all(rows["ln", dtype]["file_size"] >= 4 * rows["ln", dtype]["num_method_params"] for dtype in size.DTYPES)
    assert "| ln | 160 |" in (tmp_path / "size.md").read_text()


@pytest.mark.end_to_end
@pytest.mark.usefixtures("small")
def test_speed(tiny_bert: str, tmp_path: Path) -> None:
    speed.main(["--model", tiny_bert, "--results", str(tmp_path), "--device", "cpu", "--threads", "1"])
    rows = list(Rows(tmp_path / "speed.jsonl"))
    assert len(rows) == 4
    for row in rows:
        first = next(iter(row["arms"].values()))
        assert first["ratio"] == [1.0, 1.0, 1.0]
        assert first["accelerator_memory_max"] > 0
    table = (tmp_path / "speed.md").read_text()
    assert "| plain again |" in table
    assert "not run" not in table


@pytest.mark.end_to_end
def test_fisher_cost(monkeypatch: pytest.MonkeyPatch, tiny_bert: str, tmp_path: Path) -> None:
    tiny = {"rounds": 2, "batches": 2, "batch": 3, "tokens": 4}
    monkeypatch.setattr(fisher_cost, "PROTOCOLS", {"cpu": tiny})
    fisher_cost.main(["--model", tiny_bert, "--results", str(tmp_path), "--device", "cpu", "--threads", "1"])
    (row,) = Rows(tmp_path / "fisher_cost.jsonl")
    assert row["difference"] < 1e-5
    assert row["arms"]["step"]["ratio"] == [1.0, 1.0, 1.0]
    assert all(arm["accelerator_memory_max"] > 0 for arm in row["arms"].values())
    table = (tmp_path / "fisher_cost.md").read_text()
    assert "| step again |" in table
    assert table.count("- Claim: ") == 2


def test_fisher_cost_without_rows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fisher_cost.main(["--list", "--results", str(tmp_path)])
    assert capsys.readouterr().out.startswith("1 groups left")
    fisher_cost.main(["--report", "--protocol", "gpu", "--results", str(tmp_path)])
    assert "not run" in (tmp_path / "fisher_cost_gpu.md").read_text()


@pytest.mark.end_to_end
def test_module_cost(monkeypatch: pytest.MonkeyPatch, tiny_bert: str, tmp_path: Path) -> None:
    monkeypatch.setattr(module_cost, "PROTOCOLS", {"cpu": {"rounds": 2, "batch": 2, "tokens": 4}})
    module_cost.main(["--model", tiny_bert, "--results", str(tmp_path), "--device", "cpu", "--threads", "1"])
    rows = {row["cell"]["tuned"]: row for row in Rows(tmp_path / "module_cost.jsonl")}
    assert rows.keys() == module_cost.GROUPS.keys()
    for row in rows.values():
        entries = row["num_method_params"]
        assert entries["deltas"] == entries["plain"] > 0
        peaks = {name: arm["accelerator_memory_max"] for name, arm in row["arms"].items()}
        assert peaks["plain"] == peaks["plain again"] <= peaks["deltas"]
    assert rows["query"]["num_method_params"]["supermask"] < rows["query"]["num_method_params"]["deltas"]
    table = (tmp_path / "module_cost.md").read_text()
    assert table.count("| supermask |") == len(module_cost.MASKED)
    assert "not run" not in table


def test_module_cost_without_rows_says_so(tmp_path: Path) -> None:
    module_cost.main(["--report", "--results", str(tmp_path)])
    assert (tmp_path / "module_cost.md").read_text().count("not run") == len(module_cost.GROUPS)
