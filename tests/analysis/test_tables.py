"""A table says what it holds, in order, in markdown and in CSV."""

import csv
import re

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


WIDE = Table(
    ("module", "layer", "parameter", "mean_change", "relative_to_mean", "relative_to_std", "rank_relative_to_std"),
    [
        (f"encoder.layer.{layer}.attention.output.LayerNorm", layer, name, 0.00012345, 123456789.0, None, 1 + layer)
        for layer in range(3)
        for name in ("weight", "bias")
    ],
)


@pytest.mark.parametrize("width", [200, 100, 80, 60, 45])
def test_text_fits_and_loses_nothing(width):
    text = WIDE.to_text(width)
    assert max(map(len, text.splitlines())) <= width
    for value in ("0.0001234", "1.235e+08"):
        assert text.count(value) == len(WIDE.rows)
    blocks = text.split("\n\n")
    assert (len(blocks) > 1) == (width < 80)
    assert text.count("LayerNorm") == len(WIDE.rows) * len(blocks)
    for block in blocks[1:]:  # each block says which rows it shows
        assert block.split()[0] == "module"
        assert "parameter" in block
        assert block.count("weight") == 3


def test_text_without_a_limit_is_the_whole_table():
    assert WIDE.to_text() == WIDE.to_text(1000) == str(WIDE)
    assert len(str(WIDE).splitlines()) == 1 + len(WIDE.rows)


def test_words_are_wrapped_before_columns_are_split():
    table = Table(("component", "mean_change", "entries"), [("query, key, value", 0.5, 12)])
    assert table.to_text(28).splitlines() == [
        "component    mean_   entries",
        "             change",
        "query, key,  0.5     12",
        "value",
    ]


@pytest.mark.parametrize("table", [Table(("a_long_name",), ()), Table(("name", "b"), ()), Table(("a",), (("x y",),))])
def test_small_tables_on_a_narrow_terminal(table):
    assert re.sub(r"\s", "", table.to_text(2)) == re.sub(r"\s", "", str(table))


def test_records():
    assert TABLE.to_records()[1] == {"name": "a|c", "score": None, "rank": None}


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
