"""The metrics of GLUE, of named entities and of SQuAD as `evaluate.Metric` classes.

`evaluate.load("glue", task)` fetches a script from the Hub and runs it, and so do "seqeval" and "squad"; these classes
need neither network nor foreign code, and give the same numbers under the same names. The formulas of GLUE are
scikit-learn's, and SciPy's for the two correlations it lacks.

    >>> score("mrpc", predictions=[1, 0, 1], references=[1, 0, 0])
    {'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


class _TaskMetric(evaluate.Metric):
    """Numbers from predictions and references; `prediction` and `reference` are the types of one row."""

    prediction: ClassVar[Any] = datasets.Value("int64")
    reference: ClassVar[Any] = datasets.Value("int64")

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": self.prediction, "references": self.reference})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)


class Accuracy(_TaskMetric):
    """Share of predictions that equal their reference."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(_TaskMetric):
    """Harmonic mean of precision and recall of class 1."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions))}


class MacroF1(_TaskMetric):
    """Mean of the classes' F1: a rare class counts as much as a frequent one."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0))}


class MajorityShare(_TaskMetric):
    """Share of the most frequent reference: the accuracy of always saying it."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"majority": max(Counter(references).values()) / len(references)}


class SeveralF1(_TaskMetric):
    """Rows with several classes: F1 of all together, the mean of the classes' F1, and the share of rows all right."""

    prediction = reference = datasets.Sequence(datasets.Value("int64"))

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
        micro, macro = (
            float(f1_score(references, predictions, average=kind, zero_division=0.0)) for kind in ("micro", "macro")
        )
        return {"micro_f1": micro, "macro_f1": macro, "accuracy": float(accuracy_score(references, predictions))}


class MatthewsCorrelation(_TaskMetric):
    """Correlation of two labelings, 0 for a constant guess."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class Pearson(_TaskMetric):
    """Linear correlation of predicted and true values."""

    prediction = reference = datasets.Value("float32")

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {"pearson": float(pearsonr(references, predictions).statistic)}


class Spearman(_TaskMetric):
    """Linear correlation of the ranks of predicted and true values."""

    prediction = reference = datasets.Value("float32")

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {"spearmanr": float(spearmanr(references, predictions).statistic)}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Spans (type, first, last + 1) of a BIO sequence; an I- that continues nothing begins an entity, as in conlleval.

    >>> sorted(entities(["B-person", "I-person", "O", "I-location", "B-location"]))
    [('location', 3, 4), ('location', 4, 5), ('person', 0, 2)]
    """
    spans, kind, first = set(), "", 0
    for position, tag in enumerate((*tags, "O")):
        prefix, _, new = tag.partition("-")
        if prefix == "I" and new == kind:
            continue
        if kind:
            spans.add((kind, first, position))
        kind, first = new, position
    return spans


class EntityF1(_TaskMetric):
    """Precision, recall and F1 of whole entities: right is one with the reference's words and its type.

    Over all sequences together, as seqeval's micro average and conlleval; 0 where nothing is found.
    """

    prediction = reference = datasets.Sequence(datasets.Value("string"))

    def _compute(self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = [(entities(p), entities(r)) for p, r in zip(predictions, references, strict=True)]
        right = sum(len(found & true) for found, true in pairs)
        precision = right / max(1, sum(len(found) for found, _ in pairs))
        recall = right / max(1, sum(len(true) for _, true in pairs))
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        return {"overall_precision": precision, "overall_recall": recall, "overall_f1": f1}


def answer_words(answer: str) -> list[str]:
    """The words of an answer that SQuAD's evaluation compares: lower case, no punctuation, no articles.

    >>> answer_words("The  Panthers' defence, in 2015.")
    ['panthers', 'defence', 'in', '2015']
    """
    letters = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def word_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of an answer's words, repetitions counted."""
    found, true = answer_words(answer), answer_words(reference)
    common = (Counter(found) & Counter(true)).total()
    return 2 * common / (len(found) + len(true)) if common else 0.0


class Squad(_TaskMetric):
    """Exact match and F1 of answers in percent, each against the best of its references (Rajpurkar et al., 2016)."""

    prediction = datasets.Value("string")
    reference = datasets.Sequence(datasets.Value("string"))

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        exact = [any(answer_words(answer) == answer_words(true) for true in truths) for answer, truths in pairs]
        f1 = [max(word_f1(answer, true) for true in truths) for answer, truths in pairs]
        return {"exact_match": 100 * sum(exact) / len(pairs), "f1": 100 * sum(f1) / len(pairs)}


METRICS: dict[str, tuple[type[_TaskMetric], ...]] = {
    "cola": (MatthewsCorrelation,),
    "mnli": (Accuracy,),
    "mrpc": (Accuracy, F1),
    "qnli": (Accuracy,),
    "qqp": (Accuracy, F1),
    "rte": (Accuracy,),
    "sst2": (Accuracy,),
    "stsb": (Pearson, Spearman),
    "wnli": (Accuracy,),
    "classification": (Accuracy,),
    "imbalanced": (Accuracy, MacroF1, MajorityShare),
    "multi_label_classification": (SeveralF1,),
    "regression": (Pearson, Spearman),
    "entities": (EntityF1,),
    "squad": (Squad,),
}


def score(task: str, predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Every metric of one task, from N predictions and N references.

    These are classes, a 0 or 1 per class, values in a regression, lists of BIO tags, or answers, each of them with a
    list of right ones.
    """
    results: dict[str, float] = {}
    for metric in METRICS[task]:
        # kept in memory, so that runs side by side share no cache file
        results |= metric(keep_in_memory=True).compute(predictions=predictions, references=references)
    return results
