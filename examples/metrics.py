"""GLUE's metrics as `evaluate.Metric` classes.

`evaluate.load("glue", task)` fetches a script from the Hub and runs it; these classes need neither network nor foreign
code, and give the same numbers under the same names. The formulas are scikit-learn's, and SciPy's for the two
correlations it lacks.

    >>> score("mrpc", predictions=[1, 0, 1], references=[1, 0, 0])
    {'accuracy': 0.6666666666666666, 'f1': 0.6666666666666666}
"""

from collections.abc import Sequence
from typing import ClassVar

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


class _TaskMetric(evaluate.Metric):
    """One number from predictions and references; `dtype` is that of both columns."""

    dtype: ClassVar[str] = "int64"

    def _info(self) -> evaluate.MetricInfo:
        column = datasets.Value(self.dtype)
        features = datasets.Features({"predictions": column, "references": column})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)


class Accuracy(_TaskMetric):
    """Share of predictions that equal their reference."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(_TaskMetric):
    """Harmonic mean of precision and recall of class 1."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions))}


class MatthewsCorrelation(_TaskMetric):
    """Correlation of two labelings, 0 for a constant guess."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class Pearson(_TaskMetric):
    """Linear correlation of predicted and true values."""

    dtype = "float32"

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {"pearson": float(pearsonr(references, predictions).statistic)}


class Spearman(_TaskMetric):
    """Linear correlation of the ranks of predicted and true values."""

    dtype = "float32"

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {"spearmanr": float(spearmanr(references, predictions).statistic)}


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
    "regression": (Pearson, Spearman),
}


def score(task: str, predictions: Sequence, references: Sequence) -> dict[str, float]:
    """Every metric of one task, from predictions and references of shape (N,): classes, or values in a regression."""
    results: dict[str, float] = {}
    for metric in METRICS[task]:
        # kept in memory, so that runs side by side share no cache file
        results |= metric(keep_in_memory=True).compute(predictions=predictions, references=references)
    return results
