"""A table says what it holds, in order, in markdown and in CSV."""

import csv

import pytest

from peft_lntune.analysis import Table
from peft_lntune.errors import ConfigError

TABLE = Table(("name", "score", "rank"), (("b", 0.123456, 2), ("a|c", None, None), ("d", 7.0, 1)))


def test_markdown():
    assert TABLE.to_markdown().splitlines() == [
        "| name | score | rank |",
        "|---|---|---|",
        "| b | 0.1235 | 2 |",
        "| a\\|c | - | - |",
        "| d | 7 | 1 |",
    ]
    assert "| a\\|c | not run | not run |" in TABLE.to_markdown(missing="not run")


def test_print():
    assert str(TABLE).splitlines() == ["name  score   rank", "b     0.1235  2", "a|c   -       -", "d     7       1"]


def test_without_rows():
    empty = Table(("name",), ())
    assert str(empty) == "name"
    assert empty.to_markdown() == "| name |\n|---|"


def test_csv_keeps_every_digit(tmp_path):
    third = Table(("name", "value"), (('a, "b"', 1 / 3), ("π", None)))
    third.to_csv(tmp_path / "t.csv")
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        header, first, second = csv.reader(file)
    assert header == ["name", "value"]
    assert first[0] == 'a, "b"'
    assert float(first[1]) == 1 / 3
    assert second == ["π", ""]


def test_sorted_by():
    assert TABLE.sorted_by("score").column("name") == ["b", "d", "a|c"]
    assert TABLE.sorted_by("score", largest=True).column("name") == ["d", "b", "a|c"]
    twins = Table(("name", "score"), (("x", 1), ("y", 1), ("z", 0)))
    assert twins.sorted_by("score").column("name") == ["z", "x", "y"]
    assert twins.sorted_by("score", largest=True).column("name") == ["x", "y", "z"]
    assert TABLE.column("name") == ["b", "a|c", "d"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: TABLE.column("scores"), "no column 'scores'. It has: name, score, rank"),
        (lambda: TABLE.sorted_by("x"), "no column 'x'"),
        (lambda: Table(("a", "a"), ()), "repeat one"),
        (lambda: Table(("a", "b"), ((1, 2), (3,))), "row 1 should have 2 values, but has 1"),
    ],
)
def test_errors(call, said):
    with pytest.raises(ConfigError, match=said):
        call()
