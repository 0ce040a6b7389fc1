"""TRL's SFTTrainer with our configs as `peft_config`: what is trained, saved and loaded, and what it does to deltas."""

import json
import re

import datasets
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from sft import main, make_trainer, parse_args, read_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_lntune import FisherLNConfig
from peft_lntune.errors import DataError
from tests.adapted import deltas

# PEFT reads transformers' gradient checkpointing property under its old name
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # and TRL sets it so
]

WORDS = ["<pad>", "<unk>", "<eos>", "=>", "positive", "negative", "The", "was"]
WORDS += ["soup", "film", "plot", "cold", "warm", "bland", "rich"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a random two-layer Llama, with a tokenizer that ends nothing by itself."""
    folder = tmp_path_factory.mktemp("llama")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder with prompts and completions of known words."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    known = {"warm": "positive", "rich": "positive", "cold": "negative", "bland": "negative"}
    lines = [
        json.dumps({"prompt": f"The {thing} was {word} =>", "completion": f" {known[word]}"})
        for thing in ("soup", "film", "plot")
        for word in known
    ]
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize("density", [None, "0.5"])
def test_learns_saves_and_loads(model, rows, density, capsys):
    out, flags = rows / "out", [] if density is None else ["--density", density, "--num-samples", "12"]
    flags += ["--model", model, "--data-dir", str(rows), "--max-steps", "12", "--lr", "5e-2", "--batch-size", "4"]
    main([*flags, "--out", str(out)])
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"rows: ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before
    assert "bit-equal" in printed
    trained = 5 * 16 if density is None else 5 * 16 // 2
    assert f"trainable params: {trained} " in printed
    assert isinstance(PeftConfig.from_pretrained(out), FisherLNConfig) == (density is not None)
    loaded, ids = AutoPeftModelForCausalLM.from_pretrained(out).eval(), torch.tensor([[6, 8, 7, 11, 3]])
    assert isinstance(loaded, PeftModel)
    with torch.no_grad():
        tuned, base = loaded(ids).logits, AutoModelForCausalLM.from_pretrained(model)(ids).logits
        assert not torch.allclose(tuned, base, atol=1e-3)
        torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, tuned)


def test_what_trl_does_to_deltas_over_a_quantized_base(model, rows, monkeypatch):
    """It brings all that is trained into bfloat16, as QLoRA does. They can be brought back before training."""
    load = AutoModelForCausalLM.from_pretrained

    def quantized(*args, **options):
        base = load(*args, **options)
        base.is_loaded_in_8bit = True  # the mark that bitsandbytes leaves
        return base

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantized)
    args = parse_args(["--model", model, "--data-dir", str(rows), "--max-steps", "2", "--lr", "1e-4"])
    trainer = make_trainer(args, read_rows(rows, None, 0))
    assert {delta.weight.dtype for delta in deltas(trainer.model).values()} == {torch.bfloat16}
    for delta in deltas(trainer.model).values():
        delta.float()
    trainer.train()
    assert {delta.weight.dtype for delta in deltas(trainer.model).values()} == {torch.float32}
    assert all((delta.weight != 0).any() for delta in deltas(trainer.model).values())


def test_rows(rows, tmp_path):
    demo = read_rows(None, None, 0)
    assert {row["completion"] for row in demo["train"]} == {" positive", " negative"}
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="has the columns body; wanted are messages or prompt, completion or text"):
        read_rows(tmp_path, None, 0)


def test_errors(model, tmp_path):
    with pytest.raises(SystemExit, match=r"error: no such file, looked for: .*train\.jsonl"):
        main(["--model", model, "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: cannot load no-such-set"):
        main(["--model", model, "--dataset", "no-such-set"])


def test_a_template_that_refuses_a_row_names_it(model, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}")
    turns = [{"role": role, "content": "The film"} for role in ("system", "user", "assistant")]
    parts = {"train": datasets.Dataset.from_list([{"messages": turns[1:]}, {"messages": turns}])}
    args = parse_args(["--model", model, "--chat-template", str(template)])
    with pytest.raises(DataError, match="train row 1 does not fit the chat template: no system turn"):
        make_trainer(args, parts)


def test_prompts_that_leave_no_room_are_counted(model, rows, capsys):
    parts = read_rows(rows, None, 0)
    with pytest.raises(DataError, match="each prompt alone fills all 3 tokens, so no completion is left to learn"):
        make_trainer(parse_args(["--model", model, "--max-length", "3", "--out", str(rows)]), parts)
    parts["train"] = datasets.Dataset.from_list([*parts["train"], {"prompt": "The =>", "completion": " negative"}])
    make_trainer(parse_args(["--model", model, "--max-length", "4", "--out", str(rows)]), parts)
    assert "12 more are left out, because their prompt fills them" in capsys.readouterr().err
