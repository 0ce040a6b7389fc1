"""Answers that a causal LM writes to the prompts of a task, scored against all references of each prompt."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.splits import pad_rows
from benchmarks.harness.tasks import read_rows
from benchmarks.harness.texts import TEXTS, prompt_ids

NEW_TOKENS = {"e2e_nlg": 64, "gsm8k": 200}  # at most, per answer
SHOWN = 3  # answers that a row keeps
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Prompts:
    """Prompts of a task.

    Attributes:
        tokens: ids of each prompt.
        references: of each prompt, one or more right answers.
    """

    tokens: tuple[tuple[int, ...], ...]
    references: tuple[tuple[str, ...], ...]


def load_prompts(name: str, data_dir: Path, tokenizer: Any, count: int) -> Prompts:
    """Return different prompts of the validation split with all of their references, drawn once.

    Args:
        name: a task of `NEW_TOKENS`.
        data_dir: a folder of `<task>/{train,validation}.jsonl`.
        tokenizer: of the model.
        count: how many prompts, at most.

    Raises:
        ValueError: the texts of this task answer nothing.
    """
    given, said = TEXTS[name]
    if given is None:
        raise ValueError(f"{name} has no prompts; tasks with prompts are {', '.join(NEW_TOKENS)}.")
    references: dict[str, list[str]] = {}
    for row in read_rows(name, data_dir)["validation"]:
        references.setdefault(row[given], []).append(row[said])
    every = list(references)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [every[at] for at in order[:count]]
    tokens = tuple(map(tuple, prompt_ids(tokenizer, chosen)))
    return Prompts(tokens, tuple(tuple(references[prompt]) for prompt in chosen))


@torch.no_grad()
def write_answers(model: Any, prompts: Prompts, tokenizer: Any, new_tokens: int, batch_size: int = 32) -> list[str]:
    """Return the answer to each prompt: greedy decoding, in batches with padding on the left.

    Args:
        model: a causal LM, or a `PeftModel` of one.
        prompts: N of them.
        tokenizer: of the model.
        new_tokens: of the longest answer.
        batch_size: prompts that are answered together.

    Returns:
        N texts without special tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id or 0
    order = sorted(range(len(prompts.tokens)), key=lambda at: len(prompts.tokens[at]))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # Rows are padded on the right elsewhere; read backwards, that is the left.
        backwards = pad_rows([prompts.tokens[at][::-1] for at in chosen], pad)
        batch = {name: values.flip(1).to(device) for name, values in backwards.items()}
        length = batch["input_ids"].shape[1]
        ids = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
        texts = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
        found |= dict(zip(chosen, texts, strict=True))
    return [found[at].strip() for at in range(len(order))]


def score_answers(name: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the scores of a task's answers.

    Args:
        name: `e2e_nlg` or `gsm8k`.
        answers: one per prompt.
        references: of each prompt, one or more.

    Returns:
        For e2e_nlg `bleu` and `chrf` of the corpus by sacrebleu, in per cent. For gsm8k `exact_match` and `answered`,
        the shares of answers whose final number is right, and that have one.
    """
    if name == "gsm8k":
        numbers = [final_number(answer) for answer in answers]
        right = [final_number(first) for first, *_ in references]
        pairs = list(zip(numbers, right, strict=True))
        return {
            "exact_match": sum(number is not None and number == wanted for number, wanted in pairs) / len(pairs),
            "answered": sum(number is not None for number in numbers) / len(pairs),
        }
    from sacrebleu import corpus_bleu, corpus_chrf

    most = max(map(len, references))
    # One stream per position; a prompt with fewer references has None there, which sacrebleu's types do not say.
    streams: Any = [[each[at] if at < len(each) else None for each in references] for at in range(most)]
    return {"bleu": corpus_bleu(answers, streams).score, "chrf": corpus_chrf(answers, streams).score}


def final_number(text: str) -> Decimal | None:
    """Return the number behind the last `####` of an answer to a question of gsm8k, or None without one.

    Example:
        >>> final_number("48 / 2 = 24 clips.\\n#### 1,072."), final_number("The answer is 72")
        (Decimal('1072'), None)
    """
    _, mark, end = text.rpartition("####")
    found = NUMBER.match(end.replace("$", "").strip()) if mark else None
    try:
        return None if found is None else Decimal(found[0].replace(",", ""))
    except InvalidOperation:  # digits of other scripts are digits to a pattern
        return None


def answer_row(model: nn.Module, name: str, prompts: Prompts, tokenizer: Any) -> dict[str, Any]:
    """Return what a row says of the answers of a trained model: how many, their scores, and the first of them."""
    answers = write_answers(model, prompts, tokenizer, NEW_TOKENS[name])
    scores = {key: round(value, 4) for key, value in score_answers(name, answers, prompts.references).items()}
    return {"generated": {"count": len(answers), **scores, "answers": answers[:SHOWN]}}
