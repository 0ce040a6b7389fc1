"""The table of an abstract's claims, and the page on how far norms are from full fine-tuning."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.answers import Answer, answer_table, measured_settings
from benchmarks.harness.claims import Finding
from benchmarks.harness.classification import PROTOCOLS, final_cells, search_cells
from benchmarks.harness.comparison import Bound, Comparison, Side
from benchmarks.harness.paired import FAILS, HOLDS, INCONCLUSIVE
from benchmarks.harness.rows import Rows
from benchmarks.papers import near_full

SEEDS = (0, 1, 2)
SCORES = {"head": (0.5, 0.5, 0.5), "ln": (0.80, 0.81, 0.79), "full": (0.90, 0.91, 0.89), "lora+ln": (0.90, 0.91, 0.89)}


def found(verdict: str | None, more: str = "") -> Finding:
    return Finding("a above b", None if verdict is None else "1.0", verdict, more=more)


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ((HOLDS, HOLDS), HOLDS),
        ((HOLDS, INCONCLUSIVE), INCONCLUSIVE),
        ((HOLDS, INCONCLUSIVE, FAILS), FAILS),
        ((HOLDS, None), HOLDS),
        ((None,), None),
    ],
)
def test_a_claim_holds_if_all_its_comparisons_do(words: tuple[str | None, ...], verdict: str | None) -> None:
    assert Answer("a helps", [found(word) for word in words]).verdict == verdict


def test_the_table_has_a_line_for_each_setting_with_rows() -> None:
    of_mini = [Answer("a helps", [found(INCONCLUSIVE, "9 more")]), Answer("b helps", [found(None)])]
    of_mpnet = [Answer("a helps", [found(HOLDS)]), Answer("b helps", [found(None)])]
    lines = answer_table({"MiniLM": of_mini, "MPNet": of_mpnet}).splitlines()[2:]
    assert lines == [
        "| a helps | MiniLM | inconclusive | a above b: 1.0, inconclusive | 9 more |",
        "|  | MPNet | holds | a above b: 1.0, holds | - |",
        "| b helps | - | not measured yet | - | - |",
    ]


def rows_of(path: Path, protocol: str, task: str, **scores: Any) -> Rows:
    rows = Rows(path)
    for arm, each in {**SCORES, **scores}.items():
        for cell, score in zip(final_cells(PROTOCOLS[protocol], task, arm, "float32", SEEDS), each, strict=True):
            row = {"cell": cell, "metrics": {"accuracy": score}, "num_method_params": 9, "steps": 2, "batch_size": 4}
            rows.append({**row, "learning_rate": 0.1})
    return rows


def test_the_settings_are_those_with_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "rows.jsonl", "mpnet", "sst2")

    def answers(compared: Comparison) -> list[Answer]:
        bound = Bound(Side("ln", "ln"), Side("full", "full"), "above full")
        return [Answer("norms are better", [compared.asked(bound)])]

    settings = measured_settings(rows, PROTOCOLS["cpu"], ["sst2", "trec"], SEEDS, answers)
    ((said, (answer,)),) = settings.items()
    assert said == f"{PROTOCOLS['mpnet'].said}: sst2"
    assert said.startswith("all-mpnet-base-v2, ")
    assert answer.verdict == FAILS
    assert answer.findings[0].short == "-10.0 (-10.0 to -10.0)"


def test_where_norms_are_near_full(tmp_path: Path) -> None:
    rows_of(tmp_path / "accuracy.jsonl", "cpu", "sst2")
    rows_of(tmp_path / "unified_framework.jsonl", "mpnet", "trec", ln=SCORES["full"])
    near_full.write_report(tmp_path)
    page = (tmp_path / "near_full.md").read_text()
    assert "- Within a point: trec, all-mpnet-base-v2, 2 x 4." in page
    assert "- Further away: sst2, MiniLM, 2 x 4." in page
    assert "| MiniLM | sst2 | classes | - | 2 x 4 | one | -10.0 ± 0.0 | -10.0 to -10.0 | fails | - | 75 % |" in page
    assert "- Closes the gap, with the whole interval within a point: lora+ln on sst2, MiniLM, 2 x 4." in page
    assert (tmp_path / "near_full.png").stat().st_size > 0


def test_a_page_without_rows_says_so(tmp_path: Path) -> None:
    near_full.write_report(tmp_path)
    assert "Nothing was run." in (tmp_path / "near_full.md").read_text()
    assert not (tmp_path / "near_full.png").exists()


def test_the_searches_of_rates_apart(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "accuracy.jsonl")
    searches = [
        *search_cells(PROTOCOLS["cpu"], "sst2", "ln", "float32"),
        *search_cells(PROTOCOLS["cpu-groups"], "sst2", "ln", "float32", "head"),
        *search_cells(PROTOCOLS["cpu"], "sst2", "ln", "bfloat16"),
    ]
    # A mask is no arm without its script.
    searches.append({**searches[3], "arm": "fisher", "density": 0.2})
    for number, cell in enumerate(searches):
        rows.append({"cell": cell, "metrics": {"held_out_accuracy": 0.8 + number / 100}})
    table = near_full.rates_apart(tmp_path)
    assert table is not None
    assert "| fisher | head (0.001: " in table
    assert table.endswith(
        "| sst2, MiniLM, 200 steps | ln | one rate (0.003: 80.0, 0.007: 81.0, 0.02: 82.0); "
        "head (0.001: 83.0, 0.003: 84.0, 0.01: 85.0) |"
    )
