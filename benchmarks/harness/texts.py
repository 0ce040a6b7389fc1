"""Texts for a causal LM, scored by perplexity: speeches of tinyshakespeare, sentences of e2e_nlg about given facts."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.harness.evaluation import EVALUATION_BATCH
from benchmarks.harness.metrics import perplexity
from benchmarks.harness.models import Head
from benchmarks.harness.splits import IGNORED, Split, ordered_batches
from benchmarks.harness.tasks import Task, loads, read_rows

# Columns: what is given, if anything, and what is to be said.
TEXTS = {"tinyshakespeare": (None, "text"), "e2e_nlg": ("meaning_representation", "human_reference")}
LONGEST = 256  # tokens; the rest of a longer text is cut off


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
    begin, end = ([token] if token is not None else [] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    splits = {}
    for part, rows in read_rows(name, data_dir).items():
        prompts = [f"{row[given]}\n" if given else "" for row in rows]
        heads = [begin + ids for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        texts = [ids + end for ids in tokenizer([row[said] for row in rows], add_special_tokens=False)["input_ids"]]
        pairs = list(zip(heads, texts, strict=True))
        tokens = tuple(tuple([*head, *text][:LONGEST]) for head, text in pairs)
        labels = tuple(tuple([*[IGNORED] * len(head), *text][:LONGEST]) for head, text in pairs)
        splits[part] = Split(tokens, labels, tokenizer.pad_token_id or 0)
    return Task(name, **splits, head=Head(AutoModelForCausalLM, {}), evaluate=text_scores)


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
