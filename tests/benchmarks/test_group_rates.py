"""A learning rate for each group of parameters: how the searches follow each other, and what rows say of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.arms import ARMS
from benchmarks.harness.classification import (
    PROTOCOLS,
    Protocol,
    all_needed,
    best_rates,
    final_cells,
    rates_of,
    run_experiment,
    search_cells,
    search_first,
)
from benchmarks.harness.finals import Finals
from benchmarks.harness.rows import Rows
from benchmarks.harness.runner import base_parser

ARM = "prefix+ln"
KIND = ("sst2", ARM, "float32")
GRIDS = {"head": (1e-3, 1e-2, 1e-1), "prefix": (1e-2, 3e-2), "ln": (1e-3, 3e-3), "lora": (1.0,)}


@pytest.fixture
def protocol() -> Protocol:
    return replace(PROTOCOLS["cpu"], group_rates=GRIDS)


def row_of(cell: Any, score: float, learning_rate: float, **others: Any) -> dict[str, Any]:
    return {"cell": cell, "learning_rate": learning_rate, "metrics": {"held_out_accuracy": score}, **others}


def test_groups_of_arms(protocol: Protocol) -> None:
    assert protocol.groups(ARM) == ["head", "prefix", "ln"]
    assert protocol.groups("full") == protocol.groups("ln") == protocol.groups("prefix") == ["head"]
    assert protocol.groups("head") == protocol.groups("supermask") == []
    assert PROTOCOLS["cpu"].groups(ARM) == []
    assert ARMS["mam+ln"].parts == ("prefix", "ffn-adapter", "ln")
    listed = PROTOCOLS["cpu-groups"]
    assert {*ARMS["lora+ln"].parts, *ARMS["mam+ln"].parts, "mha-adapter", "head"} == listed.group_rates.keys()


def test_searches_follow_each_other(protocol: Protocol) -> None:
    finals = final_cells(protocol, *KIND, [0])
    waves = search_first(protocol, [finals, finals])
    searches = [
        search_cells(protocol, *KIND),
        *(search_cells(protocol, *KIND, group) for group in protocol.groups(ARM)),
    ]
    assert waves == [*searches, finals, finals]
    assert all_needed(protocol, searches[0][0]) == []
    assert all_needed(protocol, searches[2][0]) == [KIND, (*KIND, "head")]
    assert all_needed(protocol, finals[0]) == [KIND, *((*KIND, group) for group in ("head", "prefix", "ln"))]
    assert [cell["learning_rate"] for cell in searches[2]] == [*GRIDS["prefix"]]


def test_an_arm_at_the_rate_of_another_takes_its_groups(protocol: Protocol) -> None:
    (final,) = final_cells(protocol, "sst2", "l0-close", "float32", [0])
    assert all_needed(protocol, final) == [("sst2", "full", "float32"), ("sst2", "full", "float32", "head")]


def searched(protocol: Protocol, rows: Rows) -> None:
    """Rows whose best rates are the largest, but of the head, whose best is in the middle."""
    for cell in search_cells(protocol, *KIND):
        rows.append(row_of(cell, cell["learning_rate"], cell["learning_rate"]))
    best = max(cell["learning_rate"] for cell in search_cells(protocol, *KIND))
    for cell in search_cells(protocol, *KIND, "head"):
        score = {1e-3: 0.1, 1e-2: 0.3, 1e-1: 0.3}[cell["learning_rate"]]
        rows.append(row_of(cell, score, best, head_learning_rate=cell["learning_rate"]))
    for cell in search_cells(protocol, *KIND, "prefix"):
        parts = {"prefix": cell["learning_rate"]}
        score = cell["learning_rate"]
        rows.append(row_of(cell, score, best, head_learning_rate=1e-2, part_learning_rates=parts))


def test_the_best_rate_of_each_group(protocol: Protocol, tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    searched(protocol, rows)
    kinds = [KIND, *((*KIND, group) for group in ("head", "prefix", "ln"))]
    assert best_rates(rows, protocol, kinds) == {KIND: 2e-2, (*KIND, "head"): 1e-2, (*KIND, "prefix"): 3e-2}
    found = Finals(rows, protocol, [0])
    assert found.rate("sst2", ARM) == "0.02 (edge), head 0.01, prefix 0.03 (edge)"
    assert found.at_edge("sst2", ARM)
    # Rows of one rate for all stay what they were.
    assert Finals(rows, PROTOCOLS["cpu"], [0]).rate("sst2", ARM) == "0.02 (edge)"


def test_a_group_that_was_searched_at_other_rates_is_refused(protocol: Protocol, tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    searched(protocol, rows)
    for row in rows:
        if row["cell"].get("group") == "prefix":
            row["head_learning_rate"] = 1e-1
    assert best_rates(rows, protocol, [(*KIND, "head")])
    with pytest.raises(ValueError, match=r"rate of prefix .* was searched at .*'head': 0.1.* choose .*'head': 0.01"):
        best_rates(rows, protocol, [(*KIND, "prefix")])


@pytest.mark.full
def test_a_run_of_two_steps(tiny_bert: str, tiny_data: Path, tmp_path: Path) -> None:
    protocol = replace(PROTOCOLS["cpu"], steps=2, search_steps=2, batch_size=4, group_rates=GRIDS)
    options = base_parser("").parse_args(["--results", str(tmp_path), "--jobs", "1"])
    options.model, options.data_dir = tiny_bert, tiny_data
    rows = Rows(tmp_path / "rows.jsonl")
    finals = [cell for arm in (ARM, "full") for cell in final_cells(protocol, "sst2", arm, "float32", [0])]
    assert run_experiment("test", options, protocol, rows, search_first(protocol, [finals])) == 0
    for final in finals:
        row = rows.get(final)
        assert row is not None
        kinds = all_needed(protocol, final)
        best = best_rates(rows, protocol, kinds)
        assert rates_of(row) == {"".join(each[3:]): best[each] for each in kinds}
