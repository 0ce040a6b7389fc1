"""Texts for a causal LM, scored by perplexity: speeches of tinyshakespeare, sentences of e2e_nlg, answers of gsm8k."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.harness.metrics import perplexity
from benchmarks.harness.models import Head
from benchmarks.harness.splits import IGNORED, Split, ordered_batches
from benchmarks.harness.tasks import Task, loads, read_rows

# Columns: what is given, if anything, and what is to be said.
TEXTS = {
    "tinyshakespeare": (None, "text"),
    "e2e_nlg": ("meaning_representation", "human_reference"),
    "gsm8k": ("question", "answer"),
}
LONGEST = 256  # tokens; the rest of a longer text is cut off
EVALUATION_BATCH = 8  # rows; the logits of a large vocabulary are most of the memory


@loads("gsm8k")
@loads("tinyshakespeare")
@loads("e2e_nlg")
def load_speech(name: str, data_dir: Path | None, model: str) -> Task:
    """Load texts; the loss is of what is to be said alone.

    Raises:
        ValueError: there is no folder.
    """
    from training import load_tokenizer

    if data_dir is None:
        raise ValueError(f"{name} is read from a folder alone; give --data-dir.")
    tokenizer = load_tokenizer(model)
    given, said = TEXTS[name]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    splits = {}
    for part, rows in read_rows(name, data_dir).items():
        heads = prompt_ids(tokenizer, [row[given] if given else None for row in rows])
        texts = [ids + end for ids in tokenizer([row[said] for row in rows], add_special_tokens=False)["input_ids"]]
        pairs = list(zip(heads, texts, strict=True))
        tokens = tuple(tuple([*head, *text][:LONGEST]) for head, text in pairs)
        labels = tuple(tuple([*[IGNORED] * len(head), *text][:LONGEST]) for head, text in pairs)
        splits[part] = Split(tokens, labels, tokenizer.pad_token_id or 0)
    return Task(name, **splits, head=Head(AutoModelForCausalLM, {}), evaluate=text_scores)


def prompt_ids(tokenizer: Any, given: Sequence[str | None]) -> list[list[int]]:
    """Return the ids in front of what is to be said: the token that begins a text, what is given, and a new line."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = ["" if text is None else f"{text}\n" for text in given]
    return [begin + ids for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]


@torch.no_grad()
def text_scores(model: nn.Module, split: Split, device: torch.device) -> dict[str, float]:
    """Return the perplexity of a token, over all tokens that are to be said."""
    model.eval()
    loss, count = 0.0, 0
    for batch in ordered_batches(split, EVALUATION_BATCH, device):
        said = int((batch["labels"][:, 1:] != IGNORED).sum())  # the first token has nothing before it
        loss += said * float(model(**batch).loss) if said else 0.0
        count += said
    return {"perplexity": perplexity(loss / count)}
