"""The unified framework's experiments end to end on tiny models: order, kinds of tasks, budgets, resume, tables."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.harness import finals
from benchmarks.harness.arms import COMBINED, find_arm, part_size
from benchmarks.harness.classification import PROTOCOLS, best_rates, choose_model, final_cells, search_cells
from benchmarks.harness.metrics import WORST_LOSS, metric_of, perplexity
from benchmarks.harness.rows import Rows
from benchmarks.harness.splits import IGNORED, batches, ordered_batches
from benchmarks.harness.tasks import load_task, loads
from benchmarks.harness.training import counts
from benchmarks.papers import unified_framework as script

MODEL = "cpu-tiny_bert0"  # the protocol's name says the model, by the name of its folder
CPU = torch.device("cpu")
ROWS = {
    "stsb": [{"sentence1": "good film", "sentence2": f"{word} film", "label": i / 2} for i, word in enumerate("abcd")],
    "wnut_17": [
        {"tokens": ["who", "is", "very", "good"], "ner_tags": ["O", "O", "B-person", "I-person"]},
        {"tokens": ["the", "film"], "ner_tags": ["O", "B-product"]},
    ],
    "squad_small": [
        {"context": "the film is very good", "question": "what is good", "answers": _answer}
        for _answer in ({"text": ["the film"], "answer_start": [0]}, {"text": ["very good"], "answer_start": [12]})
    ],
    "tinyshakespeare": [{"text": "who is good"}, {"text": "the film is not very good"}],
    "e2e_nlg": [{"meaning_representation": "film", "human_reference": "the film is good"}],
    "gsm8k": [{"question": "who is good", "answer": "the film"}],
}


@pytest.fixture(scope="module")
def all_data(tiny_data: Path) -> Path:
    """The tiny tasks, with those of other kinds beside them."""
    for name, rows in ROWS.items():
        (tiny_data / name).mkdir(exist_ok=True)
        for part, repeat in (("train", 12), ("validation", 3)):
            lines = "\n".join(json.dumps(row) for row in rows * repeat)
            (tiny_data / name / f"{part}.jsonl").write_text(lines + "\n")
    return tiny_data


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bert: str, all_data: Path) -> list[str]:
    """The command line of a run of two steps a cell."""
    protocol = dataclasses.replace(PROTOCOLS["cpu"], steps=2, search_steps=2, batch_size=4)
    monkeypatch.setitem(PROTOCOLS, "cpu", protocol)
    monkeypatch.setattr(script, "COST_ROUNDS", 2)
    monkeypatch.setattr("benchmarks.harness.questions.STRIDE", 4)
    monkeypatch.setattr("benchmarks.harness.questions.LENGTH", 32)
    places = ["--data-dir", str(all_data), "--model", tiny_bert, "--results", str(tmp_path)]
    return [*places, "--seeds", "0", "--jobs", "1", "--device", "cpu"]


def cells(folder: Path) -> list[tuple[str, str, str]]:
    rows = Rows(folder / "unified_framework.jsonl")
    return [(row["cell"]["phase"], row["cell"]["task"], row["cell"].get("arm", "")) for row in rows]


@pytest.mark.end_to_end
def test_run_resume_and_report(short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*short, "--tasks", "sst2", "--arms", "mha-adapter", "mha-adapter+ln", "ln-upper"]
    assert script.main(chosen) == 0
    found = cells(tmp_path)
    assert found.index(("final", "sst2", "mha-adapter+ln")) < found.index(("search", "sst2", "ln-upper"))
    assert found[-1] == ("cost", "sst2", "")

    path = tmp_path / "unified_framework.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-2]))
    script.main([*chosen, "--list"])
    assert capsys.readouterr().out.splitlines()[0].startswith("1 runs left")
    assert script.main(chosen) == 0
    assert cells(tmp_path) == found

    page = (tmp_path / f"unified_framework_{MODEL}.md").read_text()
    assert "mha-adapter+ln above mha-adapter alone: the two together help, on average over sst2" in page
    assert "| ln: all norms |" not in page
    assert "| full again |" in page
    assert (tmp_path / f"unified_framework_{MODEL}.png").stat().st_size > 0


def test_a_report_without_rows_says_so(short: list[str], tmp_path: Path) -> None:
    script.main([*short, "--report"])
    page = (tmp_path / f"unified_framework_{MODEL}.md").read_text()
    (open_claims,) = (line for line in page.splitlines() if line.startswith("- Not measured yet: "))
    assert open_claims.count("; ") == len(script.BOUNDS) + len(script.BOUNDS_OF_NORMS)
    assert "Not run." in page
    assert "![" not in page


@pytest.mark.end_to_end
@pytest.mark.parametrize("task", script.OTHERS)
def test_other_kinds_of_tasks(task: str, short: list[str], tmp_path: Path) -> None:
    chosen = [*short, "--tasks", task, "--arms", "ln", "prefix", "head", "full"]
    options = script.parse(chosen)
    options.model, protocol = choose_model(options.model, None, PROTOCOLS["cpu"])
    assert script.main(chosen) == 0
    rows = Rows(tmp_path / "unified_framework.jsonl")
    for arm in options.arms:
        (row,) = (rows.get(cell) for cell in final_cells(protocol, task, arm, script.DTYPE, [0]))
        assert row is not None
        assert math.isfinite(metric_of(task).shown(row["metrics"]))
        assert row["num_trainable_params"] > row["num_method_params"]
        assert (row["num_method_params"] == 0) == (arm == "head")


@pytest.mark.end_to_end
@pytest.mark.parametrize("task", script.CAUSAL)
def test_texts_of_a_causal_model(task: str, short: list[str], tmp_path: Path, tiny_causal: str) -> None:
    chosen = [*short, "--model", tiny_causal, "--tasks", task]
    assert script.main([*chosen, "--arms", "ln", "mha-adapter+ln", "head"]) == 0
    rows = [row for row in Rows(tmp_path / "unified_framework.jsonl") if row["cell"]["phase"] == "final"]
    assert [row["cell"]["arm"] for row in rows] == ["ln", "mha-adapter+ln"]
    assert all(1 < row["metrics"]["perplexity"] < 1000 for row in rows)
    assert all(row["num_trainable_params"] == row["num_method_params"] for row in rows)
    page = (tmp_path / f"unified_framework_cpu-{Path(tiny_causal).name}.md").read_text()
    assert f"{task} by perplexity" in page
    assert "also where a smaller score is" in page


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["sst3"], r"unknown task 'sst3'; the tasks are sst2"),
        (["sst2", "e2e_nlg"], r"e2e_nlg is a task of causal LMs: give --model with one"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(
    tasks: list[str], message: str, short: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.parse([*short, "--tasks", *tasks])
    assert message in capsys.readouterr().err


def test_a_head_alone_is_no_arm_of_a_causal_model(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse([*short, "--tasks", "e2e_nlg", "--arms", "head"])
    assert "nothing that the arm head would train" in capsys.readouterr().err


def test_parts_have_like_numbers_of_entries(tiny_bert: str) -> None:
    def tuned(name: str) -> int:
        return counts(find_arm(name).tune(AutoModelForSequenceClassification.from_pretrained(tiny_bert)))[
            "num_method_params"
        ]

    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    size, layers, width = part_size(base), 2, 16
    assert tuned("prefix") == layers * 2 * size * width
    assert tuned("mha-adapter") == tuned("ffn-adapter") == tuned("prefix") + layers * (size + width)
    for name in COMBINED:
        assert tuned(name) == sum(tuned(part) for part in _parts(name))
    assert tuned("ln-lower") == tuned("ln-upper") == tuned("ln-ffn")


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("+") if part != "mam"]
    return [*parts, "prefix", "ffn-adapter"] if "mam" in name else parts


def test_labels_of_tokens_are_padded(all_data: Path, tiny_bert: str) -> None:
    task = load_task("wnut_17", all_data, tiny_bert)
    batch = next(ordered_batches(task.validation, 6, CPU))
    assert batch["labels"].shape == batch["input_ids"].shape
    kept = batch["labels"] != IGNORED
    assert kept.sum(1).tolist() == [2] * 3 + [4] * 3
    assert not kept[batch["attention_mask"] == 0].any()


def test_what_is_given_has_no_loss(all_data: Path, tiny_causal: str) -> None:
    task = load_task("e2e_nlg", all_data, tiny_causal)
    batch = next(batches(task.train, 2, 1, 0, CPU))
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [4, 4]
    assert torch.equal(batch["labels"][:, -4:], batch["input_ids"][:, -4:])
    with pytest.raises(ValueError, match="e2e_nlg is read from a folder alone"):
        load_task("e2e_nlg", None, tiny_causal)


def test_rows_of_other_benchmarks_count(tmp_path: Path) -> None:
    place = {"protocol": "cpu", "phase": "final", "task": "sst2", "dtype": "float32", "seed": 0}
    ln, attention = ({**place, "arm": arm} for arm in ("ln", "ln-attention"))
    Rows(tmp_path / "accuracy.jsonl").append({"cell": ln})
    Rows(tmp_path / "layernorm_key_component.jsonl").append({"cell": attention})
    rows = Rows(tmp_path / "unified_framework.jsonl")
    rows.adopt(script.shared_rows(tmp_path))
    assert ln in rows
    assert attention in rows
    assert not rows.path.exists()


def test_smaller_perplexity_is_better(tmp_path: Path) -> None:
    rows, protocol = Rows(tmp_path / "rows.jsonl"), PROTOCOLS["cpu"]
    place = ("e2e_nlg", "ln", "float32")
    found = search_cells(protocol, *place)
    for cell, score in zip(found, (9.0, 4.0, 7.0), strict=True):
        rows.append({"cell": cell, "learning_rate": cell["learning_rate"], "metrics": {"held_out_perplexity": score}})
    assert best_rates(rows, protocol, [place])[place] == found[1]["learning_rate"]
    first, second = ([{"cell": {"task": "e2e_nlg", "seed": 0}, "metrics": {"perplexity": s}}] for s in (4.0, 6.0))
    assert finals.differences(first, second) == {0: 2.0}
    assert perplexity(math.inf) == math.exp(WORST_LOSS)


def test_the_best_combination_meets_the_best_of_the_others(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    for arm, score in ((script.BEST, 0.8), ("ln", 0.7), ("mam", 0.9), ("full", 0.95)):
        for cell in final_cells(PROTOCOLS["cpu"], "sst2", arm, "float32", [0, 1]):
            rows.append({"cell": cell, "metrics": {"accuracy": score + cell["seed"] / 100}, "num_method_params": 1})
    script.write_report(rows, tmp_path, script.Scope(PROTOCOLS["cpu"], ("sst2",), script.ARM_NAMES, (0, 1), None))
    page = (tmp_path / "unified_framework.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("- ") and "every other arm but full" in line)
    assert "of which mam is best here; not run: mha-adapter, " in line
    assert "-10.0 ± 0.0 (by seed: -10.0, -10.0; interval: -10.0 to -10.0). Verdict: fails." in line


def test_the_model_is_in_the_protocols_name_unless_it_is_the_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.classification.default_model", lambda: "minilm")
    asked = ((None, None, "cpu"), (None, "bert-large-cased", "full"), ("some/folder", None, "cpu"))
    chosen = [choose_model(model, usual, PROTOCOLS[name]) for model, usual, name in asked]
    assert [(model, protocol.name) for model, protocol in chosen] == [
        ("minilm", "cpu"),
        ("bert-large-cased", "full-bert-large-cased"),
        ("some/folder", "cpu-folder"),
    ]


def test_a_second_loader_of_a_task_is_refused() -> None:
    with pytest.raises(ValueError, match="a loader of wnut_17 already"):
        loads("wnut_17")(load_task)
