"""The metrics against their formulas written out."""

import doctest
import math

import metrics
import pytest
from metrics import METRICS, entities, score, word_f1
from task_data import GLUE_COLUMNS

PREDICTED, TRUE = [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0]


def test_classes_by_counting():
    tp, fp, fn, tn = 2, 1, 1, 2
    assert score("sst2", PREDICTED, TRUE) == {"accuracy": pytest.approx((tp + tn) / 6)}
    assert score("mrpc", PREDICTED, TRUE)["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score("cola", PREDICTED, TRUE) == {"matthews_correlation": pytest.approx(matthews)}


def test_a_rare_class_and_several_classes():
    rare = score("imbalanced", [0, 0, 0, 0], [0, 0, 0, 1])  # F1 of class 0 is 6/7, of class 1 it is 0
    assert rare == {"accuracy": 0.75, "macro_f1": pytest.approx(3 / 7), "majority": 0.75}
    several = score("multi_label_classification", [[1, 0], [1, 1]], [[1, 0], [1, 0]])
    assert several == {"micro_f1": pytest.approx(4 / 5), "macro_f1": pytest.approx(1 / 2), "accuracy": 0.5}


def test_correlations():
    predicted, true = [0.0, 1.0, 2.0, 10.0], [0.0, 1.0, 3.0, 4.0]
    mean_p, mean_t = 3.25, 2.0
    covariance = sum((p - mean_p) * (t - mean_t) for p, t in zip(predicted, true, strict=True))
    scale = math.sqrt(sum((p - mean_p) ** 2 for p in predicted) * sum((t - mean_t) ** 2 for t in true))
    result = score("stsb", predicted, true)
    assert result == {"pearson": pytest.approx(covariance / scale), "spearmanr": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", set()),
        ("B-x I-x O B-x", {("x", 0, 2), ("x", 3, 4)}),
        ("B-x B-x I-x", {("x", 0, 1), ("x", 1, 3)}),
        ("O I-x I-x", {("x", 1, 3)}),  # as conlleval reads it
        ("B-x I-y", {("x", 0, 1), ("y", 1, 2)}),
        ("B-x O I-x", {("x", 0, 1), ("x", 2, 3)}),
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
        ("", set()),
    ],
)
def test_entities(tags, spans):
    assert entities(tags.split()) == spans


def test_entities_are_counted_whole():
    predicted = ["B-x I-x O B-y O", "B-x O O"]
    true = ["B-x I-x O B-x O", "B-x I-x B-y"]
    right, found, wanted = 1, 3, 4  # of the right words a wrong type, and of the right type a part, are wrong
    result = score("entities", [p.split() for p in predicted], [t.split() for t in true])
    assert result == {
        "overall_precision": pytest.approx(right / found),
        "overall_recall": pytest.approx(right / wanted),
        "overall_f1": pytest.approx(2 * right / (found + wanted)),
    }


def test_no_entities():
    nothing = {"overall_precision": 0.0, "overall_recall": 0.0, "overall_f1": 0.0}
    assert score("entities", [["O", "O"]], [["O", "O"]]) == nothing
    assert score("entities", [["O", "O"]], [["B-x", "I-x"]]) == nothing


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("the Denver  Broncos!", ["Denver Broncos"], 100, 100),
        ("Broncos", ["Denver Broncos"], 0, 200 / 3),  # precision 1, recall 1/2
        ("Broncos", ["Denver Broncos", "Broncos"], 100, 100),
        ("New York New", ["New York"], 0, 80),  # a word counts as often as both have it
        ("Panthers", ["Denver Broncos"], 0, 0),
        ("theatre", ["atre"], 0, 0),  # an article is a word
    ],
)
def test_answers(answer, references, exact, f1):
    assert score("squad", [answer], [references]) == {
        "exact_match": pytest.approx(exact),
        "f1": pytest.approx(f1),
    }


def test_answers_are_averaged():
    result = score("squad", ["Denver", "Broncos", "x"], [["Denver"], ["Denver Broncos"], ["y"]])
    assert result == {"exact_match": pytest.approx(100 / 3), "f1": pytest.approx(100 * (1 + 2 / 3) / 3)}
    assert word_f1("", "") == 0.0


def test_docstrings():
    assert doctest.testmod(metrics).attempted >= 3
    assert not doctest.testmod(metrics).failed


def test_every_task_has_metrics():
    others = {"classification", "imbalanced", "multi_label_classification", "regression", "entities", "squad"}
    assert set(GLUE_COLUMNS) | others == set(METRICS)
