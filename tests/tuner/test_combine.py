"""Weighted combinations: linear ones are exact sums of deltas, sparse ones are PEFT's own functions on deltas."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import nn

from peft_lntune import BottleneckConfig, FisherLNConfig, LNTuningConfig, ModuleTuningConfig, UnifiedConfig
from peft_lntune.errors import ConfigError
from tests.adapted import adapt, assert_unchanged, build, deltas, fill, inputs, output, snapshot
from tests.oracles import weighted_sum, written


def dense(model, adapter):
    return {name: delta.dense() for name, delta in deltas(model, adapter).items()}


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 0.25], [1.0, -1.0], [-0.7, 2.0], [0.0, 1.0]], ids=str)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_linear_is_the_weighted_sum(family, weights):
    """Exactly, as two products and a sum round the same however they are written."""
    peft_model = adapt(build(family), "a", "b")
    peft_model.add_weighted_adapter(["a", "b"], weights, "sum")
    found = [dense(peft_model, name) for name in ("a", "b")]
    for name, value in dense(peft_model, "sum").items():
        assert torch.equal(value, weighted_sum([delta[name] for delta in found], weights))


def test_the_output_of_a_linear_combination():
    plain, batch = build("bert"), inputs("bert")
    peft_model = adapt(build("bert"), "a", "b", "c")
    peft_model.add_weighted_adapter(["c", "a", "b"], [0.5, -0.5, 2.0], "sum")
    peft_model.set_adapter("sum")
    assert torch.equal(output(peft_model, batch), output(written(plain, dense(peft_model, "sum")), batch))
    expected = [
        weighted_sum(d, [0.5, -0.5, 2.0]) for d in zip(*(dense(peft_model, n).values() for n in "cab"), strict=True)
    ]
    for value, other in zip(dense(peft_model, "sum").values(), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)  # three terms: the order of the sum is torch's


def test_an_adapter_and_its_negative_cancel():
    model, batch = build("bert", torch.bfloat16), inputs("bert")
    base = output(model, batch)
    peft_model = adapt(model, "a", "b")
    peft_model.add_weighted_adapter(["a", "a"], [1.0, -1.0], "nothing")
    peft_model.set_adapter("nothing")
    assert torch.equal(output(peft_model, batch), base)


def test_a_name_may_come_twice():
    peft_model = adapt(build("bert"), "a")
    peft_model.add_weighted_adapter(["a", "a"], [0.25, 0.5], "sum")
    for name, value in dense(peft_model, "sum").items():
        torch.testing.assert_close(value, 0.75 * dense(peft_model, "a")[name], rtol=1e-6, atol=0)


SPARSE = {
    "ties": lambda d, w: merge_utils.ties(d, w, 0.5, "total"),
    "ties by frequency": lambda d, w: merge_utils.ties(d, w, 0.5, "frequency"),
    "dare_linear": lambda d, w: merge_utils.dare_linear(d, w, 0.5),
    "dare_ties": lambda d, w: merge_utils.dare_ties(d, w, 0.5, "total"),
    "magnitude_prune": lambda d, w: merge_utils.magnitude_prune(d, w, 0.5),
}


@pytest.mark.parametrize("case", SPARSE)
def test_sparse_combinations_are_those_of_peft(case):
    combination, _, by = case.partition(" by ")
    peft_model = adapt(build("bert"), "a", "b", "c")
    torch.manual_seed(3)
    peft_model.add_weighted_adapter(
        ["a", "b", "c"],
        [1.0, 0.5, -1.0],
        "sum",
        combination_type=combination,
        density=0.5,
        majority_sign_method=by or "total",
    )
    found = [dense(peft_model, name) for name in ("a", "b", "c")]
    torch.manual_seed(3)  # DARE drops at random; the layers are visited in the order of the model
    for name, value in dense(peft_model, "sum").items():
        expected = SPARSE[case]([delta[name] for delta in found], torch.tensor([1.0, 0.5, -1.0]))
        assert torch.equal(value, expected)


def test_masks_are_united():
    peft_model = adapt(build("bert"), "a", "b")
    masks = {"a": torch.arange(16) < 4, "b": torch.arange(16) % 3 == 0}
    for adapter, mask in masks.items():
        peft_model.set_masks(dict.fromkeys(deltas(peft_model, adapter), mask), adapter_name=adapter)
    peft_model.add_weighted_adapter(["a", "b"], [1.0, -2.0], "sum")
    for name, delta in deltas(peft_model, "sum").items():
        assert torch.equal(delta.tuned(), masks["a"] | masks["b"])
        assert delta.weight.numel() == int((masks["a"] | masks["b"]).sum())
        expected = weighted_sum([dense(peft_model, "a")[name], dense(peft_model, "b")[name]], [1.0, -2.0])
        assert torch.equal(delta.dense(), expected)


def test_a_masked_and_a_dense_adapter_make_a_dense_one():
    peft_model = adapt(build("bert"), "a", "b")
    peft_model.set_masks(dict.fromkeys(deltas(peft_model, "a"), torch.arange(16) < 4), adapter_name="a")
    peft_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert all(delta.mask is None for delta in deltas(peft_model, "sum").values())


def mixture(*kinds):
    """Adapters of these kinds, `fisher` ones masked on some parameters and absent on one."""
    peft_model = adapt(build("bert"), "plain", roles=["ffn"], tune="weight")
    peft_model.add_adapter("fisher", FisherLNConfig(density=0.5))
    peft_model.add_adapter("other", FisherLNConfig(roles=["attention"]))
    for seed, name in enumerate(("fisher", "other"), start=5):
        masks = {n: torch.arange(16) % (seed - 2) == 0 for n in deltas(peft_model, name)}
        masks["bert.encoder.layer.0.attention.output.LayerNorm.weight"][:] = False
        peft_model.set_masks(masks, name, {"made": name})
        fill(peft_model, name, seed=seed)
    peft_model.add_weighted_adapter(list(kinds), [0.5, -2.0], "sum")
    return peft_model


@pytest.mark.parametrize("kinds", [("fisher", "plain"), ("plain", "fisher"), ("fisher", "other")], ids="+".join)
def test_a_sum_with_masks_tunes_their_union_and_reloads(kinds, tmp_path):
    """Dense where one of them is, masked where all are, and nothing where none tunes anything."""
    peft_model = mixture(*kinds)
    found = [deltas(peft_model, name) for name in kinds]
    summed = deltas(peft_model, "sum")
    assert summed.keys() == found[0].keys() | found[1].keys()
    assert "bert.encoder.layer.0.attention.output.LayerNorm.weight" not in summed
    for name, delta in summed.items():
        present = [(own[name], weight) for own, weight in zip(found, [0.5, -2.0], strict=True) if name in own]
        assert torch.equal(delta.tuned(), torch.stack([own.tuned() for own, _ in present]).any(0))
        assert delta.weight.numel() == delta.tuned().sum()
        assert torch.equal(delta.dense(), weighted_sum([own.dense() for own, _ in present], [w for _, w in present]))
    masked = {delta.mask is not None for delta in summed.values()}
    assert masked == ({True} if "plain" not in kinds else {True, False})
    config = peft_model.peft_config["sum"]
    assert type(config) is LNTuningConfig
    sources = {"plain": None, "fisher": {"made": "fisher"}, "other": {"made": "other"}}
    of = {name: sources[name] for name in kinds}
    assert config.mask_source == {"made": "combination", "combination_type": "linear", "of": of}

    peft_model.set_adapter("sum")
    peft_model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "sum", "again")
    assert loaded.peft_config["again"].mask_source == config.mask_source
    assert {name: delta.weight.shape for name, delta in deltas(loaded, "again").items()} == {
        name: delta.weight.shape for name, delta in summed.items()
    }
    batch = inputs("bert")
    assert torch.equal(output(loaded, batch), output(peft_model, batch))


def test_a_sum_with_a_fisher_adapter_that_was_not_fitted_is_dense():
    peft_model = adapt(build("bert"), "plain")
    peft_model.add_adapter("fisher", FisherLNConfig())
    peft_model.add_weighted_adapter(["fisher", "plain"], [1.0, 1.0], "sum")
    assert type(peft_model.peft_config["sum"]) is LNTuningConfig
    assert peft_model.peft_config["sum"].mask_source is None
    assert all(delta.mask is None for delta in deltas(peft_model, "sum").values())


def test_adapters_with_different_targets():
    plain, batch = build("bert"), inputs("bert")
    peft_model = adapt(build("bert"), "ffn", roles=["ffn"], tune="weight")
    peft_model.add_adapter("attention", LNTuningConfig(roles=["attention"], tune="bias"))
    fill(peft_model, "attention", seed=4)
    peft_model.add_weighted_adapter(["ffn", "attention"], [2.0, -1.0], "sum")
    expected = {name: 2.0 * value for name, value in dense(peft_model, "ffn").items()}
    expected |= {name: -1.0 * value for name, value in dense(peft_model, "attention").items()}
    for name, value in dense(peft_model, "sum").items():
        assert torch.equal(value, expected.get(name, torch.zeros(16)))
    peft_model.set_adapter("sum")
    assert torch.equal(output(peft_model, batch), output(written(plain, expected), batch))


def trained_entries(model, *adapters):
    """Names of what adapters train, and how many entries, adapter names left out."""
    found = {}
    for adapter in adapters:
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name and "modules_to_save" not in name:
                found.setdefault(name.replace(f".{adapter}.", "."), []).append(parameter.numel())
    return found


class Nested(nn.Module):
    """Names of which one is the ending of another."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.lin = nn.LayerNorm(4), nn.ModuleDict({"norm": nn.LayerNorm(4)}), nn.Linear(4, 4)

    def forward(self, x):
        return self.norm(self.inner["norm"](self.lin(x)))


PAIRS = {
    "a gain and a bias": (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)),
        LNTuningConfig(tune="weight", target_modules=["0"]),
        LNTuningConfig(tune="bias", target_modules=["1"]),
    ),
    "endings of names": (
        Nested,
        LNTuningConfig(target_modules="norm"),
        LNTuningConfig(tune="weight", target_modules="norm"),
    ),
    "a norm and a matrix": (
        Nested,
        ModuleTuningConfig(target_modules=["lin"], tune="bias"),
        LNTuningConfig(tune="weight"),
    ),
    "parts of one matrix": (
        lambda: build("gpt2"),
        ModuleTuningConfig(components=["query"]),
        ModuleTuningConfig(components=["value"]),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_sum_tunes_what_its_sources_tune_and_no_more(pair, tmp_path):
    make, *configs = PAIRS[pair]
    torch.manual_seed(0)
    base = make()
    model = get_peft_model(copy.deepcopy(base), configs[0], "a")
    model.add_adapter("b", configs[1])
    fill(model, "a", seed=1)
    fill(model, "b", seed=2)
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum")
    found = [deltas(model, name) for name in ("a", "b", "sum")]
    assert found[2].keys() == found[0].keys() | found[1].keys()
    for name, delta in found[2].items():
        own = [(held[name], weight) for held, weight in zip(found[:2], [0.5, -2.0], strict=True) if name in held]
        assert torch.equal(delta.tuned(), torch.stack([source.tuned() for source, _ in own]).any(0))
        assert delta.weight.numel() == delta.tuned().sum()
        assert torch.equal(delta.dense(), weighted_sum([source.dense() for source, _ in own], [w for _, w in own]))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "sum")
    assert all(torch.equal(delta.dense(), found[2][name].dense()) for name, delta in deltas(loaded).items())
    assert deltas(loaded).keys() == found[2].keys()


@pytest.mark.parametrize(
    "parts",
    [
        (lambda n: BottleneckConfig(roles=["attention"], bottleneck_size=n), BottleneckConfig),
        (lambda n: LoraConfig(target_modules=["query"] if n == 2 else ["query", "value"], r=n), LoraConfig),
    ],
    ids=["bottlenecks", "lora"],
)
def test_a_sum_is_as_wide_as_its_sources_at_each_place(parts):
    """Also where only one of them is there: in one layer, or on one of two matrices."""
    part, kind = parts
    model = get_peft_model(build("bert"), UnifiedConfig(parts=[part(2), LNTuningConfig(tune="weight")]), "a")
    narrow = replace(part(3), layers_to_transform=[1]) if kind is BottleneckConfig else part(3)
    model.add_adapter("b", UnifiedConfig(parts=[narrow, LNTuningConfig(tune="bias")]))
    fill(model, "a", seed=1)
    fill(model, "b", seed=2)
    model.add_weighted_adapter(["a", "b", "a"], [0.5, 1.5, 0.25], "sum")
    sources = trained_entries(model, "a", "b")
    own = {name: numbers[0] for name, numbers in trained_entries(model, "sum").items()}
    assert own.keys() == sources.keys()
    shared = {name for name in own if name.endswith(("lntune_up.bias", "up.bias"))}  # of the model's width, added up
    assert {name: sum(sources[name]) for name in own.keys() - shared} == {n: own[n] for n in own.keys() - shared}
    model.set_adapter("sum")
    batch = inputs("bert")
    found = output(model, batch)
    for name, parameter in model.named_parameters():  # the same, as the sum of two that are active
        scale = 0.75 if ".a." in name else 1.5 if ".b." in name else None
        if scale is not None and ("lntune_up" in name or "lora_B" in name or "_weight" in name or "_bias" in name):
            parameter.data.mul_(scale)
    model.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(found, output(model, batch), rtol=1e-5, atol=1e-5)  # float32, in another order


def test_a_sum_over_an_encoder_alone_leaves_the_decoder():
    """Both number their layers from 0."""
    model = get_peft_model(build("t5"), BottleneckConfig(roles=["ffn"], exclude_modules=".*decoder.*"), "a")
    model.add_adapter("b", BottleneckConfig(roles=["ffn"], exclude_modules=".*decoder.*"))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert trained_entries(model, "sum").keys() == trained_entries(model, "a").keys()


def test_sums_keep_the_widest_dtype():
    model = adapt(build("bert"), "a", delta_dtype="float64")
    model.add_adapter("b", LNTuningConfig())
    model.add_weighted_adapter(["b", "a"], [1.0, 1.0], "sum")
    assert {delta.weight.dtype for delta in deltas(model, "sum").values()} == {torch.float64}


def test_heads_are_taken_over():
    peft_model, batch = adapt(build("bert-classifier"), "plain"), inputs("bert-classifier")
    peft_model.add_adapter("headed", LNTuningConfig(modules_to_save=["classifier"]))
    peft_model.add_adapter("pooled", LNTuningConfig(modules_to_save=["pooler"]))
    for seed, name in enumerate(("headed", "pooled"), start=4):
        fill(peft_model, name, seed=seed)
    peft_model.add_weighted_adapter(["plain", "headed", "pooled"], [0.0, 1.0, 0.0], "sum")
    head, pooler = (
        {name: module.modules_to_save for name, module in peft_model.named_modules() if name.endswith(ending)}
        for ending in ("model.classifier", "model.bert.pooler")
    )
    for wrapped, source in ((head, "headed"), (pooler, "pooled")):
        (saved,) = wrapped.values()
        for name, value in saved["sum"].state_dict().items():
            assert torch.equal(value, saved[source].state_dict()[name])
    peft_model.set_adapter("sum")
    assert output(peft_model, batch).isfinite().all()


def test_the_new_adapter_is_a_full_one():
    peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
    before = output(peft_model, batch)
    peft_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    assert peft_model.active_adapters == ["a"]
    assert torch.equal(output(peft_model, batch), before)
    assert not any(delta.weight.requires_grad for delta in deltas(peft_model, "sum").values())
    peft_model.set_adapter("sum")
    assert all(delta.weight.requires_grad for delta in deltas(peft_model, "sum").values())
    mixed = output(peft_model, batch, adapter_names=["sum"] * 3)
    torch.testing.assert_close(mixed, output(peft_model, batch), rtol=1e-5, atol=1e-5)
    peft_model.delete_adapter("b")
    peft_model.merge_adapter()


REFUSED = {
    "taken name": ((["a"], [1.0], "b"), {}, "an adapter named 'b' exists"),
    "unknown adapter": (
        (["a", "x"], [1.0, 1.0], "sum"),
        {},
        r"\['x'\] not found; this model has \['a', 'b'\]",
    ),
    "no adapter": (([], [], "sum"), {}, r"adapters \[\] not found"),
    "too few weights": ((["a", "b"], [1.0], "sum"), {}, "got 1 weights for 2 adapters"),
    "a weight of NaN": (
        (["a", "b"], [1.0, float("nan")], "sum"),
        {},
        "weight of adapter 'b' should be a finite number",
    ),
    "an infinite weight": ((["a"], [float("inf")], "sum"), {}, "should be a finite number, but is inf"),
    "a name in place of a list": (("a", [1.0], "sum"), {}, r"such as \['a'\]"),
    "unknown combination": ((["a"], [1.0], "sum"), {"combination_type": "svd"}, "'svd': choose one of linear, ties"),
    "no density": ((["a"], [1.0], "sum"), {"combination_type": "ties"}, r"give density in \(0, 1\]"),
    "density of 2": ((["a"], [1.0], "sum"), {"combination_type": "ties", "density": 2.0}, r"give density in \(0, 1\]"),
    "majority sign": (
        (["a", "b"], [1.0, 1.0], "sum"),
        {"combination_type": "ties", "density": 0.5, "majority_sign_method": "loudest"},
        "majority_sign_method='loudest': choose one of 'total', 'frequency'",
    ),
    "name torch cannot hold": ((["a"], [1.0], "keys"), {}, "cannot be named 'keys'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case):
    arguments, options, message = REFUSED[case]
    peft_model = adapt(build("bert"), "a", "b")
    before = snapshot(peft_model)
    with pytest.raises(ConfigError, match=message):
        peft_model.add_weighted_adapter(*arguments, **options)
    assert list(peft_model.peft_config) == ["a", "b"]
    assert_unchanged(peft_model, before)


def test_two_adapters_with_the_same_head_are_refused():
    peft_model = adapt(build("bert-classifier"), "a", "b", task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match=r"target the same module with modules_to_save, but found .*classifier"):
        peft_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert list(peft_model.peft_config) == ["a", "b"]
