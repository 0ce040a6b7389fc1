"""How fine fine-tuning can be, end to end on a tiny model: what arms leave alone, zeros, distances, order, tables."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.harness import sparse
from benchmarks.harness.arms import find_arm, own_parameters
from benchmarks.harness.classification import PROTOCOLS, Protocol, needed_rates, search_cells, search_first
from benchmarks.harness.models import head_modules
from benchmarks.harness.rows import Rows
from benchmarks.harness.tables import as_row
from benchmarks.harness.tasks import load_task
from benchmarks.harness.training import make_optimizer
from benchmarks.papers import how_fine as script
from peft_lntune.analysis import Table
from peft_lntune.tuner.supermasks import keep_masks, start_masks

MODEL = "cpu-tiny_bert0"  # the protocol's name says the model, by the name of its folder
CPU = torch.device("cpu")
WIDTH, FFN, WORDS, POSITIONS, TYPES, NORMS = 16, 32, 256, 32, 2, 5
KEY, EMBEDDINGS = 2 * (WIDTH * WIDTH + WIDTH), WIDTH * (WORDS + POSITIONS + TYPES)
LAYER = 4 * (WIDTH * WIDTH + WIDTH) + 2 * WIDTH * FFN + FFN + WIDTH + 4 * WIDTH
MATRICES = 2 * (4 * WIDTH * WIDTH + 2 * WIDTH * FFN)
BODY = 2 * LAYER + EMBEDDINGS + 2 * WIDTH


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> Protocol:
    short = dataclasses.replace(PROTOCOLS["cpu"], steps=2, search_steps=2, batch_size=4)
    monkeypatch.setitem(PROTOCOLS, "cpu", short)
    return short


@pytest.fixture
def short(protocol: Protocol, tmp_path: Path, tiny_bert: str, tiny_data: Path) -> list[str]:
    """The command line of a run of two steps a cell."""
    places = ["--data-dir", str(tiny_data), "--model", tiny_bert, "--results", str(tmp_path)]
    return [*places, "--tasks", "sst2", "--seeds", "0", "--jobs", "1", "--device", "cpu"]


def tiny(folder: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def cells(folder: Path) -> list[tuple[str, str, float | None]]:
    rows = Rows(folder / "how_fine.jsonl")
    return [(row["cell"]["phase"], row["cell"]["arm"], row["cell"].get("sparsity")) for row in rows]


@pytest.mark.full
def test_run_resume_and_report(short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["full", "head", "l0-close", "l0-no-value", "supermask", "pruned"]
    chosen = [*short, "--arms", *arms, "--sparsities", "0", "0.2", "0.6"]
    assert script.main(chosen) == 0
    found = cells(tmp_path)
    # In order of worth; nearly full fine-tuning searches nothing of its own, and pruning of nothing is the head.
    order = [("final", "full", None), ("final", "l0-close", None), ("search", "supermask", 0.2)]
    order += [("final", "supermask", 0.0), ("final", "pruned", 0.2), ("final", "l0-no-value", None)]
    order += [("final", "supermask", 0.6), ("final", "pruned", 0.6)]
    assert [cell for cell in dict.fromkeys(found) if cell in order] == order
    searched = {(arm, at) for phase, arm, at in found if phase == "search"}
    assert searched == {("full", None), ("head", None), ("supermask", 0.2), ("pruned", 0.2)}
    assert ("final", "pruned", 0.0) not in found

    rows = {(row["cell"]["arm"], row["cell"].get("sparsity")): row for row in Rows(tmp_path / "how_fine.jsonl")}
    assert rows["l0-close", None]["learning_rate"] == rows["full", None]["learning_rate"]
    assert rows["supermask", 0.6]["head_learning_rate"] == rows["head", None]["learning_rate"]
    assert "head_learning_rate" not in rows["pruned", 0.6]
    masks = rows["supermask", 0.6]["masks"]
    assert masks["sparsity"] == pytest.approx(0.6 + masks["dropped"] - masks["revived"], abs=1e-2)
    assert len(masks["sampled"]) == sparse.DRAWS
    assert rows["full", None]["closeness"].keys() == {"places", "components", "layers"}

    path = tmp_path / "how_fine.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    script.main([*chosen, "--list"])
    assert capsys.readouterr().out.startswith("1 runs left")
    assert script.main(chosen) == 0
    assert cells(tmp_path) == found

    page = (tmp_path / f"how_fine_{MODEL}.md").read_text()
    assert "l0-close: all but key projections and embeddings within 1 point of full, on average over" in page
    shown = {line.split(" | ")[0]: line.split(" | ")[-1] for line in page.splitlines() if " | " in line}
    assert shown["| l0-close: all but key projections and embeddings"] == shown["| full: everything"] != "not run |"
    assert "| 20 %, sampled masks | " in page
    assert "| 80 %, thresholded mask |" not in page
    assert "supermask from 80 %" in page.partition("## Not run here")[2]
    assert "two random models to each other, by angle. Measured: " in page
    for name in (f"how_fine_{MODEL}.png", f"closeness_sst2_{MODEL}.png"):
        assert (tmp_path / name).stat().st_size > 0
    header, first, *_ = (tmp_path / f"closeness_sst2_{MODEL}.csv").read_text().splitlines()
    assert header.startswith("component,layer,parameter,entries,mean_l1,relative_l1,angle,random_mean_l1,")
    assert first.startswith("word embeddings,,weight,4096,")


def test_a_report_without_rows_says_so(short: list[str], tmp_path: Path) -> None:
    script.main([*short, "--report"])
    page = (tmp_path / f"how_fine_{MODEL}.md").read_text()
    bounds = len(script.BOUNDS_OF_MODULES) + len(script.BOUNDS_OF_ZEROS)
    (open_claims,) = (line for line in page.splitlines() if line.startswith("- Not measured yet: "))
    assert open_claims.count("; ") == bounds + 4 - 1
    assert "- controls, sst2, trec: all." in page
    assert "![" not in page


LEFT_OUT = {
    "l0-close": KEY + EMBEDDINGS,
    "l0-no-key": KEY,
    "l0-no-value": KEY,
    "l0-no-embedding": EMBEDDINGS,
    "l0-no-deepest": LAYER,
    "l0-no-lowest": LAYER,
    "l0-close-no-deepest": KEY + EMBEDDINGS + LAYER - KEY // 2,
}


@pytest.mark.parametrize("name", [*script.L0, *script.CONTROLS])
def test_what_is_left_out(name: str, tiny_bert: str) -> None:
    own = own_parameters(find_arm(name).tune(tiny(tiny_bert)))
    assert BODY - sum(parameter.numel() for parameter in own.values()) == LEFT_OUT[name]
    missing = {"deepest": ".layer.1.", "lowest": ".layer.0.", "key": ".key.", "value": ".value."}
    for said, part in missing.items():
        assert any(part in parameter for parameter in own) != (said in name or (said == "key" and "close" in name))


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.6])
def test_pruning_is_what_a_supermask_starts_from(sparsity: float, tiny_bert: str) -> None:
    masks = start_masks(sparse.supermask(tiny(tiny_bert), sparsity=sparsity))
    before, model = dict(tiny(tiny_bert).named_parameters()), sparse.pruned(tiny(tiny_bert), sparsity=sparsity)
    assert sum(mask.numel() for mask in masks.values()) == MATRICES
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name] * masks.get(name, 1)), name
    assert not own_parameters(model)


def test_what_is_said_of_masks(tiny_bert: str, tiny_data: Path) -> None:
    task = load_task("sst2", tiny_data, tiny_bert)
    model = sparse.supermask(tiny(tiny_bert), sparsity=0.2)
    at_start = sparse.measure_masks(model, task, CPU)["masks"]
    assert at_start["sparsity"] == pytest.approx(0.2, abs=1e-3)
    assert at_start["dropped"] == at_start["revived"] == 0
    name, scores = next((n, p) for n, p in model.named_parameters() if "lntune_supermask" in n)
    off = int((scores < 0).sum())
    scores.data.neg_()
    found = sparse.measure_masks(model, task, CPU)["masks"]
    assert found["revived"] == pytest.approx(off / MATRICES, abs=1e-6), name
    assert found["dropped"] == pytest.approx((scores.numel() - off) / MATRICES, abs=1e-6)
    assert found["sparsity"] == pytest.approx(at_start["sparsity"] + found["dropped"] - found["revived"], abs=2e-6)
    assert sum(int((~mask).sum()) for mask in keep_masks(model).values()) == round(found["sparsity"] * MATRICES)


def test_a_head_may_have_a_rate_of_its_own(tiny_bert: str) -> None:
    model = sparse.supermask(tiny(tiny_bert))
    scores, head = make_optimizer(model, 0.1, head_rate=0.003).param_groups
    assert (scores["lr"], head["lr"]) == (0.1, 0.003)
    assert sum(p.numel() for p in scores["params"]) == MATRICES
    trained = [p for module in head_modules(model).values() for p in module.parameters() if p.requires_grad]
    assert {id(p) for p in head["params"]} == {id(p) for p in trained}
    (together,) = make_optimizer(model, 0.1).param_groups
    assert len(together["params"]) == len(scores["params"]) + len(head["params"])


def test_a_supermask_trains_its_head_at_that_rate(
    protocol: Protocol, tiny_bert: str, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def recorded(model: Any, learning_rate: float, head_rate: float | None, part_rates: Any) -> torch.optim.AdamW:
        made.append((learning_rate, head_rate))
        return make_optimizer(model, learning_rate, head_rate, part_rates)

    monkeypatch.setattr("benchmarks.harness.training.make_optimizer", recorded)
    rates = {("sst2", "head", "float32"): 0.003, ("sst2", "pruned", "float32"): 0.01}
    search = {**search_cells(protocol, "sst2", "supermask", "float32")[-1]}
    (final,) = script._finals(protocol, "sst2", {"arm": "pruned", "sparsity": 0.2}, [0])
    for cell in (search, final):
        script.run_cell(cell, protocol, script.Place(tiny_bert, tiny_data, "cpu"), rates)
    assert made == [(0.3, 0.003), (0.01, None)]


def test_what_a_search_needs_is_searched_before_it() -> None:
    protocol = PROTOCOLS["cpu"]
    finals = script._finals(protocol, "sst2", {"arm": "supermask", "sparsity": 0.4}, [0])
    before, searches, last = search_first(protocol, [finals])
    assert before == search_cells(protocol, "sst2", "head", "float32")
    assert searches == search_cells(protocol, "sst2", "supermask", "float32")
    assert last == finals
    assert needed_rates(searches[0]) == {("sst2", "head", "float32")}
    # A stage needs no search that an earlier one has brought.
    assert search_first(protocol, [finals, finals]) == [before, searches, last, last]


def test_distances_are_of_the_body(protocol: Protocol, tiny_bert: str, tiny_data: Path) -> None:
    place, task = script.Place(tiny_bert, tiny_data, "cpu"), load_task("sst2", tiny_data, tiny_bert)
    cell = {"phase": "final", "task": "sst2", "arm": "full", "dtype": "float32", "seed": 0}
    model = script.load_base(cell, protocol, place, task)
    with torch.no_grad():
        for module in (model.classifier, model.bert.encoder.layer[1].output.dense):
            module.weight.add_(0.5)
    found = {
        name: Table(**table) for name, table in script.moved(model, cell, protocol, place, task)["closeness"].items()
    }
    layers = dict(zip(found["layers"].column("layer"), found["layers"].column("mean_l1"), strict=True))
    assert layers == {None: 0, 0: 0, 1: pytest.approx(0.5 * WIDTH * FFN / (MATRICES / 2), rel=1e-4)}
    places = zip(*map(found["places"].column, ("component", "layer", "mean_l1")), strict=True)
    assert {(component, layer) for component, layer, distance in places if distance} == {("FFN down", 1)}
    # Two random matrices of standard deviation 0.02 stand at right angles.
    (angle,) = {round(value, 1) for value in found["layers"].column("random_angle")}
    assert angle == 0.5
    assert found["layers"].column("random_mean_l1")[1] == pytest.approx(0.04 / torch.pi**0.5, rel=0.05)


def row_of(angles: dict[int | None, float]) -> dict[str, Any]:
    columns = ("layer", "entries", "mean_l1", "angle", "random_mean_l1", "random_angle")
    lines = [(layer, 1, angle, angle, 0.5, 0.5) for layer, angle in angles.items()]
    return {"closeness": {"layers": as_row(Table(columns, lines))}}


def test_what_is_said_of_distances() -> None:
    near, uneven = row_of({None: 0.05, 0: 0.02, 1: 0.025}), row_of({None: 0.01, 0: 0.02, 1: 0.1})
    close, _, layers, _ = (found.line for found in script.distance_bounds({"sst2": [near], "trec": [uneven]}))
    assert "by angle. Measured: 5.0 to 50.0 times, enough in 1 of 2 runs. Verdict: inconclusive." in close
    assert "by angle. Measured: 1.2 to 5.0 times, enough in 1 of 2 runs. Verdict: inconclusive." in layers
    assert layers.endswith("Moves most: layer 1 in 2 of 2 runs.")
    close, _, layers, _ = (found.line for found in script.distance_bounds({"sst2": [near]}))
    assert "10.0 to 25.0 times, enough in 1 of 1 runs. Verdict: holds." in close
    assert "1.2 to 1.2 times, enough in 0 of 1 runs. Verdict: fails." in layers


def test_sampled_masks_are_compared_by_their_own_score(protocol: Protocol, tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    for seed in (0, 1):
        masks = {"sparsity": 0.25, "dropped": 0.05, "revived": 0.0, "sampled": [0.8, 0.84 + seed / 100]}
        (cell,) = script._finals(PROTOCOLS["cpu"], "sst2", {"arm": "supermask", "sparsity": 0.2}, [seed])
        metrics = {"metrics": {"accuracy": 0.9}, "masks": masks, "file_size": 9, "num_method_params": 7}
        rows.append({"cell": cell, **metrics, "learning_rate": 0.1})
    scope = script.Scope(PROTOCOLS["cpu"], ("sst2",), (0.2,), (0, 1))
    script.write_report(rows, tmp_path, scope)
    page = (tmp_path / "how_fine.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("- ") and "there are many good masks" in line)
    assert "Measured: -7.8 ± 0.4 (by seed: -8.0, -7.5; interval: -10.0 to -5.5). Verdict: fails." in line
    assert "| 20 %, sampled masks | 7 | 82.2 ± 0.4 |" in page
    assert "| 20 % | sst2 | 25.00 ± 0.00 | 5.00 ± 0.00 | 0.00 ± 0.00 | 0 |" in page
    assert (tmp_path / "how_fine.png").stat().st_size > 0


def test_rows_of_other_benchmarks_count(tmp_path: Path) -> None:
    place = {"protocol": "cpu", "task": "sst2", "dtype": "float32", "seed": 0}
    found = [{**place, "phase": phase, "arm": arm} for phase in ("search", "final") for arm in ("head", "full")]
    for cell in found:
        Rows(tmp_path / "unified_framework.jsonl").append({"cell": cell})
    rows = Rows(tmp_path / "how_fine.jsonl")
    rows.adopt(script.shared_rows(tmp_path))
    assert [cell in rows for cell in found] == [True, True, True, False]


@pytest.mark.parametrize(
    ("further", "message"),
    [(["--tasks", "sst3"], "unknown task 'sst3'"), (["--sparsities", "0.2", "1"], "below 1, but 1 was given")],
)
def test_what_cannot_be_run_is_refused(further: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse(further)
    assert message in capsys.readouterr().err
