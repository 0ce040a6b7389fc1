"""GLUE's metrics against their formulas written out."""

import math

import pytest
from metrics import METRICS, score
from task_data import GLUE_COLUMNS

PREDICTED, TRUE = [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0]


def test_classes_by_counting():
    tp, fp, fn, tn = 2, 1, 1, 2
    assert score("sst2", PREDICTED, TRUE) == {"accuracy": pytest.approx((tp + tn) / 6)}
    assert score("mrpc", PREDICTED, TRUE)["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score("cola", PREDICTED, TRUE) == {"matthews_correlation": pytest.approx(matthews)}


def test_correlations():
    predicted, true = [0.0, 1.0, 2.0, 10.0], [0.0, 1.0, 3.0, 4.0]
    mean_p, mean_t = 3.25, 2.0
    covariance = sum((p - mean_p) * (t - mean_t) for p, t in zip(predicted, true, strict=True))
    scale = math.sqrt(sum((p - mean_p) ** 2 for p in predicted) * sum((t - mean_t) ** 2 for t in true))
    result = score("stsb", predicted, true)
    assert result == {"pearson": pytest.approx(covariance / scale), "spearmanr": pytest.approx(1.0)}


def test_every_task_has_metrics():
    assert set(GLUE_COLUMNS) | {"classification", "regression"} == set(METRICS)
