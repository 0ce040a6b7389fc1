"""Windows over contexts that are longer than a model reads at once, and the answers found in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from peft_lntune.errors import DataError

ANSWER_TOKENS = 30  # the longest answer that is considered


@dataclass(frozen=True)
class Windows:
    """Cuts contexts into windows, each after its question: `length` tokens in all, `stride` of them the neighbour's."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    stride: int
    part: str = "train"

    def __call__(self, rows: dict[str, list], numbers: Sequence[int]) -> dict[str, Any]:
        """For each window: model inputs, the number of its row, the answer's tokens, and `offsets` (T, 2).

        These are the first character and the end of each token of the context; 0, 0 for other tokens. `Dataset.map`
        calls this for some rows at a time.
        """
        questions = [question.strip() for question in rows["question"]]  # SQuAD has one after thousands of spaces
        lengths = [len(ids) for ids in self.tokenizer(questions, add_special_tokens=False)["input_ids"]]
        longest, row = max(zip(lengths, numbers, strict=True))
        room = self.length - longest - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room <= self.stride:
            problem = (
                f"{self.part} row {row}: a question of {longest} tokens leaves {max(room, 0)} of {self.length} for its "
                "context"
            )
            raise DataError(f"{problem}, and --stride {self.stride} needs more: raise --max-length or lower --stride")
        batch = self.tokenizer(
            questions,
            rows["context"],
            truncation="only_second",
            max_length=self.length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        of = batch["overflow_to_sample_mapping"]  # for each window, which of `rows` it shows
        context = [np.array([part == 1 for part in batch.sequence_ids(i)]) for i in range(len(of))]
        offsets = [np.array(o) * c[:, None] for o, c in zip(batch["offset_mapping"], context, strict=True)]
        spans = [find_answer(o, rows["answers"][row]) for o, row in zip(offsets, of, strict=True)]
        return {
            **{name: batch[name] for name in self.tokenizer.model_input_names if name in batch},
            "row": [numbers[row] for row in of],
            "offsets": offsets,
            "start_positions": [first for first, _ in spans],
            "end_positions": [last for _, last in spans],
        }


def find_answer(offsets: np.ndarray, answers: dict[str, list]) -> tuple[int, int]:
    """First and last token of the first answer, from the tokens' characters (T, 2); 0, 0 if it is not all there."""
    first, last = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
    inside = np.flatnonzero((offsets[:, 1] > first) & (offsets[:, 0] < last))
    whole = len(inside) and offsets[inside[0], 0] <= first and offsets[inside[-1], 1] >= last
    return (int(inside[0]), int(inside[-1])) if whole else (0, 0)


def best_span(offsets: np.ndarray, logits: np.ndarray) -> tuple[float, int, int]:
    """Score, first character and end of the likeliest answer, from offsets and logits of a start and an end, (T, 2)."""
    tokens = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    start, end = logits[tokens].T
    pairs = np.triu(np.ones((len(tokens), len(tokens)), dtype=bool))  # an answer does not end before it starts
    pairs &= ~np.triu(pairs, ANSWER_TOKENS)
    scores = np.where(pairs, start[:, None] + end, -np.inf)
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[i, j]), int(offsets[tokens[i], 0]), int(offsets[tokens[j], 1])


def decode(contexts: Sequence[str], windows: datasets.Dataset, logits: np.ndarray) -> list[str]:
    """The best answer of each row over its windows, from the windows' logits (N, T, 2)."""
    best: dict[int, tuple[float, int, int]] = {}
    for row, offsets, scores in zip(windows["row"], windows["offsets"], logits, strict=True):
        span = best_span(np.array(offsets), scores[: len(offsets)])  # beyond is padding
        best[row] = max(best.get(row, span), span)
    return [context[best[row][1] : best[row][2]] for row, context in enumerate(contexts)]
