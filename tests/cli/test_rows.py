"""Labels of files: which are classes, which are values, and which are refused with their row."""

import math

import pytest

from peft_lntune.cli.rows import encode_labels
from peft_lntune.errors import DataError

TAKEN = {
    "text of whole numbers": (["0", "1", "2"], [0, 1, 2], 3),
    "floats that are whole": ([0.0, 1.0, 2.0], [0, 1, 2], 3),
    "text of floats that are whole": (["0.0", "1.0", "2.0"], [0, 1, 2], 3),
    "bools": ([True, False], [1, 0], 2),
    "values": (["0.5", "1"], [0.5, 1.0], 1),
    "names": (["yes", "no", "yes"], [1, 0, 1], 2),
    "names and a number": (["yes", "3"], [1, 0], 2),
}


@pytest.mark.parametrize("case", TAKEN)
def test_labels_become_numbers(case):
    labels, expected, classes = TAKEN[case]
    found = encode_labels(labels, {})
    assert found == (expected, classes)
    assert {type(label) for label in found[0]} == {type(expected[0])}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", "it is missing"),
        (" ", "it is missing"),
        (None, "it is missing"),
        ("nan", "no number to learn"),
        (math.nan, "no number to learn"),
        ("-inf", "no number to learn"),
        ([0, 1], "of type list"),
        ({"a": 1}, "of type dict"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("known", [{}, {"0": 0, "1": 1}], ids=["no head", "head"])
def test_what_is_no_label_is_refused_with_its_row(wrong, message, known):
    with pytest.raises(DataError, match=f"the label of row 1 is .*{message}"):
        encode_labels(["0", wrong, "1"], known)


def test_negative_classes_and_unknown_names():
    with pytest.raises(DataError, match="that of row 1 is '-1'"):
        encode_labels(["0", "-1"], {})
    with pytest.raises(DataError, match="head knows yes, no, and the data has maybe"):
        encode_labels(["maybe"], {"yes": 0, "no": 1})
