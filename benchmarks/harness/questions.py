"""Question answering: SQuAD's rows, split into windows and scored by the code of `examples/question_answering.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.evaluation import EVALUATION_BATCH
from benchmarks.harness.models import Head
from benchmarks.harness.splits import Batch, ordered, pad_rows
from benchmarks.harness.tasks import Task, loads

NAME = "squad_small"
LENGTH, STRIDE = 384, 128  # tokens of a window, and of them those that the next one has too: the example's
SPAN = ("start_positions", "end_positions")


@dataclass(frozen=True)
class Questions:
    """Questions with contexts; `windows[i]` are those of question i, which stay together in a batch."""

    contexts: tuple[str, ...]
    answers: tuple[list[str], ...]
    windows: tuple[tuple[dict[str, Any], ...], ...]
    pad: int

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each question's longest window."""
        return [max(len(window["input_ids"]) for window in windows) for windows in self.windows]

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.windows)

    def take(self, indices: list[int]) -> "Questions":
        """Return the chosen questions, in the order given."""
        return Questions(
            contexts=tuple(self.contexts[i] for i in indices),
            answers=tuple(self.answers[i] for i in indices),
            windows=tuple(self.windows[i] for i in indices),
            pad=self.pad,
        )

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        """Pad all windows (W) of the chosen questions: inputs (W, T), and the answer's first and last token (W,)."""
        windows = [window for i in indices for window in self.windows[i]]
        found = pad_rows([window["input_ids"] for window in windows], self.pad)
        if "token_type_ids" in windows[0]:
            found["token_type_ids"] = pad_rows([window["token_type_ids"] for window in windows], 0)["input_ids"]
        found |= {name: torch.tensor([window[name] for window in windows]) for name in SPAN}
        return {name: values.to(device) for name, values in found.items()}


@loads(NAME)
def load_questions(name: str, data_dir: Path | None, model: str) -> Task:
    """Load questions whose answer is a span of their context; on the Hub they are all of SQuAD."""
    from question_answering import read_questions
    from training import load_tokenizer
    from transformers import AutoModelForQuestionAnswering
    from windows import Windows

    tokenizer = load_tokenizer(model, padding_side="right")
    cut = Windows(tokenizer, min(LENGTH, tokenizer.model_max_length), STRIDE)
    splits = {}
    for part, rows in read_questions(data_dir and data_dir / name).items():
        columns = rows[:]
        encoded = cut(columns, range(len(rows)))
        windows: list[list[dict[str, Any]]] = [[] for _ in range(len(rows))]
        for number, row in enumerate(encoded["row"]):
            windows[row].append({key: values[number] for key, values in encoded.items()})
        answers = tuple(row["text"] for row in columns["answers"])
        splits[part] = Questions(
            tuple(columns["context"]), answers, tuple(map(tuple, windows)), tokenizer.pad_token_id or 0
        )
    return Task(name, **splits, head=Head(AutoModelForQuestionAnswering, {}), evaluate=answer_scores)


@torch.no_grad()
def answer_scores(model: nn.Module, split: Questions, device: torch.device) -> dict[str, float]:
    """Return exact match and F1 of the best span over all windows of each question, in per cent."""
    import datasets
    from metrics import score
    from windows import decode

    model.eval()
    logits: list[Any] = []  # (T, 2) a window, of the batch's length
    shown: dict[str, list[Any]] = {"row": [], "offsets": []}
    for indices in ordered(split, EVALUATION_BATCH):
        batch = split.batch(indices, device)
        output = model(**{name: values for name, values in batch.items() if name not in SPAN})
        logits += list(torch.stack([output.start_logits, output.end_logits], -1).float().cpu().numpy())
        for i in indices:
            shown["row"] += [i] * len(split.windows[i])
            shown["offsets"] += [window["offsets"].tolist() for window in split.windows[i]]
    found = decode(split.contexts, datasets.Dataset.from_dict(shown), logits)  # type: ignore[arg-type]
    return score("squad", found, split.answers)
