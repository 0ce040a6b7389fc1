"""The joining table end to end on a tiny model: what is compared, resume, tables, pictures."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.harness.classification import PROTOCOLS, Protocol
from benchmarks.harness.rows import Rows
from benchmarks.harness.tasks import load_task
from benchmarks.papers import norm_entries as script

MODEL = "cpu-tiny_bert0"  # the protocol's name says the model, by the name of its folder
CPU = torch.device("cpu")
GAINS = 5 * 16


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> Protocol:
    short = dataclasses.replace(PROTOCOLS["cpu"], steps=2, search_steps=2, batch_size=4, mask_samples=8)
    monkeypatch.setitem(PROTOCOLS, "cpu", short)
    monkeypatch.setattr(script, "SIZES", {"rows": 4, "partitions": 2, "groups": 3, "bins": 2, "points": 2})
    return short


@pytest.fixture
def short(protocol: Protocol, tmp_path: Path, tiny_bert: str, tiny_data: Path) -> list[str]:
    """The command line of a run of two steps a cell."""
    places = ["--data-dir", str(tiny_data), "--model", tiny_bert, "--results", str(tmp_path)]
    return [*places, "--tasks", "sst2", "--seeds", "0", "--jobs", "1", "--device", "cpu"]


@pytest.mark.full
def test_run_resume_and_report(short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(short) == 0
    path = tmp_path / "norm_entries.jsonl"
    *searches, last = Rows(path)
    assert {row["cell"]["phase"] for row in searches} == {"search"}
    assert last["entries"] == {"together": 2 * GAINS, "gains": GAINS, "biases": GAINS}
    assert set(last["correlations"]["gains"]) == set(script.PAIRS)
    assert set(last["bins"]["biases"]) == {*script.SCORES, "random"}
    # The tiny model is fresh: its gains are all 1 and its biases all 0.
    assert last["correlations"]["gains"]["magnitude, Fisher"] is None
    assert last["correlations"]["together"]["magnitude, Fisher"] is not None

    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    script.main([*short, "--list"])
    assert capsys.readouterr().out.startswith("1 runs left")
    assert script.main(short) == 0
    again = list(Rows(path))[-1]
    assert again["correlations"] == last["correlations"]

    page = (tmp_path / f"norm_entries_{MODEL}.md").read_text()
    assert "| magnitude, Fisher |" in page
    assert "larger gains contribute more: rank correlation, or difference of two, above 0 on average" in page
    assert "| gains | random |" in page
    for name in (f"norm_entries_{MODEL}.png", f"norm_entries_left_out_{MODEL}.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_a_report_without_rows_says_so(short: list[str], tmp_path: Path) -> None:
    script.main([*short, "--report"])
    page = (tmp_path / f"norm_entries_{MODEL}.md").read_text()
    (open_claims,) = (line for line in page.splitlines() if line.startswith("- Not measured yet: "))
    assert open_claims.count("; ") == len(script.WANTED) - 1
    assert "| magnitude, Fisher |" not in page
    assert "![" not in page


def test_what_has_not_moved_is_of_no_use(protocol: Protocol, tiny_bert: str, tiny_data: Path) -> None:
    task = load_task("sst2", tiny_data, tiny_bert).held_out()
    cell = {"seed": 0, **script.SIZES}
    torch.manual_seed(0)  # of the fresh head
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    same = {name: value.detach().clone() for name, value in base.named_parameters()}
    still = script.compare(base, same, task, cell, protocol, CPU)
    assert still["answers"]["tuned"] == still["answers"]["reset"]
    assert still["contributed"] == 0
    assert {value for each in still["bins"]["gains"].values() for bin in each for value in bin} == {0.0}

    moved = {name: value + 0.5 * name.endswith("layer.1.output.LayerNorm.bias") for name, value in same.items()}
    moved["classifier.bias"] = torch.tensor([3.0, -3.0])
    found = script.compare(base, moved, task, cell, protocol, CPU)
    # The head's step is in both answers, so only the norms' is told.
    assert found["answers"]["reset"] != still["answers"]["reset"]
    assert {bin[0] for each in found["bins"]["gains"].values() for bin in each} == {0.0}
    lowest, highest = found["bins"]["biases"]["movement"]
    assert lowest == [0.0, 0.0]
    assert highest[0] == pytest.approx(found["answers"]["reset"]["loss"] - found["answers"]["tuned"]["loss"], abs=2e-5)
    assert highest[0] != 0
    assert found["correlations"]["gains"]["movement, contribution"] is None
    assert found["group_correlations"]["gains"]["contribution"] is None
    assert found["group_correlations"]["biases"]["contribution"] is not None
    assert found["correlations"]["biases"]["movement, contribution"] is not None


def row_of(seed: int, value: float, fisher: float) -> dict[str, Any]:
    pairs = dict.fromkeys(script.PAIRS, value) | {"Fisher, contribution": fisher}
    one = {"loss": 0.5, "accuracy": 0.75}
    bins = {score: [[0.25, 0.01], [0.75, 0.02]] for score in (*script.SCORES, "random")}
    return {
        "cell": {"seed": seed},
        "answers": {"tuned": one, "reset": one},
        "contributed": 0.25,
        "correlations": {"together": pairs, "gains": pairs, "biases": dict.fromkeys(script.PAIRS)},
        "group_correlations": {kind: dict.fromkeys(("contribution", *script.SCORES), 0.5) for kind in script.KINDS},
        "bins": {"gains": bins, "biases": bins},
    }


def test_what_is_said(protocol: Protocol, tmp_path: Path) -> None:
    rows = {"sst2": [row_of(0, 0.1, 0.3), row_of(1, 0.2, 0.5)], "trec": [row_of(1, 0.2, 0.3), row_of(0, 0.3, 0.3)]}
    sizes = {"rows": 4, "partitions": 2, "groups": 3, "bins": 2, "points": 2}
    script.write_report(tmp_path, script.Scope(PROTOCOLS["cpu"], sizes, (0, 1), rows, ""))
    page = (tmp_path / "norm_entries.md").read_text()
    lines = {line.split(":")[1].strip(): line for line in page.splitlines() if line.startswith("- Claim")}
    # By seed: (0.3 + 0.3) / 2 - (0.1 + 0.3) / 2, and (0.5 + 0.3) / 2 - (0.2 + 0.2) / 2.
    assert (
        "15.0 ± 7.1 (by seed: 10.0, 20.0; interval: -8.4 to 38.4). Verdict: inconclusive; "
        in lines["Fisher information ranks contributions better than magnitude"]
    )
    assert (
        "-15.0 ± 7.1 (by seed: -10.0, -20.0; interval: -38.4 to 8.4). Verdict: inconclusive; "
        in lines["movement ranks contributions better than Fisher information"]
    )
    open_claims = next(line for line in page.splitlines() if line.startswith("- Not measured yet: "))
    assert "larger biases contribute more" in open_claims
    assert "| Fisher, contribution | 40.0 ± 14.1 | 40.0 ± 14.1 | - | 30.0 ± 0.0 |" in page
    assert "| gains | Fisher | 0.750 ± 0.000 (2.0 ± 0.0) | 0.250 ± 0.000 (1.0 ± 0.0) |" in page


def test_only_the_rate_of_the_norms_is_shared(tmp_path: Path) -> None:
    place = {"protocol": "cpu", "task": "sst2", "dtype": "float32", "seed": 0}
    found = [{**place, "phase": phase, "arm": arm} for phase in ("search", "final") for arm in ("ln", "full")]
    for cell in found:
        Rows(tmp_path / "accuracy.jsonl").append({"cell": cell})
    assert [row["cell"] for row in script.shared_rows(tmp_path)] == found[:1]


def test_an_unknown_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse(["--tasks", "sst3"])
    assert "unknown task 'sst3'; the tasks are sst2" in capsys.readouterr().err
