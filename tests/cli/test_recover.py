"""Repair of a damaged model, from folders and a file of texts."""

import json
import random

import pytest
import torch
import transformers as hf
from peft import PeftModel

from benchmarks.harness.damage import prune_smallest
from peft_lntune.cli.recover import read_rows
from peft_lntune.errors import DataError
from peft_lntune.recover import quality
from tests.cli.saved import WORDS, refused, run, save_model, write_rows
from tests.recover.pairs import KINDS, SIZES, answers_of, linears, rounded, teacher_of

OPTIONS = ("--steps", 20, "--batch-size", 2, "--length", 10, "--held-out", 8, "--learning-rate", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`teacher`, `rounded`, and `texts.txt`."""
    made = tmp_path_factory.mktemp("recover")
    save(teacher_of(), made / "teacher")
    save(rounded(teacher_of()), made / "rounded")
    (made / "texts.txt").write_text(words(600))
    return made


def save(model, folder):
    save_model(folder)  # for its tokenizer
    model.save_pretrained(folder)
    return folder


def words(count):
    return " ".join(random.Random(0).choices(WORDS[4:], k=count))


def arguments(folder, out, model="rounded", **changed):
    given = {"--teacher": folder / "teacher", "--data": folder / "texts.txt", "--out": out, **changed}
    return ["recover", folder / model, *(one for pair in given.items() for one in pair), *OPTIONS]


def test_the_adapter_repairs_the_model_and_the_table_says_so(folder, tmp_path):
    result = run(*arguments(folder, tmp_path / "a"), "--json", "--steps", 30)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    teacher, damaged, repaired = found["table"]
    assert [row["model"] for row in found["table"]] == ["teacher", "damaged", "repaired"]
    assert teacher["divergence"] == pytest.approx(0, abs=1e-6)
    assert repaired["divergence"] < 0.95 * damaged["divergence"]
    assert (found["entries"], found["rows"], found["held_out"], found["steps"]) == (80, 52, 8, 30)  # of 60 rows
    # What the table says of the repaired model is true of the saved adapter.
    texts = read_rows(folder / "texts.txt", hf.AutoTokenizer.from_pretrained(folder / "teacher"), 10)
    held_out = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))][:8]
    student = hf.AutoModelForCausalLM.from_pretrained(folder / "rounded")
    loaded = PeftModel.from_pretrained(student, tmp_path / "a")
    batches = [{"input_ids": rows} for rows in held_out.split(2)]
    now = quality(loaded, answers_of(teacher_of()), batches)
    assert now == pytest.approx((repaired["perplexity"], repaired["divergence"]), rel=1e-4)
    assert loaded.peft_config["default"].base_model_name_or_path == str(folder / "rounded")


@pytest.mark.end_to_end
def test_merging_as_it_says_keeps_all_but_norms(folder, tmp_path):
    pruned = teacher_of()
    with torch.no_grad():
        for module in linears(pruned).values():
            module.weight.copy_(prune_smallest(module.weight, 0.5))
    save(pruned, tmp_path / "pruned")
    given = arguments(folder, tmp_path / "a")
    given[1] = tmp_path / "pruned"
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert f"peft-lntune merge {tmp_path / 'a'} NEW_FOLDER --model {tmp_path / 'pruned'}" in result.stdout
    assert run("merge", tmp_path / "a", tmp_path / "new", "--model", tmp_path / "pruned").exit_code == 0
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    changed = {name for name, value in pruned.state_dict().items() if not torch.equal(value, merged[name])}
    assert changed
    assert all("norm" in name for name in changed)


@pytest.mark.end_to_end
def test_a_gguf_file(folder, tmp_path):
    pytest.importorskip("gguf", reason="the package gguf is missing: pip install 'peft-lntune[gguf]'")
    from tests.interop.test_gguf_file import write_gguf

    torch.manual_seed(0)
    made, config = KINDS["llama"]
    wide = made(
        config(
            **{
                **SIZES,
                "hidden_size": 32,
                "head_dim": 16,
                "intermediate_size": 32,
                "vocab_size": 11,
                "initializer_range": 0.2,
            }
        )
    )
    save(wide, tmp_path / "teacher")
    sizes = {
        "embedding_length": 32,
        "feed_forward_length": 32,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 16,
        "vocab_size": 11,
        "context_length": 64,
    }
    file = write_gguf(wide, tmp_path / "model.gguf", "llama", sizes=sizes)
    given = arguments(folder, tmp_path / "a", **{"--teacher": tmp_path / "teacher"})
    given[1] = file
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert f"peft-lntune export {tmp_path / 'a'} --gguf {file} --out NEW.gguf" in result.stdout
    result = run("export", tmp_path / "a", "--gguf", file, "--out", tmp_path / "new.gguf")
    assert "5 norm tensors changed, 160 entries; all other bytes are kept." in result.stdout


def test_columns_of_a_table(folder, tmp_path):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "teacher")
    file = write_rows(tmp_path / "t.jsonl", [{"q": "good film", "a": "bad film"}, {"q": "the", "a": "very"}])
    expected = tokenizer("good film bad film the very")["input_ids"]
    assert read_rows(file, tokenizer, 3, ["q", "a"]).flatten().tolist() == expected
    with pytest.raises(DataError, match=r"has the columns q, a; wanted are .*--text-column"):
        read_rows(file, tokenizer, 3)


@pytest.mark.parametrize(
    ("prepare", "options", "said"),
    [
        (lambda f, t: {"model": save(teacher_of("qwen3"), t / "q")}, (), "the norms of the two models differ"),
        (
            lambda f, t: {"model": save(KINDS["llama"][0](KINDS["llama"][1](**{**SIZES, "vocab_size": 41})), t / "v")},
            (),
            "a vocabulary of 41, and the teacher one of 40",
        ),
        (lambda f, t: {"--data": _text(t / "empty.txt", "")}, (), "holds 0 tokens of text, and one row has 10"),
        (
            lambda f, t: {"--data": _text(t / "short.txt", words(50))},
            (),
            "gives 5 rows of 10 tokens, and 10 are needed",
        ),
        (lambda f, t: {"--teacher": save(_broken(), t / "b")}, (), "the divergence in step 1 is not finite"),
        (lambda f, t: {"model": f / "teacher"}, (), "the repaired model is not nearer to the teacher"),
        (lambda f, t: {}, ("--biases",), "no linear map of LlamaForCausalLM has a bias"),
        (lambda f, t: {"model": t / "no.gguf"}, (), "no such file"),
        (lambda f, t: {"model": _other_words(t / "w")}, (), "have different vocabularies"),
    ],
    ids=["norms", "vocabulary", "empty", "short", "diverged", "undamaged", "biases", "no file", "tokenizer"],
)
def test_after_an_error_nothing_is_written(prepare, options, said, folder, tmp_path):
    changed = prepare(folder, tmp_path)
    model = changed.pop("model", folder / "rounded")
    given = arguments(folder, tmp_path / "out" / "a", **changed)
    given[1] = model
    result = run(*given, *options)
    assert refused(result, said), result.output
    assert not (tmp_path / "out").exists()


def _broken():
    model = teacher_of()
    model.model.norm.weight.fill_(torch.nan)
    return model


def _text(file, text):
    file.write_text(text)
    return file


def _other_words(folder):
    save(rounded(teacher_of()), folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"film"', '"movie"'))
    return folder


def test_an_output_that_exists_is_refused_before_anything_is_read(folder, tmp_path):
    (tmp_path / "x").write_text("1")
    result = run("recover", "nowhere", "--teacher", "nowhere", "--data", folder / "texts.txt", "--out", tmp_path)
    assert refused(result, "exists and is not an empty folder")
