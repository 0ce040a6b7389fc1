"""The experiments of the key-component paper end to end on a tiny model: stages, masks, resume, tables."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.harness import masked
from benchmarks.harness.classification import PROTOCOLS, Place, load_base
from benchmarks.harness.rows import Rows
from benchmarks.harness.tasks import load_task
from benchmarks.papers import layernorm_key_component as script
from peft_lntune.analysis.change import MEASURES

NORM_ENTRIES = 5 * 16 * 2
FIFTH = NORM_ENTRIES // 5
MODEL = "cpu-tiny_bert0"  # the protocol's name says the model, by the name of its folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bert: str, tiny_data: Path) -> list[str]:
    """The command line of a run of two steps a cell."""
    protocol = dataclasses.replace(PROTOCOLS["cpu"], steps=2, search_steps=2, batch_size=4, mask_samples=8)
    monkeypatch.setitem(PROTOCOLS, "cpu", protocol)
    places = ["--data-dir", str(tiny_data), "--model", tiny_bert, "--results", str(tmp_path)]
    return [*places, "--tasks", "sst2", "--seeds", "0", "--jobs", "1", "--device", "cpu"]


def cells(folder: Path) -> list[tuple[str, str, float | None]]:
    rows = Rows(folder / "layernorm_key_component.jsonl")
    return [(row["cell"]["phase"], row["cell"]["arm"], row["cell"].get("density")) for row in rows]


@pytest.mark.end_to_end
def test_run_resume_and_report(short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*short, "--densities", "0.05", "0.2", "--mask-tasks", "trec"]
    assert script.main(chosen) == 0
    found = cells(tmp_path)
    path = tmp_path / "layernorm_key_component.jsonl"
    assert len(found) == len(path.read_text().splitlines())
    # In order of worth, each kind of mask searched at one density before any of it is reported.
    assert found.index(("final", "head", None)) < found.index(("search", "fisher", 0.2))
    assert found.index(("final", "random", 0.2)) < found.index(("final", "fisher", 0.05))
    assert found.index(("final", "fisher", 0.05)) < found.index(("final", "change", 0.2))
    assert found[-1] == ("final", "union", 0.2)
    assert [cell for cell in found if cell[0] == "search" and cell[2] == 0.05] == []

    rows = {
        (row["cell"]["arm"], row["cell"].get("density")): row for row in Rows(path) if row["cell"]["phase"] == "final"
    }
    assert rows["ln", None]["num_method_params"] == NORM_ENTRIES
    assert rows["ln-ffn", None]["num_method_params"] == 2 * 16 * 2
    for name in (*script.FIRST_MASKS, *script.MORE_MASKS, "union"):
        assert rows[name, 0.2]["num_method_params"] == FIFTH
    assert rows["fisher", 0.05]["num_method_params"] == FIFTH // 4
    assert {row["cell"]["protocol"] for row in Rows(path)} == {MODEL}

    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    script.main([*chosen, "--list"])
    assert capsys.readouterr().out.startswith("1 runs left")
    assert script.main(chosen) == 0
    assert cells(tmp_path) == found

    page = (tmp_path / f"layernorm_key_component_{MODEL}.md").read_text()
    assert "- Not measured yet: Fisher at 20 % within 1 point of all norms, on average over sst2, trec" in page
    assert "| sst2 | trec | 32 | 20.0 % |" in page
    # Claims and lines of the list, with and without the head, and the table of the abstract without it.
    assert page.count("of 1 runs") == (2 * 2 + 1) * len(MEASURES)
    for name in (f"layernorm_key_component_{MODEL}.png", f"layernorm_change_sst2_{MODEL}.png"):
        assert (tmp_path / name).stat().st_size > 0
    header, first, *_ = (tmp_path / f"layernorm_change_sst2_{MODEL}.csv").read_text().splitlines()
    assert header == "component,layer,parameter,entries,mean_change,relative_to_mean,relative_to_std"
    assert first.startswith("word embeddings,,weight,4096,")


def test_a_report_without_rows_says_so(short: list[str], tmp_path: Path) -> None:
    script.main([*short, "--report"])
    page = (tmp_path / f"layernorm_key_component_{MODEL}.md").read_text()
    (open_claims,) = (line for line in page.splitlines() if line.startswith("- Not measured yet: "))
    assert open_claims.count("; ") == len(script.BOUNDS) + 2 * len(MEASURES) - 1
    assert "| ln: all norms |" not in page
    assert "- arms, sst2, trec: all." in page


@pytest.mark.end_to_end
def test_masks_have_their_size_and_differ(short: list[str], tmp_path: Path, tiny_bert: str, tiny_data: Path) -> None:
    protocol, place = PROTOCOLS["cpu"], Place(tiny_bert, tiny_data, "cpu")
    rates = {("sst2", "ln", "float32"): 1e-2}

    def masks(arm: str, **at: object) -> torch.Tensor:
        cell = {"phase": "final", "task": "sst2", "arm": arm, "dtype": "float32", "seed": 0, "density": 0.2, **at}
        task = load_task("sst2", tiny_data, tiny_bert)
        chosen = masked.CHOICES[arm](masked.Source(cell, task, protocol, place, rates, tmp_path))
        assert chosen.keys() <= dict(load_base(cell, protocol, place, task).named_parameters()).keys()
        return torch.cat([mask.flatten() for mask in chosen.values()])

    by_score = [masks(arm) for arm in ("fisher", "lowest-fisher", "random", "magnitude", "change")]
    assert all(int(mask.sum()) == FIFTH for mask in by_score)
    assert not (by_score[0] & by_score[1]).any()
    assert not torch.equal(masks("random"), masks("random", seed=1))
    assert not torch.equal(masks("random"), masks("random", task="trec"))
    others = ["sst2", "trec"]
    union = masks("union", mask_tasks=others)
    assert torch.equal(union, masks("fisher") | masks("union", mask_tasks=["trec"]))
    assert int(masks("random-union", mask_tasks=others).sum()) == int(union.sum())


def test_scores_are_made_once(tmp_path: Path, short: list[str], tiny_bert: str, tiny_data: Path) -> None:
    protocol, place = PROTOCOLS["cpu"], Place(tiny_bert, tiny_data, "cpu")
    cell = {"phase": "final", "task": "sst2", "arm": "fisher", "dtype": "float32", "seed": 0, "density": 0.2}
    source = masked.Source(cell, load_task("sst2", tiny_data, tiny_bert), protocol, place, {}, tmp_path)
    masked.fisher(source)
    (kept,) = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    masked.lowest_fisher(source)
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]


def test_rows_of_the_accuracy_benchmark_count(tmp_path: Path) -> None:
    place = {"protocol": "cpu", "task": "sst2", "dtype": "float32", "seed": 0}
    path = tmp_path / "accuracy.jsonl"
    cells = [{**place, "phase": phase, "arm": arm} for phase in ("search", "final") for arm in ("ln", "full")]
    for cell in cells:
        Rows(path).append({"cell": cell})
    rows = Rows(tmp_path / "own.jsonl")
    rows.adopt(script.shared_rows(tmp_path))
    assert [cell in rows for cell in cells] == [True, True, True, False]
    rows.append({"cell": cells[-1]})
    assert [row["cell"] for row in Rows(tmp_path / "own.jsonl")] == cells[-1:]


def test_an_unknown_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse(["--tasks", "sst3"])
    assert "unknown task 'sst3'; the tasks are sst2" in capsys.readouterr().err
