"""Budgets, ties, rounding; what masks can do; scores without data."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_lntune import LNTuningConfig
from peft_lntune.errors import ConfigError
from peft_lntune.selection import (
    change_scores,
    check_masks,
    combine_masks,
    magnitude_scores,
    mask_density,
    mask_overlap,
    median_distance_scores,
    random_scores,
    select,
)
from tests.adapted import deltas as deltas_of
from tests.adapted import fill
from tests.cases import build

SCORES = {
    "block.1.norm.weight": torch.tensor([1.0, 9.0, 3.0]),
    "block.0.norm.weight": torch.tensor([5.0, 4.0, 7.0]),
    "block.0.norm.bias": torch.tensor([[2.0], [8.0]]),
    "final.bias": torch.tensor([6.0, 0.0]),
}
BUDGETS = {
    "global": ({"density": 0.3}, {9, 8, 7}),
    "count": ({"count": 4}, {9, 8, 7, 6}),
    "smallest": ({"count": 3, "largest": False}, {0, 1, 2}),
    "threshold": ({"threshold": 7}, {7, 8, 9}),
    "at most": ({"threshold": 1, "largest": False}, {0, 1}),
    "tensor": ({"density": 1 / 3, "scope": "tensor"}, {9, 7, 8, 6}),
    "count a tensor": ({"count": 1, "scope": "tensor"}, {9, 7, 8, 6}),
    "layer": ({"count": 2, "scope": "layer"}, {9, 3, 8, 7, 6, 0}),
    "half rounds up": ({"density": 0.25}, {9, 8, 7}),
    "at least one": ({"density": 1e-6}, {9}),
    "all": ({"density": 1}, set(range(10))),
    "per norm": ({"density": 1, "max_per_norm": 1}, {9, 8, 6}),
    "per norm, both parameters": ({"density": 1, "max_per_norm": 2}, {9, 3, 8, 7, 6, 0}),
    "per norm, within a budget": ({"count": 5, "max_per_norm": 2}, {9, 8, 7, 6, 3}),
    "per norm, of each tensor": ({"count": 2, "scope": "tensor", "max_per_norm": 3}, {9, 3, 8, 7, 5, 6, 0}),
    "per norm, of a layer": ({"count": 2, "scope": "layer", "max_per_norm": 1}, {9, 8, 6}),
    "per norm, above a threshold": ({"threshold": 4, "max_per_norm": 2}, {9, 8, 7, 6}),
    "per norm, smallest": ({"density": 1, "max_per_norm": 1, "largest": False}, {0, 1, 2}),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_budgets(case):
    options, expected = BUDGETS[case]
    masks = select(SCORES, **options)
    assert list(masks) == list(SCORES)
    assert all(mask.shape == SCORES[name].shape and mask.dtype == torch.bool for name, mask in masks.items())
    assert {value for name, mask in masks.items() for value in SCORES[name][mask].tolist()} == expected


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.floats(0.01, 1), st.booleans(), st.randoms())
def test_ties_do_not_depend_on_the_order_of_the_parameters(values, density, largest, random):
    """A slow oracle: sort by score, then name, then position."""
    scores = {f"w{number}": torch.tensor(values[number::3], dtype=torch.float32) for number in range(3)}
    scores = {name: score for name, score in scores.items() if len(score)}
    names = list(scores)
    random.shuffle(names)
    masks = select({name: scores[name] for name in names}, density=density, largest=largest)
    entries = [(name, i) for name in sorted(scores) for i in range(len(scores[name]))]
    entries.sort(key=lambda entry: scores[entry[0]][entry[1]].item() * (-1 if largest else 1))
    number = max(1, int(density * len(entries) + 0.5))
    assert {(name, i) for name in masks for i in masks[name].nonzero().reshape(-1).tolist()} == set(entries[:number])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "none of them"),
        ({"density": 0.1, "count": 1}, "got density, count"),
        ({"density": 0}, "above 0"),
        ({"density": 1.1}, "at most 1"),
        ({"count": 0}, "at least 1"),
        ({"count": 11}, "more than the 10"),
        ({"count": 3, "scope": "tensor"}, "more than the 2"),
        ({"count": 1, "scope": "module"}, "choose one of"),
        ({"threshold": 1, "scope": "layer"}, "no meaning"),
    ],
)
def test_bad_budgets_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        select(SCORES, **options)


def test_scores_that_have_no_order_are_refused():
    with pytest.raises(ConfigError, match=r"scores of b \(and 0 more\) hold NaN"):
        select({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, count=1)
    with pytest.raises(ConfigError, match="no scores"):
        select({}, count=1)


def masks_of(*rows):
    return {"w": torch.tensor(rows[0]).bool(), "b": torch.tensor(rows[1]).bool()}


ONE, TWO, THREE = masks_of([1, 1, 0], [0, 1]), masks_of([1, 0, 0], [1, 1]), masks_of([1, 0, 0], [0, 0])


@pytest.mark.parametrize(
    ("how", "at_least", "expected"),
    [
        ("union", None, masks_of([1, 1, 0], [1, 1])),
        ("intersection", None, masks_of([1, 0, 0], [0, 0])),
        ("vote", 2, masks_of([1, 0, 0], [0, 1])),
    ],
)
def test_combined_masks(how, at_least, expected):
    combined = combine_masks([ONE, TWO, THREE], how, at_least)
    assert all(torch.equal(combined[name], mask) for name, mask in expected.items())


def test_density_and_overlap():
    assert mask_density(ONE) == 3 / 5
    assert mask_overlap(ONE, TWO) == 2 / 4
    assert mask_overlap(ONE, ONE) == 1
    empty = masks_of([0, 0, 0], [0, 0])
    assert mask_overlap(empty, empty) == 1
    assert mask_overlap(ONE, empty) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: combine_masks([]), "no masks"),
        (lambda: combine_masks([ONE], "sum"), "choose one of"),
        (lambda: combine_masks([ONE], "vote"), "needs it"),
        (lambda: combine_masks([ONE], "union", 1), "belongs to"),
        (lambda: combine_masks([ONE, TWO], "vote", 3), "from 1 to 2"),
        (lambda: combine_masks([ONE, {"w": ONE["w"]}]), "b .* missing"),
        (lambda: mask_overlap(ONE, {**ONE, "w": torch.ones(4).bool()}), "another shape"),
        (lambda: check_masks({"v": ONE["w"]}, {"w": torch.Size([3])}, "the model"), "the model does not"),
        (lambda: check_masks({"w": ONE["w"].float()}, {"w": torch.Size([3])}, "the model"), "bool tensor"),
        (lambda: check_masks({"w": ONE["w"]}, {"w": torch.Size([4])}, "the model"), r"shape \(4,\)"),
        (lambda: check_masks({"w": torch.zeros(3).bool()}, {"w": torch.Size([3])}, "the model"), "no entry"),
    ],
)
def test_masks_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_magnitude_is_the_absolute_value_in_float32():
    model = build("bert").bfloat16()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    scores = magnitude_scores(model, ["bert.embeddings.LayerNorm.bias"])
    assert scores["bert.embeddings.LayerNorm.bias"].dtype == torch.float32
    assert torch.equal(
        scores["bert.embeddings.LayerNorm.bias"], model.bert.embeddings.LayerNorm.bias.detach().float().abs()
    )
    assert len(magnitude_scores(model)) == 2 * (1 + 2 * 2 + 1)  # the last is the norm of the head


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=9))
def test_distance_is_from_the_median_of_each_vector(values):
    """A slow oracle: the middle of the sorted entries, the lower one of two."""
    one, two = nn.LayerNorm(len(values)), nn.LayerNorm(1)
    with torch.no_grad():
        one.weight.copy_(torch.tensor(values))
        two.weight.fill_(100)
    scores = median_distance_scores(nn.Sequential(one, two), ["0.weight", "1.weight"])
    middle = sorted(values)[(len(values) - 1) // 2]
    assert scores["0.weight"].tolist() == [abs(value - middle) for value in values]
    assert scores["1.weight"].tolist() == [0]


def test_distance_from_the_median_of_a_bf16_matrix():
    model = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [4.0, -8.0]]))
    scores = median_distance_scores(model, ["weight"])["weight"]
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[0.0, 1.0], [3.0, 9.0]]
    with pytest.raises(ConfigError, match="no parameter 'bias'"):
        median_distance_scores(model, ["bias"])


def test_change_takes_models_or_tensors():
    before, after = build("bert"), build("bert")
    with torch.no_grad():
        after.bert.embeddings.LayerNorm.weight -= torch.arange(16.0)
    scores = change_scores(before, after)
    assert torch.equal(scores.pop("bert.embeddings.LayerNorm.weight"), torch.arange(16.0))
    assert not any(score.any() for score in scores.values())
    state = {name: value.clone() for name, value in before.named_parameters()}
    assert change_scores(state, after, list(scores)).keys() == scores.keys()
    with pytest.raises(ConfigError, match="another shape"):
        change_scores({"w": torch.ones(2)}, {"w": torch.ones(3)})
    with pytest.raises(ConfigError, match=r"tensor 'v' .* not found"):
        change_scores({"w": torch.ones(2)}, {"w": torch.ones(2)}, ["v"])


def test_random_scores_belong_to_seed_and_name():
    one, other = random_scores(build("bert"), seed=0), random_scores(build("bert", seed=5), seed=0)
    assert all(torch.equal(one[name], other[name]) for name in one)
    flat = torch.cat(list(one.values()))
    assert flat.unique().numel() > 0.99 * flat.numel()
    assert 0.4 < flat.mean() < 0.6
    name = next(iter(one))
    assert not torch.equal(random_scores(build("bert"), seed=1)[name], one[name])
    assert torch.equal(random_scores(build("bert"), [name])[name], one[name])


@pytest.mark.parametrize("state", ["active", "merged", "disabled", "another active"])
def test_change_is_that_of_the_parameters_a_model_computes_with(state):
    """Of both sides, and of adapters of another tuner too."""
    before = build("llama").eval()
    model = get_peft_model(copy.deepcopy(before), LNTuningConfig())
    model.add_adapter("other", LNTuningConfig())
    fill(model, "default", seed=1)
    deltas = {name: delta.dense().clone() for name, delta in deltas_of(model).items()}
    after = model
    if state == "merged":
        model.merge_adapter()
    elif state == "another active":
        model.set_adapter("other")
    with model.disable_adapter() if state == "disabled" else nullcontext():
        scores, back = change_scores(before, after), change_scores(after, before)
        one = change_scores(before, after, [min(deltas)])
    moved = state in ("active", "merged")
    assert scores.keys() == deltas.keys()
    for name, delta in deltas.items():
        # base + delta - base in float32
        torch.testing.assert_close(scores[name], delta.abs() if moved else 0 * delta, rtol=1e-6, atol=1e-6)
        assert torch.equal(scores[name], back[name])
    assert list(one) == [min(deltas)]


def test_change_sees_lora_and_heads():
    before = hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(before), config)
    nn.init.ones_(model.base_model.model.classifier.modules_to_save["default"].bias)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    scores = change_scores(before, model, [query, "classifier.bias", "bert.pooler.dense.weight"])
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    torch.testing.assert_close(scores[query], layer.get_delta_weight("default").abs(), rtol=1e-5, atol=1e-6)
    assert scores["classifier.bias"].tolist() == [1.0, 1.0]
    assert not scores["bert.pooler.dense.weight"].any()
