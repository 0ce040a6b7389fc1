"""What masks of tasks share, and what chance gives: counted over all masks, and drawn for large ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lntune.analysis import overlap_matrix
from peft_lntune.analysis.overlap import expected_overlap
from peft_lntune.errors import ConfigError
from peft_lntune.selection import mask_overlap
from tests.analysis import oracles


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
@settings(max_examples=60, deadline=None)
def test_chance_over_all_masks(sizes):
    assert expected_overlap(*sizes) == pytest.approx(oracles.mean_overlap(*sizes), abs=1e-12)


def test_chance_drawn():
    torch.manual_seed(0)
    entries, a, b = 2000, 400, 150

    def draw(size):
        return {"w": torch.randperm(entries) < size}

    mean = sum(mask_overlap(draw(a), draw(b)) for _ in range(200)) / 200
    assert expected_overlap(a, b, entries) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("density", [1e-3, 0.01, 0.2, 0.999])
def test_chance_of_large_masks(density):
    """For many entries the mean of the ratio is the ratio of the means, d / (2 - d); only few terms are summed."""
    entries = 300_000_000
    size = int(density * entries)
    mean = size * size / entries
    assert expected_overlap(size, size, entries) == pytest.approx(mean / (2 * size - mean), rel=1e-4)


def test_matrix():
    one = {"w": torch.tensor([True, True, False, False]), "b": torch.tensor([False])}
    two = {"w": torch.tensor([True, False, True, False]), "b": torch.tensor([True])}
    all_of_it = {"w": torch.ones(4).bool(), "b": torch.tensor([True])}
    table = overlap_matrix({"one": one, "two": two, "all": all_of_it})
    assert table.columns == (
        *("task", "density", "one", "two", "all"),
        *("one, by chance", "two, by chance", "all, by chance"),
    )
    assert table.column("density") == [0.4, 0.6, 1.0]
    assert table.column("one") == [1.0, 0.25, 0.4]
    assert table.column("all") == [0.4, 0.6, 1.0]
    by_chance = oracles.mean_overlap(2, 3, 5)
    assert table.column("one, by chance") == [None, pytest.approx(by_chance), pytest.approx(0.4)]
    assert table.column("two, by chance") == [pytest.approx(by_chance), None, pytest.approx(0.6)]


def test_one_task():
    assert overlap_matrix({"one": {"w": torch.tensor([True, False])}}).rows == (("one", 0.5, 1.0, None),)


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({}, "masks_by_task is empty"),
        ({"a": {"w": torch.ones(2).bool()}, "b": {"v": torch.ones(2).bool()}}, "masks of the same parameters"),
        ({"a": {"w": torch.ones(2).bool()}, "b": {"w": torch.ones(3).bool()}}, "masks of the same parameters"),
        ({"a": {"w": torch.ones(2)}}, "task 'a': the mask of w should be a bool tensor, but is torch.float32"),
    ],
)
def test_errors(masks, said):
    with pytest.raises(ConfigError, match=said):
        overlap_matrix(masks)
