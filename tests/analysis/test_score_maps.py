"""Where scores are high and masks choose: pooled over components and layers."""

import pytest
import torch

from peft_lntune.analysis import score_map
from peft_lntune.errors import ConfigError
from peft_lntune.norms.find import find_norms
from tests.cases import build

SCORES = {
    "encoder.layer.0.output.LayerNorm.weight": torch.tensor([1.0, 3.0]),
    "encoder.layer.0.output.LayerNorm.bias": torch.tensor([0.5, 0.5]),
    "encoder.layer.1.output.LayerNorm.weight": torch.tensor([0.0, 0.0]),
    "embeddings.LayerNorm.weight": torch.tensor([7.0]),
}
PATH = "encoder.layer.output.LayerNorm"


def test_scores():
    table = score_map(SCORES)
    assert table.columns == ("component", "layer", "parameter", "entries", "mean_score")
    assert table.rows == (
        (PATH, 0, "weight", 2, 2.0),
        (PATH, 0, "bias", 2, 0.5),
        (PATH, 1, "weight", 2, 0.0),
        ("embedding norm", None, "weight", 1, 7.0),
    )
    assert score_map(SCORES, how="sum").column("sum_of_scores") == [4.0, 1.0, 0.0, 7.0]


def test_masks():
    masks = {name: value > 1 for name, value in SCORES.items()}
    assert score_map(masks).column("share_tuned") == [0.5, 0.0, 0.0, 1.0]
    assert score_map(masks, how="sum").column("entries_tuned") == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3", "t5", "cohere"])
def test_roles_of_norms(family):
    model = build(family)
    norms = find_norms(model)
    scores = {
        name: value.detach().abs() for name, value in model.named_parameters() if name.rpartition(".")[0] in norms
    }
    table = score_map(scores, norms)
    assert all(component.endswith("norm") or component == "head" for component in table.column("component"))
    assert sum(table.column("entries")) == sum(value.numel() for value in scores.values())
    # The names of the whole model tell the same, but for heads, which hold more than norms.
    whole = score_map({name: value.detach().abs() for name, value in model.named_parameters()})
    assert {row for row in table.rows if row[0] != "head"} <= set(whole.rows)


def test_norms_of_one_role_are_pooled():
    model = build("gemma3")  # two norms around each sub-layer, and one of queries and one of keys
    scores = {f"{name}.weight": torch.ones(norm.weight_shape) for name, norm in find_norms(model).items()}
    table = score_map(scores, find_norms(model))
    rows = list(zip(table.column("component"), table.column("layer"), strict=True))
    assert len(rows) == len(set(rows)) == 3 * 2 + 1


@pytest.mark.parametrize(
    ("scores", "options", "said"),
    [
        ({}, {}, "at least one, but are 0 score and 0 mask"),
        ({"a": torch.ones(1), "b": torch.ones(1).bool()}, {}, "1 score and 1 mask"),
        ({"a": torch.tensor([1.0, float("nan")])}, {}, "the scores of a have NaN"),
        ({"a": torch.ones(1)}, {"how": "max"}, "how='max'"),
    ],
)
def test_errors(scores, options, said):
    with pytest.raises(ConfigError, match=said):
        score_map(scores, **options)
