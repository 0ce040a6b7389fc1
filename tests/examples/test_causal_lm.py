"""A causal LM tuned through its RMSNorms: text from three sources, perplexity, generation, the saved adapter."""

import math
import re

import pytest
import torch
from causal_lm import main, perplexity, read_parts, to_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

# PEFT reads transformers' gradient checkpointing property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_tunes_and_saves(tiny_llama, tmp_path, capsys):
    out = tmp_path / "out"
    main(["--model", tiny_llama, "--max-steps", "40", "--lr", "5e-2", "--out", str(out)])
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"text: ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before
    assert "base: " in printed
    assert "tuned: " in printed
    assert f"saved {(out / 'adapter_model.safetensors').stat().st_size:,} bytes" in printed


def test_perplexity_token_by_token(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    blocks = torch.randint(4, 50, (3, 8))
    with torch.no_grad():
        log_p = model(blocks).logits.log_softmax(-1)
    terms = [log_p[i, t, blocks[i, t + 1]].item() for i in range(3) for t in range(7)]
    assert perplexity(model, blocks) == pytest.approx(math.exp(-sum(terms) / len(terms)), rel=1e-4)


def test_sources_of_text(tmp_path):
    (tmp_path / "book.txt").write_text("0123456789" * 10)
    train, validation = read_parts(None, tmp_path / "book.txt")
    assert (len(train[0]), len(validation[0])) == (90, 10)
    for part in ("train", "validation"):
        (tmp_path / f"{part}.csv").write_text(f"text,idx\n{part},0\n")
    assert read_parts(tmp_path, None) == (["train"], ["validation"])
    assert read_parts(None, None)[0][0].endswith(".")


def test_blocks_lose_only_the_last_rest(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    stream = torch.cat([tokenizer(text, return_tensors="pt")["input_ids"][0] for text in ("The soup", "was bland")])
    assert torch.equal(to_blocks(tokenizer, ["The soup", "was bland"], 3).flatten(), stream[:6])


def test_errors(tiny_llama, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit, match="error: 4 tokens of text are less than one block of 64"):
        main(["--model", tiny_llama, "--text", str(tmp_path / "short.txt")])
    with pytest.raises(SystemExit, match=r"error: no such file, looked for: .*train\.jsonl"):
        main(["--model", tiny_llama, "--data-dir", str(tmp_path)])
    for part in ("train", "validation"):
        (tmp_path / f"{part}.csv").write_text("body\nx\n")
    with pytest.raises(SystemExit, match=r"error: .* has the columns body; wanted are text"):
        main(["--model", tiny_llama, "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main([])
