"""The winning tickets' experiments end to end on a tiny model: order, masks of a count, shared rows, claims, tables."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, LlamaConfig

from benchmarks.harness import arms, magnitude, masked
from benchmarks.harness.classification import PROTOCOLS, Place, final_cells, load_base, search_first
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.finals import Finals
from benchmarks.harness.rows import Cell, Rows
from benchmarks.harness.tasks import load_task
from benchmarks.papers import winning_tickets as script
from benchmarks.papers.winning_tickets import write_report
from peft_lntune import ModuleTuningConfig

MODEL = "cpu-tiny_bert0"  # the protocol's name says the model, by the name of its folder
GAINS = 5 * 16
SHAPE = script.Shape(("query", "key"), 2, {"weight": GAINS, "bias": GAINS})
CONTROLLED = ("norm-largest", "other-largest")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bert: str, tiny_data: Path) -> list[str]:
    """The command line of a run of two steps a cell, where rates are searched at eight entries."""
    protocol = dataclasses.replace(PROTOCOLS["cpu"], steps=2, search_steps=2, batch_size=4)
    monkeypatch.setitem(PROTOCOLS, "cpu", protocol)
    for name in CONTROLLED:
        found = arms.ARMS[name]
        at = {**found.searched_at, "count": 8}
        monkeypatch.setitem(arms.ARMS, name, dataclasses.replace(found, searched_at=at, rates=found.rates[:2]))
    for name in arms.ALONE:
        monkeypatch.setitem(arms.ARMS, name, dataclasses.replace(arms.ARMS[name], rates=arms.ALONE_RATES[:1]))
    places = ["--data-dir", str(tiny_data), "--model", tiny_bert, "--results", str(tmp_path)]
    return [*places, "--tasks", "sst2", "--seeds", "0", "--jobs", "1", "--device", "cpu"]


def coordinates(cell: Cell) -> tuple[object, ...]:
    return (cell["phase"], cell["arm"], *(cell[key] for key in ("layer", "count", "parameter") if key in cell))


@pytest.mark.full
def test_run_resume_and_report(short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*short, "--counts", "8", "2", "81"]
    assert script.main(chosen) == 0
    path = tmp_path / "winning_tickets.jsonl"
    found = [coordinates(row["cell"]) for row in Rows(path)]
    order = [
        ("search", "query"),
        ("final", "embedding"),
        ("final", "ln-layer", 1),
        ("search", "norm-largest", 8, "weight"),
        ("final", "norm-farthest", 2, "weight"),
        ("final", "norm-largest", 8, "bias"),
        ("search", "other-largest", 8),
        ("final", "other-random", 2),
        ("final", "other-largest", 81),
    ]
    assert [found.index(at) for at in order] == sorted(found.index(at) for at in order)
    assert not any("ffn_gate" in at for at in found)
    assert not [at for at in found if at[0] == "search" and at[1] in ("ln-layer", "norm-random", "other-random")]
    assert not [at for at in found if 81 in at and at[1] in script.NORM_WAYS]

    rows = {coordinates(row["cell"])[1:]: row for row in Rows(path) if row["cell"]["phase"] == "final"}
    assert rows["ln-layer", 0]["learning_rate"] == rows["ln",]["learning_rate"]
    assert rows["norm-random", 2, "bias"]["learning_rate"] == rows["norm-largest", 8, "weight"]["learning_rate"]
    assert rows["ln-layer", 0]["num_method_params"] == 2 * 16 * 2
    for arm in script.NORM_WAYS:
        assert rows[arm, 2, "weight"]["num_method_params"] == rows[arm, 2, "bias"]["num_method_params"] == 2
        assert rows[arm, 8, "weight"]["mean_magnitude"] == 1  # fresh gains are ones
    assert rows["other-largest", 8]["mean_magnitude"] > rows["other-random", 8]["mean_magnitude"] > 0

    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    script.main([*chosen, "--list"])
    assert capsys.readouterr().out.startswith("1 runs left")
    assert script.main(chosen) == 0
    assert path.read_text().count("\n") == len(found)

    page = (tmp_path / f"winning_tickets_{MODEL}.md").read_text()
    assert "- components, trec: all." in page
    assert "- components, sst2: all have 1 of 3 seeds." in page
    assert "- 81 gains: the norms of this model have 80." in page
    (open_claims,) = (line for line in page.splitlines() if line.startswith("- Not measured yet: "))
    assert "8 largest biases above random ones, on average over sst2, trec" in open_claims
    for name in ("components", "layers", "gains", "biases"):
        assert (tmp_path / f"winning_tickets_{name}_{MODEL}.png").stat().st_size > 0


def test_a_report_without_rows_says_so(short: list[str], tmp_path: Path) -> None:
    script.main([*short, "--report", "--counts", "8", "2"])
    page = (tmp_path / f"winning_tickets_{MODEL}.md").read_text()
    (open_claims,) = (line for line in page.splitlines() if line.startswith("- Not measured yet: "))
    assert open_claims.count("; ") == 4 + 2 * 2 * 2 + 2 + 2 - 1
    assert "| layer 1 |" not in page
    assert page.count("sst2, trec: all.") == 3
    assert "![" not in page


@pytest.mark.parametrize(
    ("asked", "expected", "searched"),
    [
        (["layers"], {"ln-layer"}, {"ln"}),
        (["others", "query"], {"other-largest", "other-random", "query"}, {"other-largest", "query"}),
        (["norm-random"], {"norm-random"}, {"norm-largest"}),
    ],
)
def test_groups_and_arms_can_be_chosen(
    asked: list[str], expected: set[str], searched: set[str], short: list[str]
) -> None:
    options = script.parse([*short, "--arms", *asked, "--counts", "8"])
    found = [cell for wave in script.waves(options, PROTOCOLS["cpu"], SHAPE) for cell in wave]
    assert {cell["arm"] for cell in found if cell["phase"] == "final"} == expected
    assert {cell["arm"] for cell in found if cell["phase"] == "search"} == searched


def test_what_a_model_has_room_for(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertConfig(**sizes).save_pretrained(tmp_path / "bert")
    LlamaConfig(vocab_size=32, pad_token_id=0, **sizes).save_pretrained(tmp_path / "llama")
    bert, llama = (script.shape_of(str(tmp_path / name)) for name in ("bert", "llama"))
    assert bert.components == tuple(name for name in arms.ALONE if name != "ffn_gate")
    assert (bert.layers, bert.norms) == (3, {"weight": 7 * 8, "bias": 7 * 8})
    assert llama.components == arms.ALONE
    assert llama.norms == {"weight": 7 * 8}
    options = script.parse(["--counts", "8"])
    planned = [at for stage in script.stages(options, llama) for at in stage]
    assert "bias" not in {at.get("parameter") for at in planned}


def chosen(arm: str, bert: str, data: Path, **at: object) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """The masks of an arm and the model they are of, whose norms are not all ones."""
    cell = {"phase": "final", "task": "sst2", "arm": arm, "dtype": "float32", "seed": 0, "count": 6, **at}
    protocol, place, task = PROTOCOLS["cpu"], Place(bert, data, "cpu"), load_task("sst2", data, bert)
    source = masked.Source(cell, task, protocol, place, {})
    return masked.CHOICES[arm](source), load_base(cell, protocol, place, task)


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains and biases of the norms spread, each norm's about a level of its own."""

    def load(*given: object, **named: object) -> nn.Module:
        model = load_base(*given, **named)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        with torch.no_grad():
            for level, norm in enumerate(norms):
                norm.weight.copy_(1 + level + torch.randn(norm.weight.shape, generator=generator))
                norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator))
        return model

    monkeypatch.setattr(masked, "load_base", load)


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_masks_of_norms(parameter: str, uneven: None, tiny_bert: str, tiny_data: Path) -> None:
    """Against sorting by hand."""
    _, plain = chosen("norm-largest", tiny_bert, tiny_data, parameter=parameter)
    task = load_task("sst2", tiny_data, tiny_bert)
    place = Place(tiny_bert, tiny_data, "cpu")
    model = masked.load_base({"dtype": "float32", "seed": 0}, PROTOCOLS["cpu"], place, task)
    vectors = {
        f"{name}.{parameter}": getattr(module, parameter).detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
    }
    assert len(vectors) == 5
    sizes = {
        "norm-largest": {name: value.abs() for name, value in vectors.items()},
        "norm-smallest": {name: -value.abs() for name, value in vectors.items()},
        "norm-farthest": {name: (value - value.sort().values[7]).abs() for name, value in vectors.items()},
    }
    for arm, scores in sizes.items():
        masks, _ = chosen(arm, tiny_bert, tiny_data, parameter=parameter)
        best = sorted(((float(s), name, i) for name, each in scores.items() for i, s in enumerate(each)), reverse=True)
        expected = {(name, i) for _, name, i in best[:6]}
        assert {(name, int(i)) for name, mask in masks.items() for i in mask.nonzero()} == expected
        assert masks.keys() <= dict(plain.named_parameters()).keys()


def test_chance_is_drawn_anew(tiny_bert: str, tiny_data: Path) -> None:
    def drawn(arm: str, **at: object) -> torch.Tensor:
        masks, _ = chosen(arm, tiny_bert, tiny_data, **at)
        flat = torch.cat([mask.flatten() for mask in masks.values()])
        assert int(flat.sum()) == 6
        return flat

    for arm, at in (("norm-random", {"parameter": "weight"}), ("other-random", {})):
        assert torch.equal(drawn(arm, **at), drawn(arm, **at))
        assert not torch.equal(drawn(arm, **at), drawn(arm, seed=1, **at))
        assert not torch.equal(drawn(arm, **at), drawn(arm, task="trec", **at))


def test_other_modules_are_the_weights_of_the_layers(tiny_bert: str, tiny_data: Path) -> None:
    masks, model = chosen("other-largest", tiny_bert, tiny_data)
    dense = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if ".layer." in name and "LayerNorm" not in name and name.endswith("weight")
    }
    assert masks.keys() == dense.keys()
    largest = torch.cat([value.abs().flatten() for value in dense.values()]).sort(descending=True).values[:6]
    kept = torch.cat([dense[name][mask].abs() for name, mask in masks.items()])
    assert torch.equal(kept.sort(descending=True).values, largest)
    tuned = masked.by_name(model, {"arm": "other-largest"}, load_task("sst2", tiny_data, tiny_bert))
    tuned.set_masks(masks)
    assert magnitude.mean_magnitude(tuned) == pytest.approx(float(largest.mean()))


def test_norms_as_a_component_are_the_arm_ln(tiny_bert: str, tiny_data: Path) -> None:
    """So the rows of `ln` count for it."""
    _, first = chosen("other-largest", tiny_bert, tiny_data)
    _, second = chosen("other-largest", tiny_bert, tiny_data)
    ours, theirs = arms.find_arm("ln").tune(first), arms.tune_modules(second, components=["norm"])
    assert arms.own_parameters(ours).keys() == arms.own_parameters(theirs).keys()
    batch = load_task("sst2", tiny_data, tiny_bert).train.batch([0, 1, 2], torch.device("cpu"))
    for model in (ours, theirs):
        model.eval()(**batch).loss.backward()
    for name, parameter in arms.own_parameters(ours).items():
        assert parameter.grad is not None
        assert parameter.grad.any()
        assert torch.equal(parameter.grad, arms.own_parameters(theirs)[name].grad)


def test_rows_of_other_benchmarks_count(tmp_path: Path) -> None:
    place = {"protocol": "cpu", "phase": "final", "task": "sst2", "dtype": "float32", "seed": 0}
    sources = {"accuracy": "ln", "layernorm_key_component": "full", "unified_framework": "head"}
    for name, arm in sources.items():
        Rows(tmp_path / f"{name}.jsonl").append({"cell": {**place, "arm": arm}})
    rows = Rows(tmp_path / "winning_tickets.jsonl")
    rows.adopt(script.shared_rows(tmp_path))
    assert all({**place, "arm": arm} in rows for arm in sources.values())


def report(
    tmp_path: Path, scores: dict[tuple[str, tuple[tuple[str, object], ...]], list[float]], sizes: int = 10
) -> str:
    """The page of made-up scores: arm and coordinates -> the score of each seed, on one task."""
    rows, protocol = Rows(tmp_path / "rows.jsonl"), PROTOCOLS["cpu"]
    for (arm, at), values in scores.items():
        entries = {"head": 0, "ln": sizes, "query": 100 * sizes}.get(arm, sizes)
        for cell, score in zip(
            final_cells(protocol, "sst2", arm, "float32", range(3), **dict(at)), values, strict=False
        ):
            row = {"cell": cell, "metrics": {"accuracy": score / 100}, "num_method_params": entries}
            rows.append({**row, "mean_magnitude": 0.5})
    scope = script.Scope(protocol, ("sst2",), SHAPE, (8,), (8,), (0, 1, 2))
    write_report(rows, tmp_path, scope)
    return (tmp_path / "winning_tickets.md").read_text()


def line(page: str, part: str) -> str:
    (found,) = (each for each in page.splitlines() if each.startswith("- ") and part in each)
    return found


def test_claims_are_judged_by_paired_differences(tmp_path: Path) -> None:
    gains = (("count", 8), ("parameter", "weight"))
    page = report(
        tmp_path,
        {
            ("full", ()): [90, 91, 92],
            ("head", ()): [70, 70, 70],
            ("ln", ()): [89, 90, 91],
            ("query", ()): [80, 81, 82],
            ("ln-layer", (("layer", 0),)): [79, 80, 81],
            ("ln-layer", (("layer", 1),)): [89, 90, 91],
            ("norm-largest", gains): [80, 82, 84],
            ("norm-random", gains): [78, 80, 82],
            ("norm-smallest", gains): [81, 80, 85],
            ("other-largest", (("count", 8),)): [75, 75],
        },
    )
    worst = line(page, "every component alone")
    assert "(the worst is query; not run: key) within 2 points of full" in worst
    assert "-10.0 ± 0.0 (by seed: -10.0, -10.0, -10.0; interval: -10.0 to -10.0). Verdict: fails." in worst
    # (89 - 70) / 10 entries against (80 - 70) / 1000, in points per 1,000.
    ratio = line(page, "more points over head per 1,000")
    assert "(query has most; not run: key)" in ratio
    assert "1989.0 ± 99.0 (by seed: " in ratio
    assert "Verdict: holds. This ratio" in ratio
    assert "the best is layer 1) within 2 points of full, on average over sst2. Measured" in page
    any_layer = line(page, "norms of any single layer")
    assert "the worst is layer 0) at least 10 points above head" in any_layer
    assert "10.0 ± 1.0 (by seed: " in any_layer
    assert any_layer.endswith("Verdict: inconclusive; 1,000 seeds would not decide it.")
    above_random, above_smallest = (
        line(page, f"Claim: 8 largest gains above {other}") for other in ("random", "smallest")
    )
    assert "2.0 ± 0.0 (by seed: 2.0, 2.0, 2.0; interval: 2.0 to 2.0). Verdict: holds." in above_random
    assert "0.0 ± 1.7 (by seed: " in above_smallest
    assert above_smallest.endswith("Verdict: inconclusive; 1,000 seeds would not decide it.")
    others = line(page, "Claim: 8 largest gains above as many largest weights of other modules")
    assert "6.0 ± 1.4 (2 of 3 runs) (by seed: " in others
    assert "Verdict: inconclusive; about 1 more seeds per task would decide it (2 runs)." in others
    assert "| gains | largest | 8 | 0.5 | 82.0 ± 2.0 | 82.0 ± 2.0 | -9.0 ± 1.0 | 12.0 ± 2.0 |" in page
    missing = line(page, "- few entries, sst2: ")
    assert "8 largest weights of other modules (2 of 3 seeds)" in missing
    assert ("8 gains farthest from the median" in missing) != missing.startswith("- few entries, sst2: all but")
    assert "- layers, sst2" not in page


def test_every_cell_of_the_plan_is_reported(tmp_path: Path) -> None:
    """A row of each planned cell leaves nothing that is not run."""
    options, protocol = script.parse([]), PROTOCOLS["cpu"]
    shape = script.Shape(("query",), 2, {"weight": 4992, "bias": 4992})
    rows = Rows(tmp_path / "rows.jsonl")
    for wave in script.waves(options, protocol, shape):
        for cell in wave:
            row = {"cell": cell, "learning_rate": cell.get("learning_rate", 0.1), "num_method_params": 9}
            rows.append({**row, "metrics": {"accuracy": 0.5, "held_out_accuracy": 0.5}, "mean_magnitude": 1.0})
    for arm in ("ln-weight", "ln-bias"):  # of another benchmark
        for task in options.tasks:
            for cell in final_cells(protocol, task, arm, "float32", options.seeds):
                rows.append({"cell": cell, "num_method_params": 9, "metrics": {"accuracy": 0.5}})
    found = Comparison(Finals(rows, protocol, options.seeds), options.tasks, options.tasks)
    scope = script.scope(options, protocol, shape, rows)
    assert scope.counts == (48, 192, 768, 3072)
    assert all(finding.measured for finding in script.claims(found, scope))
    write_report(rows, tmp_path, scope)
    page = (tmp_path / "winning_tickets.md").read_text()
    assert "not run" not in page.partition("## Not run here")[0]
    assert page.partition("## Not run here")[2].count("\n- ") == 1  # the pooler


def test_a_rate_is_searched_once_and_first() -> None:
    protocol = PROTOCOLS["cpu"]
    stages = [
        final_cells(protocol, "sst2", "ln-layer", "float32", [1, 0], layer=0),
        final_cells(protocol, "sst2", "ln", "float32", [0]),
    ]
    searched, first, second = search_first(protocol, stages)
    assert {cell["arm"] for cell in searched} == {"ln"}
    assert [cell["seed"] for cell in first] == [0, 1]
    assert second == stages[1]


def test_an_unknown_task_or_arm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse(["--tasks", "sst3"])
    assert "unknown task 'sst3'; the tasks are sst2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.parse(["--arms", "layer"])
    assert "invalid choice: 'layer'" in capsys.readouterr().err


def test_other_modules_leave_embeddings_and_biases_alone() -> None:
    config = ModuleTuningConfig(**magnitude.OTHERS)
    assert config.parameters == ("weight",)
    assert "embedding" not in (config.components or ())
