"""The demo data keep the promises of their docstring."""

import json
import re
from collections import Counter

import pytest
from demo_data import FAMILIES, KINDS, PARTS, TASKS, main, sentences, write_data


def all_words(part):
    return {word for kind in KINDS for field in ("aspects", "praise", "blame") for word in kind.words(field, part)}


def test_words_and_templates_are_held_out():
    assert not all_words("train") & all_words("validation")
    assert not {t for train, _ in FAMILIES for t in train} & {t for _, validation in FAMILIES for t in validation}
    seen = " ".join(row["sentence"] for row in sentences("train", 4000, seed=0))
    for word in all_words("validation"):
        assert not re.search(rf"\b{word}\b", seen), word


def test_praise_and_blame_do_not_overlap():
    for part in PARTS:
        praise, blame = ({w for kind in KINDS for w in kind.words(field, part)} for field in ("praise", "blame"))
        assert not praise & blame


@pytest.mark.parametrize("part", PARTS)
def test_balanced_and_different(part):
    rows = list(sentences(part, 400, seed=3))
    assert Counter(row["sentiment"] for row in rows) == {0: 200, 1: 200}
    assert len({row["sentence"] for row in rows}) == 400
    assert {row["topic"] for row in rows} == {0, 1}


def test_labels_by_reading():
    """A few sentences of each construction whose label anyone can see."""
    expected = {
        r"The \S+ was delicious\.": 1,
        r"The \S+ was not dull at all\.": 1,
        r"There was nothing gripping about the .*": 0,
        r"Although the \S+ was rude, .*": 1,
        r"The \S+ was clean, but .*": 0,
    }
    rows = list(sentences("train", 4000, seed=0))
    for pattern, sentiment in expected.items():
        found = [row for row in rows if re.fullmatch(pattern, row["sentence"])]
        assert found, pattern
        assert {row["sentiment"] for row in found} == {sentiment}, pattern


def test_equal_seeds_equal_bytes(tmp_path):
    first, again, other = (
        write_data(tmp_path / name, "sentiment", 50, 20, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    for part in PARTS:
        assert (first / f"{part}.jsonl").read_bytes() == (again / f"{part}.jsonl").read_bytes()
        assert (first / f"{part}.jsonl").read_bytes() != (other / f"{part}.jsonl").read_bytes()


def test_script_writes_every_task(tmp_path, capsys):
    main(["--out", str(tmp_path), "--train", "30", "--validation", "10"])
    for task in TASKS:
        rows = [json.loads(line) for line in (tmp_path / task / "train.jsonl").read_text().splitlines()]
        assert [row["idx"] for row in rows] == list(range(30))
        assert set(rows[0]) == {"sentence", "label", "idx"}
    assert "negative" in capsys.readouterr().out
