"""What masks switched off and how that changed, and what tasks switch off alike: counted one entry at a time."""

import csv

import pytest
import torch
from peft import get_peft_model

from peft_lntune import SupermaskConfig
from peft_lntune.analysis import off_overlap, sparsity
from peft_lntune.analysis.overlap import expected_overlap
from peft_lntune.errors import ConfigError
from peft_lntune.selection import mask_overlap
from peft_lntune.tuner.supermasks import keep_masks, start_masks
from tests import adapted

SHAPES = {
    "encoder.layer.0.attention.self.query.weight": (4, 5),
    "encoder.layer.1.attention.self.query.weight": (4, 5),
    "encoder.layer.1.output.dense.weight": (7, 3),
}


def masks(seed, kept=0.6):
    torch.manual_seed(seed)
    return {name: torch.rand(shape) < kept for name, shape in SHAPES.items()}


def test_each_tensor():
    keep, start = masks(0), masks(1, kept=0.8)
    table = sparsity(keep, start)
    assert table.column("tensor") == list(SHAPES)
    for name, row in zip(SHAPES, table.rows, strict=True):
        pairs = list(zip(keep[name].flatten().tolist(), start[name].flatten().tolist(), strict=True))
        off, on = sum(not k and s for k, s in pairs), sum(k and not s for k, s in pairs)
        gone = sum(not k for k, _ in pairs)
        assert row == (
            *(name, len(pairs), gone, gone / len(pairs)),
            *(sum(not s for _, s in pairs) / len(pairs), off, on, (off + on) / len(pairs)),
        )
    assert off != on


def test_without_the_start():
    table = sparsity(masks(0))
    assert table.columns == ("tensor", "entries", "off", "sparsity")
    assert table.rows == tuple(row[:4] for row in sparsity(masks(0), masks(1)).rows)


def test_each_component_and_layer():
    table = sparsity({**masks(0), "encoder.layer.1.attention.self.key.weight": torch.ones(2, 2).bool()}, by="component")
    assert [row[:3] for row in table.rows] == [
        ("query", 0, "weight"),
        ("query", 1, "weight"),
        ("FFN down", 1, "weight"),
        ("key", 1, "weight"),
    ]
    assert [row[3:] for row in table.rows[:3]] == [row[1:] for row in sparsity(masks(0)).rows]
    assert table.column("off")[3] == 0


def test_of_an_adapter(tmp_path):
    model = get_peft_model(adapted.build("gpt2"), SupermaskConfig(components=["query"], initial_sparsity=0.25))
    table = sparsity(keep_masks(model), start_masks(model), by="component")
    assert set(table.column("flipped")) == {0.0}
    # Queries, keys and values are one matrix, of which the queries are a third.
    fused, own = table.rows[0], table.rows[1]
    assert fused[:4] == ("query, key, value", 0, "weight", 3 * 256)
    assert fused[4:6] == (64, 64 / 768)
    assert own[:6] == ("cross-attention query", 0, "weight", 256, 64, 0.25)
    adapted.fill(model, "default")
    table = sparsity(keep_masks(model), start_masks(model))
    assert table.column("sparsity_before")[0] == 64 / 768
    assert all(0.3 < flipped < 0.7 for flipped in table.column("flipped")[1::2])
    table.to_csv(tmp_path / "t.csv")
    rows = list(csv.reader((tmp_path / "t.csv").read_text().splitlines()))
    assert rows[0] == list(table.columns)
    assert [float(row[3]) for row in rows[1:]] == table.column("sparsity")
    assert str(table).splitlines()[0].startswith("tensor")


def test_overlap_of_what_is_off():
    keeps = {
        "one": masks(0),
        "two": masks(1, kept=0.3),
        "none": {name: torch.ones(s).bool() for name, s in SHAPES.items()},
    }
    table = off_overlap(keeps)
    off = {task: {name: ~mask for name, mask in keep.items()} for task, keep in keeps.items()}
    assert table.column("task") == ["one", "two", "none"]
    assert table.column("one")[:2] == [1.0, mask_overlap(off["one"], off["two"])]
    assert table.column("none") == [0.0, 0.0, 1.0]
    sizes = {task: sum(int(mask.sum()) for mask in found.values()) for task, found in off.items()}
    assert table.column("sparsity") == [size / 61 for size in sizes.values()]
    assert table.column("two, by chance")[0] == expected_overlap(sizes["one"], sizes["two"], 61)


def test_chance_a_tensor_is_that_of_shuffled_masks():
    """Two tasks that spare the same tensor overlap more than chance over all, and as much as chance a tensor."""
    torch.manual_seed(0)

    def draw():
        return {"a.weight": torch.rand(4000) < 0.9, "b.weight": torch.rand(1000) < 0.2}

    one, two = draw(), draw()
    table = off_overlap({"one": one, "two": two})
    (alone, found), (_, by_chance), (_, by_tensor) = (
        table.column(name) for name in ("one", "one, by chance", "one, by chance a tensor")
    )
    assert alone == 1.0
    shuffled = [
        mask_overlap(
            {name: ~mask for name, mask in one.items()},
            {name: ~mask[torch.randperm(len(mask))] for name, mask in two.items()},
        )
        for _ in range(50)
    ]
    assert by_tensor == pytest.approx(sum(shuffled) / 50, rel=0.01)
    assert found == pytest.approx(by_tensor, rel=0.05)
    assert found > 1.5 * by_chance


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparsity({}), "no masks: keep is empty"),
        (lambda: sparsity(masks(0), by="layer"), "by='layer': choose 'tensor' or 'component'"),
        (lambda: sparsity({"w": torch.ones(2)}), r"keep: the mask of w should be a bool tensor, but is torch\.float32"),
        (lambda: sparsity(masks(0), {"w": torch.ones(2)}), "start: the mask of w should be a bool tensor"),
        (lambda: sparsity(masks(0), {"w": torch.ones(2).bool()}), "masks of the same parameters are needed"),
        (lambda: off_overlap({}), "masks_by_task is empty"),
        (lambda: off_overlap({"a": {"w": torch.ones(2)}}), "task 'a': the mask of w should be a bool tensor"),
        (lambda: off_overlap({"a": masks(0), "b": {}}), "masks of the same parameters are needed"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
