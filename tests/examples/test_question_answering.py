"""Answers in windows: what each holds, the best span of all of them, and the example from end to end."""

import json

import datasets
import numpy as np
import pytest
from methods import METHODS
from question_answering import answering_task, main, read_questions
from transformers import AutoTokenizer
from windows import ANSWER_TOKENS, Windows, best_span, decode

from peft_lntune.errors import DataError

pytestmark = [
    # PEFT reads transformers' gradient checkpointing property under its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's own LN tuning warns of every norm that is not nn.LayerNorm's supertype in its table
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

RATES = ["--lr", "5e-2", "--head-learning-rate", "5e-2"]
CONTEXT = "The soup was good and the steak was bland and the waiter was kind"


def row_of(answer="the steak", context=CONTEXT, question="what was bland"):
    return {
        "question": question,
        "context": context,
        "answers": {"text": [answer], "answer_start": [context.find(answer)]},
    }


def write(folder, rows, repeat=1):
    folder.mkdir(exist_ok=True)
    for part in ("train", "validation"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * repeat))
    return folder


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def cut(tiny_bert):
    """Rows to windows of 12 tokens: 3 of the question, 3 special ones, 6 of the context, of which 2 are shared."""
    windows = Windows(AutoTokenizer.from_pretrained(tiny_bert), 12, 2)

    def map_rows(rows, **options):
        return datasets.Dataset.from_list(rows).map(
            windows, batched=True, with_indices=True, remove_columns=list(rows[0]), **options
        )

    return map_rows


def right_logits(windows):
    """Logits that are high at the labels of each window, and higher there than where it holds no answer."""
    logits = np.zeros((len(windows), 12, 2))
    for i, window in enumerate(windows):
        logits[i, window["start_positions"], 0] = logits[i, window["end_positions"], 1] = 5.0
    return logits


@pytest.mark.full
def test_every_method_from_the_command_line(tiny_bert, tmp_path, capsys):
    out, data = tmp_path / "out", write(tmp_path / "data", [row_of(), row_of("the waiter")], repeat=4)
    flags = ["--max-steps", "2", "--batch-size", "4", "--model", tiny_bert, "--max-length", "12", "--stride", "2"]
    main(["--data-dir", str(data), "--method", *METHODS, *flags, "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    metrics = ["exact_match", "f1"]
    metrics = ["exact_match", "f1"]
    assert printed[0].split() == ["method", "trainable", "of", "it", "head", "saved", "bytes", *metrics, "seconds"]
    assert [line.split()[0] for line in printed[1 : 1 + len(METHODS)]] == list(METHODS)
    for method, line in zip(METHODS, printed[1 + len(METHODS) :], strict=True):
        assert line.startswith(f"reloaded {out / method}: all 24 validation logits are bit-equal")  # 3 windows a row


def test_learns(tiny_bert, tmp_path):
    rows = [row_of("steak"), row_of("steak", "the steak was good"), row_of("steak", "the waiter was not a steak")]
    data, out = write(tmp_path / "data", rows, repeat=4), tmp_path / "out"
    main(["--data-dir", str(data), "--model", tiny_bert, "--max-steps", "100", *RATES, "--out", str(out)])
    assert json.loads((out / "ln" / "result.json").read_text())["metrics"]["exact_match"] == 100.0


def test_windows_overlap_and_hold_the_answer(cut):
    windows = cut([row_of()])
    seen = [[CONTEXT[a:b] for a, b in window["offsets"] if b > a] for window in windows]
    assert [" ".join(words) for words in seen] == [
        "The soup was good and the",
        "and the steak was bland and",
        "bland and the waiter was kind",
    ]
    found = [(window["start_positions"], window["end_positions"]) for window in windows]
    assert found == [(0, 0), (6, 7), (0, 0)]  # [CLS] what was bland [SEP] and the steak
    assert decode([CONTEXT], windows, right_logits(windows)) == ["the steak"]


def test_an_answer_that_ends_within_a_token(cut):
    (window, *_) = cut([row_of("sou")])
    assert (window["start_positions"], window["end_positions"]) == (6, 6)


def test_rows_are_numbered_over_all_calls_of_map(cut):
    rows = [row_of(), row_of("the waiter"), row_of("was good")]
    windows = cut(rows, batch_size=2)
    assert windows["row"][:] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert decode([CONTEXT] * 3, windows, right_logits(windows)) == ["the steak", "the waiter", "was good"]


def test_best_span_of_all_pairs():
    rng = np.random.default_rng(0)
    offsets = np.array([[0, 0]] * 5 + [[2 * i, 2 * i + 1] for i in range(50)] + [[0, 0]])
    for _ in range(20):
        logits = rng.normal(size=(len(offsets), 2))
        pairs = [(i, j) for i in range(5, 55) for j in range(i, min(55, i + ANSWER_TOKENS))]
        score, i, j = max((logits[i, 0] + logits[j, 1], i, j) for i, j in pairs)
        assert best_span(offsets, logits) == (pytest.approx(score), offsets[i, 0], offsets[j, 1])


def test_short_contexts_have_one_window(tiny_bert, tmp_path):
    parts = read_questions(write(tmp_path, [row_of()]))
    task = answering_task(parts, tiny_bert, length=384, stride=128)
    assert set(task.train.column_names) - set(task.validation.column_names) == {"start_positions", "end_positions"}
    assert len(task.train) == len(task.validation) == 1
    assert task.chance == pytest.approx(np.log(len(task.train["input_ids"][0])))  # every token as likely


def test_hub(monkeypatch):
    rows, asked = datasets.Dataset.from_list([row_of()]), []

    def load_dataset(*args):
        asked.append(args)
        return {"train": rows, "validation": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_questions(None)["validation"][0] == row_of()
    assert asked == [("rajpurkar/squad",)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**row_of(), "answers": {"text": [], "answer_start": []}}, r"train\.jsonl, row 1: no answer; .* SQuAD 1\.1"),
        ({**row_of(), "answers": {"text": ["soup"], "answer_start": [5]}}, "row 1: the context has 'oup ', not 'soup'"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_questions(write(tmp_path, [row_of(), row]))


def test_errors_end_the_script_with_their_text(tiny_bert, tmp_path):
    with pytest.raises(SystemExit, match=r"error: no such file, looked for: .*train\.jsonl"):
        main(["--data-dir", str(tmp_path / "nowhere")])
    flags = ["--data-dir", str(write(tmp_path, [row_of()])), "--model", tiny_bert, "--max-length", "12"]
    with pytest.raises(
        SystemExit, match=r"a question of 3 tokens leaves 6 of 12 .* --stride 6 needs more: raise --max"
    ):
        main([*flags, "--stride", "6"])
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(SystemExit, match="has the columns text; wanted are question, context, answers"):
        main(flags)
