"""How far components moved: as plain Python counts it, on models with and without adapters, and what is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LNTuningConfig as StockLNTuningConfig
from peft import LoraConfig, TaskType, get_peft_model

from peft_lntune import LNTuningConfig
from peft_lntune.analysis import Table, parameter_change
from peft_lntune.analysis.change import MEASURES
from peft_lntune.architectures.components import find_components, group_by_place
from peft_lntune.errors import ConfigError
from peft_lntune.selection.effective import effective_parameters
from tests import adapted
from tests.analysis import oracles
from tests.cases import build

NAMES = ["wte.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.bias", "h.1.mlp.c_fc.weight", "other.1.block.bias"]
# PEFT warns of every norm it adapts itself.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type.*LayerNorm:UserWarning")

RANKS = [f"rank_{measure}" for measure in MEASURES]


def moved(model, std=0.01, seed=3):
    """A copy of a model with noise on every parameter."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return other


def expected_rows(old, new, layers=True):
    groups = group_by_place(find_components(old), layers=layers)
    flat = [[value for name in names for value in old[name].flatten().tolist()] for names in groups.values()]
    flat_new = [[value for name in names for value in new[name].flatten().tolist()] for names in groups.values()]
    measures = [oracles.change(a, b) for a, b in zip(flat, flat_new, strict=True)]
    ranks = zip(*(oracles.ranks(values) for values in zip(*measures, strict=True)), strict=True)
    places = [tuple(place) if layers else (place.component, place.parameter) for place in groups]
    return [
        (*place, len(values), *row, *rank)
        for place, values, row, rank in zip(places, flat, measures, ranks, strict=True)
    ]


def assert_rows(found: Table, rows, rel=1e-9):
    assert len(found.rows) == len(rows)
    places = list(found.columns).index("entries") + 1
    for row, right in zip(found.rows, rows, strict=True):
        assert row[:places] == right[:places]
        for value, wanted in zip(row[places : places + 3], right[places : places + 3], strict=True):
            assert value == wanted if wanted is None else value == pytest.approx(wanted, rel=rel)


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "gemma2"])
def test_against_plain_python(family, layers):
    old, new = adapted.build(family), moved(adapted.build(family))
    found = parameter_change(old, new, layers=layers)
    rows = expected_rows(dict(old.named_parameters()), dict(new.named_parameters()), layers)
    assert_rows(found, rows)
    # Ranks are compared exactly: values of random models are no ties.
    assert [row[-3:] for row in found.rows] == [row[-3:] for row in rows]
    assert ("layer" in found.columns) == layers


values = st.floats(-1e3, 1e3, width=32)


@given(
    st.lists(st.lists(st.tuples(values, values), min_size=1, max_size=5), min_size=1, max_size=5),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_values(entries, layers):
    old = {name: torch.tensor([a for a, _ in pairs]) for name, pairs in zip(NAMES, entries, strict=False)}
    new = {name: torch.tensor([b for _, b in pairs]) for name, pairs in zip(NAMES, entries, strict=False)}
    found = parameter_change(old, new, layers=layers)
    rows = expected_rows(old, new, layers)
    # Entries that differ only in their last digits lose digits in float64 too.
    assert_rows(found, rows, rel=1e-5)
    for which, measure in enumerate(MEASURES):
        column = found.column(measure)
        assert found.column(RANKS[which]) == oracles.ranks(column)


def test_chunks(monkeypatch):
    old, new = adapted.build("bert"), moved(adapted.build("bert"))
    whole = parameter_change(old, new)
    monkeypatch.setattr("peft_lntune.analysis.pooling.CHUNK", 7)
    assert_rows(parameter_change(old, new), whole.rows)


@pytest.mark.parametrize(
    ("old", "new", "measures"),
    [
        ([0.0, 0.0, 0.0], [0.0, 0.5, 1.0], (0.5, None, None)),
        ([0.1, 0.1, 0.1], [0.2, 0.1, 0.1], (0.1 / 3, 1 / 3, None)),  # equal, though no float sum of three is 0.3
        ([2.0], [3.0], (1.0, 0.5, None)),
        ([1.0, 3.0], [1.0, 3.0], (0.0, 0.0, 0.0)),
    ],
)
def test_no_denominator(old, new, measures):
    table = parameter_change({"w": torch.tensor(old)}, {"w": torch.tensor(new)})
    for value, wanted in zip(table.rows[0][4:7], measures, strict=True):
        assert value == (wanted if wanted is None else pytest.approx(wanted, rel=1e-6))
    assert table.rows[0][7:] == tuple(None if value is None else 1 for value in measures)


def test_half_precision_is_summed_in_float64():
    old = torch.ones(4097, dtype=torch.bfloat16)  # bfloat16 cannot count past 256, nor float16 to 4097
    table = parameter_change({"w": old}, {"w": old + 1})
    assert table.column("mean_change") == [1.0]


def test_nothing_of_the_arguments_changes():
    model = build("bert")
    old = {name: value.clone() for name, value in model.named_parameters()}
    parameter_change(model, adapted.adapt(copy.deepcopy(model)))
    assert all(torch.equal(value, old[name]) for name, value in model.named_parameters())


# Adapters: what the model computes with is what counts.

ADAPTERS = {
    "ln": lambda: LNTuningConfig(),
    "stock-ln": lambda: StockLNTuningConfig(target_modules=["LayerNorm"]),
    "lora": lambda: LoraConfig(target_modules=["query", "word_embeddings"], r=2, init_lora_weights=False),
    "lora-head": lambda: LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["value"], r=2),
}


def with_adapter(kind):
    """A plain classifier, and a copy of it with a trained adapter."""
    plain = adapted.build("bert-classifier")
    model = get_peft_model(copy.deepcopy(plain), ADAPTERS[kind]())
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return plain, model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_effective_parameters_are_the_merged_ones(kind):
    plain, model = with_adapter(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = effective_parameters(model)
    assert list(found) == [name for name, _ in plain.named_parameters()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for name, value in found.items():
        torch.testing.assert_close(value, merged[name].detach(), rtol=0, atol=0)
    changed = [name for name, value in plain.named_parameters() if not torch.equal(value, found[name])]
    assert changed
    mean_changes = parameter_change(plain, model).column("mean_change")
    assert 0 < sum(value > 0 for value in mean_changes) < len(mean_changes)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_that_is_switched_off_changes_nothing(kind):
    plain, model = with_adapter(kind)
    with model.disable_adapter():
        assert set(parameter_change(plain, model).column("mean_change")) == {0.0}


@pytest.mark.parametrize("kind", ["ln", "stock-ln", "lora"])
def test_a_merged_adapter_is_counted_once(kind):
    plain, model = with_adapter(kind)
    wanted = parameter_change(plain, model)
    model.merge_adapter()
    assert_rows(parameter_change(plain, model), wanted.rows, rel=1e-6)


def test_the_active_adapter_counts():
    plain = adapted.build("bert")
    model = adapted.adapt(copy.deepcopy(plain), "one", "two", std=0.1)
    one = parameter_change(plain, model).column("mean_change")
    model.set_adapter("two")
    two = parameter_change(plain, model).column("mean_change")
    assert one != two
    deltas = {name: value for name, value in effective_parameters(model).items() if "LayerNorm" in name}
    base = dict(plain.named_parameters())
    for name, value in deltas.items():
        module, _, parameter = name.rpartition(".")
        layer = model.get_base_model().get_submodule(module)
        assert torch.equal(value, base[name] + layer.deltas(parameter)["two"].weight)


def test_small_deltas_on_a_half_precision_model_are_seen():
    plain = adapted.build("bert", torch.bfloat16)
    model = adapted.adapt(copy.deepcopy(plain), std=0.0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lntune_weight" in name:
                value.fill_(1e-4)  # far below the spacing of bfloat16 near 1
    table = parameter_change(plain, model)
    assert [
        change
        for component, parameter, change in zip(
            *map(table.column, ("component", "parameter", "mean_change")), strict=True
        )
        if component.endswith("norm") and parameter == "weight"
    ] == pytest.approx([1e-4] * 5, rel=1e-3)


def test_shared_parameters_have_one_name():
    plain = build("gpt2")
    assert "lm_head.weight" not in effective_parameters(plain)
    # The head shares wte, which LoRA changes for itself alone: no name is added.
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=["wte"], r=2, init_lora_weights=False))
    assert list(effective_parameters(model)) == list(effective_parameters(plain))


# Ranks.


def test_ranks_of_equal_and_missing_values():
    old = {
        "wte.weight": torch.tensor([0.1, -0.2]),
        "norm.weight": torch.tensor([1.0, 1.5]),
        "wpe.weight": torch.ones(1),
    }
    new = {name: value + step for (name, value), step in zip(old.items(), (0.1, 0.2, 0.0), strict=True)}
    change = parameter_change(old, new)
    assert change.column("rank_mean_change") == [2, 1, 3]
    assert change.column("rank_relative_to_std") == [2, 1, None]  # the row of one entry has no std
    assert [parameter_change(old, old).column(rank)[:2] for rank in RANKS] == [[1, 1]] * 3  # ties share a rank


# What is refused.

W = {"w": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (W, {**W, "b": torch.ones(1)}, "1 only after, such as b"),
        ({**W, "a": torch.ones(1), "b": torch.ones(1)}, W, "2 only before, such as a"),
        ({"w": torch.ones(2)}, {"v": torch.ones(2)}, "1 only before, such as w and 1 only after, such as v"),
        (
            {"head.weight": torch.ones(2, 3)},
            {"head.weight": torch.ones(4, 3)},
            r"head.weight is \(2, 3\) before .* head",
        ),
        (W, {"w": torch.tensor([1.0, float("nan")])}, "w has NaN or infinite entries after"),
        ({"w": torch.tensor([1.0, float("inf")])}, W, "w has NaN or infinite entries before"),
        ({"w": torch.tensor([1, 2])}, W, "w before should have floating-point values, but is torch.int64"),
        (W, {"w": torch.ones(2, device="meta")}, "w after should have .* on meta"),
        ({}, {}, "before is empty"),
    ],
)
def test_errors(before, after, said):
    with pytest.raises(ConfigError, match=said):
        parameter_change(before, after)


def test_heads_of_other_sizes_in_models():
    with pytest.raises(ConfigError, match="only before, such as cls"):
        parameter_change(adapted.build("bert"), adapted.build("bert-classifier"))
