"""A learning rate for each group of parameters: how the searches follow each other, and what rows say of it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.arms import ARMS
from benchmarks.harness.classification import (
    PROTOCOLS,
    Place,
    Protocol,
    all_needed,
    best_rates,
    choose_model,
    final_cells,
    grown_cells,
    next_rate,
    rates_of,
    run_cell,
    run_experiment,
    search_cells,
    search_first,
    shared_searches,
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
    parts = {*ARMS["lora+ln"].parts, *ARMS["mam+ln"].parts, *ARMS["ln"].parts, "mha-adapter", "head"}
    assert parts == listed.group_rates.keys()
    assert listed.groups("ln") == ["head", "ln.bias"]
    assert listed.groups("mha-adapter+ln") == ["head", "mha-adapter", "ln"]


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


GROWING = replace(PROTOCOLS["cpu"], rates={"ln": (1e-3, 3e-3)}, extensions=3)
LN = ("sst2", "ln", "float32")


def peak_at(best: float) -> Any:
    """A run whose score is the better the nearer its rate is to the best."""

    def run(cell: Any, protocol: Protocol, place: Any, rates: Any) -> dict[str, Any]:
        rate = cell.get("learning_rate", rates.get(LN))
        score = 1 - abs(math.log(rate / best))
        return {"learning_rate": rate, "metrics": {"held_out_accuracy": score, "accuracy": score}}

    return run


@pytest.mark.parametrize(
    ("best", "tried", "edge"),
    [
        (3e-2, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], False),
        (1e-4, [1e-3, 3e-3, 3e-4, 1e-4, 3e-5], False),
        (1.0, [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], True),
    ],
)
def test_a_grid_grows_while_the_best_is_at_its_edge(
    best: float, tried: list[float], edge: bool, tmp_path: Path, tiny_bert: str
) -> None:
    options = base_parser("").parse_args(["--results", str(tmp_path), "--jobs", "1"])
    options.model, options.data_dir = tiny_bert, None
    rows = Rows(tmp_path / "rows.jsonl")
    finals = final_cells(GROWING, *LN, [0])
    assert run_experiment("test", options, GROWING, rows, search_first(GROWING, [finals]), peak_at(best)) == 0
    assert [row["learning_rate"] for row in rows if row["cell"]["phase"] == "search"] == tried
    chosen = max(tried) if edge else best
    assert [row["learning_rate"] for row in rows if row["cell"]["phase"] == "final"] == [chosen]
    assert Finals(rows, GROWING, [0]).at_edge("sst2", "ln") == edge


def test_a_rate_is_chosen_when_the_grid_has_grown(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    for cell in search_cells(GROWING, *LN):
        rows.append(row_of(cell, cell["learning_rate"], cell["learning_rate"]))
    assert best_rates(rows, GROWING, [LN]) == {}
    further = grown_cells(rows, GROWING, LN)[-1]
    assert further["learning_rate"] == 1e-2
    rows.append(row_of(further, 0.0, 1e-2))
    assert best_rates(rows, GROWING, [LN]) == {LN: 3e-3}


def test_the_next_rate_is_beyond() -> None:
    for rate in (7e-3, 2e-2, 1.5e-3, 5e-4, 1e-2, 2e-5):
        assert rate < next_rate(rate, up=True) < 5 * rate
        assert rate / 5 < next_rate(rate, up=False) < rate


def test_searches_of_the_equal_protocol_count(tmp_path: Path) -> None:
    rows, groups = Rows(tmp_path / "rows.jsonl"), PROTOCOLS["cpu-groups"]
    for name in ("cpu", "cpu-600"):
        for cell in search_cells(PROTOCOLS[name], *LN):
            rows.append(row_of(cell, 0.5, cell["learning_rate"]))
    rows.append(row_of(final_cells(PROTOCOLS["cpu"], *LN, [0])[0], 0.5, 0.1))
    assert [row["cell"] for row in shared_searches(rows, groups)] == search_cells(groups, *LN)
    assert shared_searches(rows, PROTOCOLS["cpu"]) == []


def test_a_protocol_of_a_model_keeps_its_name_and_refuses_others(tiny_bert: str) -> None:
    protocol = PROTOCOLS["mpnet"]
    assert choose_model(None, None, protocol) == ("sentence-transformers/all-mpnet-base-v2", protocol)
    with pytest.raises(ValueError, match=r"mpnet is of sentence-transformers/all-mpnet-base-v2.*type 'bert'"):
        choose_model(tiny_bert, None, protocol)
    _, other = choose_model(tiny_bert, None, PROTOCOLS["cpu-groups"])
    assert (other.name, other.own_rates_of) == ("cpu-groups-tiny_bert0", "cpu-tiny_bert0")


def test_scores_after_half_of_the_steps(tiny_bert: str, tiny_data: Path) -> None:
    protocol = replace(PROTOCOLS["cpu"], steps=2, batch_size=4, midway=("full",))
    found = {}
    for arm in ("full", "head"):
        (cell,) = final_cells(protocol, "sst2", arm, "float32", [0])
        rates = {("sst2", arm, "float32"): 0.05}
        found[arm] = run_cell(cell, protocol, Place(tiny_bert, tiny_data, "cpu"), rates)
    assert found["full"]["metrics_midway"].keys() == {"accuracy"}
    assert "metrics_midway" not in found["head"]


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
