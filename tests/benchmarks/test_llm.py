"""The experiments on language models: order of the runs, answers and their scores, chosen entries, the page."""

import dataclasses
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.harness.arms import find_arm, own_parameters
from benchmarks.harness.classification import Place, load_base
from benchmarks.harness.generation import (
    Prompts,
    answer_row,
    final_number,
    load_prompts,
    score_answers,
    write_answers,
)
from benchmarks.harness.method_costs import time_methods
from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.splits import Split
from benchmarks.harness.tables import NONE
from benchmarks.harness.tasks import load_task
from benchmarks.harness.training import Schedule, train
from benchmarks.papers import llm as script

CPU = torch.device("cpu")
SHAKESPEARE = "tinyshakespeare"
ROWS = {
    SHAKESPEARE: [
        {"text": text} for text in ("who is good", "the film is not very good", "what is", "a very bad film")
    ],
    "e2e_nlg": [
        {"meaning_representation": given, "human_reference": said}
        for given, said in (("film", "the film is good"), ("good", "good"), ("film", "a good film"))
    ],
    "gsm8k": [{"question": "who is what", "answer": "very good #### 7"}, {"question": "what", "answer": "bad #### 8"}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        for part, repeat in (("train", 8), ("validation", 2)):
            lines = "\n".join(json.dumps(row) for row in rows * repeat)
            (folder / name / f"{part}.jsonl").write_text(lines + "\n")
    return folder


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> script.TextProtocol:
    """The protocol for a CPU, cut to two steps."""
    sizes: dict[str, Any] = {
        "steps": 2,
        "search_steps": 1,
        "batch_size": 2,
        "held_out": 2,
        "scored": 2,
        "mask_samples": 4,
    }
    short = dataclasses.replace(script.PROTOCOLS["smollm2"], **sizes, answers=2, extensions=0)
    monkeypatch.setitem(script.PROTOCOLS, "smollm2", short)
    monkeypatch.setattr("benchmarks.harness.generation.NEW_TOKENS", {"e2e_nlg": 2, "gsm8k": 2})
    return short


@pytest.fixture
def line(protocol: script.TextProtocol, data: Path, tiny_causal: str, tmp_path: Path) -> list[str]:
    """The command line of a short run."""
    places = ["--data-dir", str(data), "--model", tiny_causal, "--results", str(tmp_path)]
    return [*places, "--seeds", "0", "--jobs", "1", "--device", "cpu"]


def test_one_search_serves_all_tasks(protocol: script.TextProtocol, line: list[str]) -> None:
    options = script.parse([*line, "--arms", "ln", "lora"])
    cells = [cell for wave in script.waves(options, protocol) for cell in wave]
    searches = [cell for cell in cells if cell["phase"] == "search"]
    assert {cell["task"] for cell in searches} == {SHAKESPEARE}
    assert [cell["learning_rate"] for cell in searches] == [*script.RATES["ln"], *script.RATES["lora"]]
    finals = [(cell["task"], cell["arm"]) for cell in cells if cell["phase"] == "final"]
    assert finals == [(task, arm) for task in ROWS for arm in ("ln", "lora")]
    assert [cell["task"] for cell in cells if cell["phase"] == "base"] == [*ROWS]

    own = dataclasses.replace(protocol, searched_on=None)
    waves = script.waves(options, own)
    assert {cell["task"] for wave in waves for cell in wave if cell["phase"] == "search"} == {*ROWS}


def test_a_task_without_a_search_takes_the_rate(line: list[str], tmp_path: Path) -> None:
    protocol = script.PROTOCOLS["smollm2"]
    place = Place(line[3], Path(line[1]), "cpu")
    cell = {"protocol": protocol.name, "phase": "final", "task": "gsm8k", "arm": "ln", "dtype": "float32", "seed": 0}
    row = script.run_cell(cell, protocol, place, {(SHAKESPEARE, "ln", "float32"): 0.25})
    assert row["learning_rate"] == 0.25
    assert row["experiment_name"] == "lntune/SmolLM2-135M-Instruct-default"
    assert row["generated"]["count"] == 2
    assert row["num_trainable_params"] == row["num_method_params"] == 5 * 16
    assert row["metrics"]["perplexity"] > 1


def test_entries_of_a_norm_are_limited(data: Path, tiny_causal: str, protocol: script.TextProtocol) -> None:
    task = load_task(SHAKESPEARE, data, tiny_causal)
    torch.manual_seed(0)
    sizes = {"hidden_size": 80, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, pad_token_id=0, **sizes))
    tuned: Any = script.tune(model, {"arm": "ln-64", "seed": 0}, task, protocol)
    sizes_of = {name: parameter.numel() for name, parameter in own_parameters(tuned).items()}
    assert list(sizes_of.values()) == [64] * 4
    assert not any(".norm." in name.replace("layernorm", "") for name in sizes_of)  # the final norm
    train(tuned, [task.train.batch([0, 1], CPU)], Schedule(1, 0.1))
    from peft_lntune.interop import to_lora

    report = to_lora(tuned, data / "lora")
    assert "64" in str(report)


def test_only_float32_deltas_move_over_bfloat16(data: Path, tiny_causal: str) -> None:
    batch = load_task(SHAKESPEARE, data, tiny_causal).train.batch([0, 1, 2, 3], CPU)
    moved = {}
    for name in ("ln-bf16", "stock-ln-bf16"):
        model = find_arm(name).tune(AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.float32))
        gains = [value for key, value in model.named_parameters() if "norm" in key and "original" not in key]
        assert any(value.dtype == torch.bfloat16 for value in gains)
        assert {value.dtype for key, value in model.named_parameters() if "q_proj" in key} == {torch.float32}
        moved[name] = train(model, [batch] * 3, Schedule(3, 1e-3))["moved"]
    assert moved == {"ln-bf16": 1.0, "stock-ln-bf16": 0.0}


def test_weights_over_bfloat16_are_rounded(tiny_causal: str) -> None:
    model = find_arm("ln-bf16").tune(AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.float32))
    weight = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(weight, weight.bfloat16().float())


def test_autocast(data: Path, tiny_causal: str, protocol: script.TextProtocol) -> None:
    task, place = load_task(SHAKESPEARE, data, tiny_causal), Place(tiny_causal, data, "cpu")
    cell = {"dtype": "float32", "seed": 0}
    seen = {}
    for autocast in (False, True):
        base = load_base(cell, dataclasses.replace(protocol, autocast=autocast), place, task)
        model = find_arm("ln").tune(base)
        seen[autocast] = model(**task.train.batch([0], CPU)).logits.dtype
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert seen == {False: torch.float32, True: torch.bfloat16}


def test_few_rows_are_scored(data: Path, tiny_causal: str) -> None:
    task = load_task(SHAKESPEARE, data, tiny_causal)
    assert len(task.first(3).validation) == 3
    assert task.first(3).validation == task.first(3).validation
    assert task.first(None) is task.first(100) is task


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18 + 2 = 20\n#### 20", "20"),
        ("#### 5\nor rather\n#### $1,070.50.", "1070.50"),
        ("#### -3 apples", "-3"),
        ("#### -$3", "-3"),
        ("#### 29.00", "29"),
        ("#### 72, altogether", "72"),
        ("#### ,", None),
        ("The answer is 20.", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_match() -> None:
    references = [("a\n#### 4",), ("b\n#### 1,000",), ("c\n#### 3",), ("d\n#### 5",)]
    found = score_answers("gsm8k", ["so\n#### 4.0", "#### 1000", "#### 8", "5"], references)
    assert found == {"exact_match": 0.5, "answered": 0.75}


def test_every_reference_counts() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is missing: pip install 'peft-lntune[examples]'")
    answers = ["the film is very good indeed", "a film that is bad"]
    exact = [["it is good", answers[0]], [answers[1]]]
    found = score_answers("e2e_nlg", answers, exact)
    assert found["bleu"] == pytest.approx(100)
    assert found["chrf"] == pytest.approx(100)
    assert score_answers("e2e_nlg", answers, [[first] for first, *_ in exact])["bleu"] < 60


def test_prompts_are_different_and_have_all_references(data: Path, tiny_causal: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    prompts = load_prompts("e2e_nlg", data, tokenizer, 10)
    by_prompt = dict(zip(map(tokenizer.decode, prompts.tokens), prompts.references, strict=True))
    assert by_prompt == {"film": ("the film is good", "a good film") * 2, "good": ("good",) * 2}
    rows = load_task("e2e_nlg", data, tiny_causal).validation
    assert isinstance(rows, Split)
    assert all(any(row[: len(prompt)] == prompt for row in rows.tokens) for prompt in prompts.tokens)
    assert len(load_prompts("e2e_nlg", data, tokenizer, 1).tokens) == 1
    with pytest.raises(ValueError, match="tinyshakespeare has no prompts; tasks with prompts are e2e_nlg, gsm8k"):
        load_prompts(SHAKESPEARE, data, tokenizer, 1)


def test_answers_in_a_batch_are_those_of_each_prompt_alone(tiny_causal: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    model = AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.float64)
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # strong attention, so that answers depend on the whole prompt
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        model.lm_head.weight[:5] = model.lm_head.weight[15:] = 0  # only words are written
    tokens = ((5, 6, 7, 8, 9), (10,), (11, 12, 13))
    alone = []
    for prompt in tokens:
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        alone.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert len({*alone}) == 3
    prompts = Prompts(tokens, ((), (), ()))
    assert write_answers(model, prompts, tokenizer, 6) == alone
    assert write_answers(model, prompts, tokenizer, 6, batch_size=2) == alone
    row = answer_row(model, "gsm8k", Prompts(tokens, (("#### 1",),) * 3), tokenizer)["generated"]
    assert (row["count"], row["exact_match"]) == (3, 0.0)


def test_costs_of_rows_of_a_length(protocol: script.TextProtocol, data: Path, tiny_causal: str) -> None:
    place = Place(tiny_causal, data, "cpu")
    cell = {"task": SHAKESPEARE, "dtype": "float32", "arms": ["full", "full again", "ln"], "rounds": 2}
    whole = time_methods(cell, protocol, place, warm_up=0)
    cut = time_methods({**cell, "tokens": 3}, protocol, place, warm_up=0)
    assert (whole["tokens"], cut["tokens"]) == (6, 3)
    assert [*cut["arms"]] == cell["arms"]
    assert cut["arms"]["full"]["accelerator_memory_max"] < whole["arms"]["full"]["accelerator_memory_max"]


def scores(arm: str, seed: int, perplexity: float, phase: str = "final", **at: Any) -> Row:
    cell = {"protocol": "smollm2", "phase": phase, "task": SHAKESPEARE, "arm": arm, "dtype": "float32", "seed": seed}
    name = "perplexity" if phase == "final" else "held_out_perplexity"
    return {
        "cell": {**cell, **at},
        "learning_rate": at.get("learning_rate", 0.01),
        "metrics": {name: perplexity, "train_loss": 2.5, "moved": 0.25},
        "num_trainable_params": 1234,
        "file_size": 5678,
        "created_at": "",
    }


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page(seeds: int, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if seeds > 1:  # the plots are drawn in the other case
        monkeypatch.setattr("benchmarks.papers.llm_report.plot_dots", lambda *args: None)
        monkeypatch.setattr("benchmarks.papers.llm_report.plot_along", lambda *args: None)
    rows = Rows(tmp_path / "llm.jsonl")
    for arm, better in (("ln", 8.0), ("lora", 0.0)):
        for seed in range(seeds):
            rows.append(scores(arm, seed, 40.0 - better + 0.1 * seed))
        for rate in script.RATES[arm]:
            rows.append(scores(arm, 0, 30 + abs(math.log(rate / 0.01)), "search", learning_rate=rate))
    for rate, share in zip(script.RATES["stock-ln-bf16"], (0.5, 0.25), strict=True):
        row = scores("stock-ln-bf16", 0, 50.0, "search", learning_rate=rate)
        rows.append({**row, "metrics": {**row["metrics"], "moved": share}})
    rows.append(
        {
            "cell": {**script.base_cell(script.PROTOCOLS["smollm2"]), "task": SHAKESPEARE},
            "metrics": {"perplexity": 77.0},
        }
    )
    assert script.main([*line, "--report"]) == 0
    page = (tmp_path / "llm.md").read_text()
    assert f"seeds run: {seeds} of 3" in page
    spread = " ± 0.10" if seeds > 1 else ""
    verdict = " (holds)" if seeds > 1 else ""
    assert (
        f"| lntune/SmolLM2-135M-Instruct-default | 1,234 | 5,678 | 0.01 | {32 + 0.1 * (seeds > 1):.2f}{spread} |"
        in page
    )
    assert f"| ln - lora | 8.00{' ± 0.00' if seeds > 1 else ''}{verdict} |" in page
    assert ("One seed was run" in page) == (seeds == 1)
    assert f"| the model as it is | 0 | 0 | {NONE} | 77.00 |" in page
    assert "0.01 (edge)" in page  # lora's largest rate
    assert "| 50.0% | 25.0% |" in page
    assert page.count("**30.0**") == page.count("**30.0** (edge)") + 1 == 2  # ln's best rate has rates on both sides
    assert "e2e_nlg, gsm8k: all." in page
    for name in ("llm.png", "llm_rates.png"):
        assert f"({name})" in page
        assert (tmp_path / name).exists() == (seeds == 1)


def test_a_page_without_rows(line: list[str], tmp_path: Path) -> None:
    script.main([*line, "--report"])
    page = (tmp_path / "llm.md").read_text()
    assert "e2e_nlg, gsm8k: all." in page
    assert "![" not in page


def test_texts_need_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse([])
    assert "give --data-dir" in capsys.readouterr().err


def test_the_list_counts_the_model_as_it_is(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--tasks", SHAKESPEARE, "gsm8k", "--arms", "ln", "--seeds", "0", "--list"]
    assert script.main([*line, *chosen]) == 0
    assert capsys.readouterr().out.startswith(f"{2 + len(script.RATES['ln']) + 2} runs left")
    assert not (tmp_path / "llm.jsonl").exists()


@pytest.mark.end_to_end
def test_run_and_resume(line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [*line, "--tasks", SHAKESPEARE, "gsm8k", "--arms", "ln", "ln-64", "road"]
    assert script.main(chosen) == 0
    path = tmp_path / "llm.jsonl"
    whole = path.read_text()
    searches = sum(len(script.RATES[arm]) for arm in ("ln", "ln-64", "road"))
    assert len(Rows(path)) == 2 + searches + 2 * 3 + 1  # the model as it is, the methods on both tasks, costs
    path.write_text("".join(whole.splitlines(keepends=True)[:-2]))
    script.main([*chosen, "--list"])
    assert capsys.readouterr().out.startswith("1 runs left")
    script.main([*line, "--tasks", "gsm8k", "--arms", "ln"])
    assert path.read_text().count('"phase": "cost"') == 1, "one table of costs, whichever tasks are asked for"
    assert script.main(chosen) == 0
    assert len(Rows(path)) == len(whole.splitlines())
    assert "gsm8k test accuracy, %" in (tmp_path / "llm.md").read_text()
