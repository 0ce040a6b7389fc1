"""Masks: the chosen entries are parameters, and nobody sees the rest."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
import transformers as hf
from peft import PeftConfig, PeftModel, get_peft_model

from peft_lntune import FisherLNConfig, LNTuningConfig, ModuleTuningConfig, UnifiedConfig
from peft_lntune.errors import ConfigError, UnsupportedError
from tests.adapted import adapt, assert_unchanged, build, deltas, fill, inputs, output, said, snapshot
from tests.tolerance import assert_close


def random_masks(model, adapter="default", density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = deltas(model, adapter)
    return {name: torch.rand(delta.shape, generator=generator) < density for name, delta in found.items()}


def ln_and_adapters(**options):
    return UnifiedConfig(preset="ln+mha-adapter", **options)


HEADED = {
    "SEQ_CLS": hf.BertForSequenceClassification,
    "TOKEN_CLS": hf.BertForTokenClassification,
    "QUESTION_ANS": hf.BertForQuestionAnswering,
}


def headed(task):
    """The BERT of `build` with the head of a task."""
    torch.manual_seed(0)
    return HEADED[task](build("bert").config).eval()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", ["bert", "llama", "cohere"])
def test_only_chosen_entries_are_parameters(family):
    model, batch = build(family), inputs(family)
    base = output(model, batch)
    peft_model = adapt(model, std=0)
    masks = random_masks(peft_model)
    peft_model.set_masks(masks)
    chosen = sum(int(mask.sum()) for mask in masks.values())
    assert sum(p.numel() for p in trained(peft_model)) == chosen
    assert peft_model.get_nb_trainable_parameters()[0] == chosen
    assert peft_model.get_model_status().trainable_params == chosen
    assert all(delta.weight.shape == (masks[name].sum(),) for name, delta in deltas(peft_model).items())
    assert torch.equal(output(peft_model, batch), base)


def test_a_mask_keeps_the_values_it_chooses():
    peft_model, batch = adapt(build("bert")), inputs("bert")
    before = {name: delta.dense().clone() for name, delta in deltas(peft_model).items()}
    masks = random_masks(peft_model)
    peft_model.set_masks(masks)
    for name, delta in deltas(peft_model).items():
        assert torch.equal(delta.dense(), before[name] * masks[name])
        assert torch.equal(delta.tuned(), masks[name])
    expected = output(peft_model, batch)
    peft_model.merge_adapter()
    assert torch.equal(output(peft_model, batch), expected)


def test_a_second_mask_replaces_the_first():
    peft_model = adapt(build("bert"), std=0)
    for seed in (0, 1):
        masks = random_masks(peft_model, seed=seed)
        peft_model.set_masks(masks)
        assert all(torch.equal(delta.tuned(), masks[name]) for name, delta in deltas(peft_model).items())


def test_parameters_without_a_chosen_entry_are_no_longer_tuned():
    model, batch = build("bert"), inputs("bert")
    peft_model = adapt(model)
    first, second, *_ = deltas(peft_model)
    peft_model.set_masks({first: torch.arange(16) < 3, second: torch.zeros(16, dtype=torch.bool)})
    assert list(deltas(peft_model)) == [first]
    assert sum(p.numel() for p in trained(peft_model)) == 3
    assert output(peft_model, batch).isfinite().all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_equals_dense_training_with_a_masked_gradient(optimizer):
    """The same sums in the same order, of longer and shorter vectors, whose tails a kernel may round otherwise.

    AdamW decays the chosen entries and never sees the others.
    """
    batch = inputs("bert")
    masked, dense = (adapt(build("bert"), std=0) for _ in range(2))
    masks = random_masks(masked)
    masked.set_masks(masks)
    for model in (masked, dense):
        if optimizer == "sgd":
            steps = torch.optim.SGD(trained(model), lr=0.05, foreach=False)
        else:
            # Adam divides by the root of what it has seen, so an entry whose gradient is always zero stays zero.
            steps = torch.optim.AdamW(trained(model), lr=0.01, weight_decay=0.1, foreach=False)
        for _ in range(3):
            steps.zero_grad()
            said(model, batch).square().mean().backward()
            if model is dense:
                for name, delta in deltas(dense).items():
                    delta.weight.grad *= masks[name]
            steps.step()
    for name, delta in deltas(masked).items():
        assert delta.weight.abs().min() > 0
        assert torch.equal(delta.dense() == 0, ~masks[name])
        assert_close(delta.dense(), deltas(dense)[name].dense())
    assert_close(output(masked, batch), output(dense, batch))


def test_only_the_named_adapter_is_masked():
    peft_model = adapt(build("bert"), "a", "b")
    before = {name: delta.dense().clone() for name, delta in deltas(peft_model, "a").items()}
    peft_model.set_masks(random_masks(peft_model, "b"), adapter_name="b")
    assert all(delta.mask is None for delta in deltas(peft_model, "a").values())
    assert all(torch.equal(delta.dense(), before[name]) for name, delta in deltas(peft_model, "a").items())
    assert not any(delta.weight.requires_grad for delta in deltas(peft_model, "b").values())  # it was not active


def test_masked_and_dense_adapters_in_one_batch():
    from tests.oracles import each_alone

    peft_model, batch = adapt(build("bert"), "dense", "masked"), inputs("bert")
    peft_model.set_masks(random_masks(peft_model, "masked"), adapter_name="masked")
    names = ["masked", "dense", "__base__"]
    mixed = output(peft_model, batch, adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(peft_model, batch, names), rtol=1e-5, atol=1e-5)


def test_plain_and_fisher_adapters_in_one_batch():
    """Row by row, over a model with heads: one tunes all entries, one some, one those of another parameter."""
    from tests.oracles import each_alone

    peft_model, batch = adapt(build("bert-classifier"), "plain"), inputs("bert-classifier", batch=5)
    peft_model.add_adapter("fisher", FisherLNConfig(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    peft_model.add_adapter("biases", FisherLNConfig(tune="bias", roles=["ffn"]))
    for seed, name in enumerate(("fisher", "biases"), start=5):
        peft_model.set_masks(random_masks(peft_model, name, seed=seed), name)
        fill(peft_model, name, seed=seed)
    peft_model.eval()
    names = ["fisher", "plain", "__base__", "biases", "fisher"]
    mixed = output(peft_model, batch, adapter_names=names)
    torch.testing.assert_close(mixed, each_alone(peft_model, batch, names), rtol=1e-5, atol=1e-5)
    assert len({tuple(row.tolist()) for row in mixed}) == 5


def test_a_mask_of_all_entries_is_a_dense_delta(tmp_path):
    peft_model = adapt(build("bert"))
    before = {name: delta.dense().clone() for name, delta in deltas(peft_model).items()}
    first, _, third, *_ = before
    peft_model.set_masks({first: torch.ones(16, dtype=torch.bool), third: torch.ones(16, dtype=torch.bool)})
    for name, delta in deltas(peft_model).items():
        assert delta.mask is None
        assert torch.equal(delta.weight, before[name])
    assert list(deltas(peft_model)) == [first, third]
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert list(deltas(loaded)) == [first, third]  # though its config alone would tune the second too
    batch = inputs("bert")
    assert torch.equal(output(loaded, batch), output(peft_model, batch))


def test_the_config_of_a_file_without_its_weights(tmp_path):
    """It is for loading that file; a copy of it makes a new adapter."""
    peft_model = adapt(build("bert"))
    peft_model.set_masks(random_masks(peft_model))
    peft_model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    fresh = get_peft_model(build("bert"), config.unmasked())
    assert all(delta.mask is None for delta in deltas(fresh).values())
    assert fresh.peft_config["default"].mask_source is None
    with pytest.raises(UnsupportedError, match=r"were never loaded. Load the adapter with PeftModel.from_pretrained"):
        output(get_peft_model(build("bert"), config), inputs("bert"))


class TestSource:
    """The config says how its mask was made."""

    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            (None, {"made": "by hand"}),
            ({"made": "union", "of": ("sst2", "trec")}, {"made": "union", "of": ["sst2", "trec"]}),
        ],
    )
    def test_it_is_recorded_and_saved(self, given, kept, tmp_path):
        peft_model = adapt(build("bert"))
        peft_model.set_masks(random_masks(peft_model), source=given)
        assert peft_model.peft_config["default"].mask_source == kept
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build("bert"), tmp_path)
        assert loaded.peft_config["default"].mask_source == kept
        passed = PeftModel.from_pretrained(build("bert"), tmp_path, config=LNTuningConfig())
        assert passed.peft_config["default"].mask_source == kept

    @pytest.mark.parametrize(
        ("source", "message"),
        [({"data": torch.ones(1)}, "cannot be saved: .*JSON"), ("sst2", "mask_source takes a dict, but got 'sst2'")],
    )
    def test_what_json_cannot_hold_is_refused(self, source, message):
        peft_model = adapt(build("bert"))
        before = snapshot(peft_model)
        with pytest.raises(ConfigError, match=message):
            peft_model.set_masks(random_masks(peft_model), source=source)
        assert_unchanged(peft_model, before)
        assert peft_model.peft_config["default"].mask_source is None

    def test_each_adapter_has_its_own(self):
        """Also where users make several from one config, or one from that of another."""
        config = LNTuningConfig()
        peft_model = get_peft_model(build("bert"), config, adapter_name="a")
        peft_model.add_adapter("b", config)
        peft_model.set_masks(random_masks(peft_model, "a"), "a", {"made": "for a"})
        peft_model.add_adapter("c", peft_model.peft_config["a"])
        sources = {name: config.mask_source for name, config in peft_model.peft_config.items()}
        assert sources == {"a": {"made": "for a"}, "b": None, "c": {"made": "for a"}}
        assert config.mask_source is None
        assert all(delta.mask is None for delta in deltas(peft_model, "b").values())
        assert_same_masks(peft_model, "a", "c")

    @pytest.mark.parametrize("kind", [LNTuningConfig, ln_and_adapters], ids=["plain", "unified"])
    @pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
    def test_a_config_taken_to_another_model_with_a_head(self, task, kind, tmp_path):
        """PEFT names the heads of some tasks in the config it was given, which here is not the one that is kept."""
        first = get_peft_model(build("bert"), kind())
        first.set_masks(random_masks(first), source={"made": "for the first"})
        masked = dataclasses.replace(first.peft_config["default"], task_type=task)
        with pytest.raises(ConfigError, match=r"no adapter of this model has that config.*config.unmasked\(\)"):
            get_peft_model(headed(task), copy.deepcopy(masked))
        config = masked.unmasked()
        assert masked.deltas.mask_source == {"made": "for the first"}
        second = get_peft_model(headed(task), config)
        made = get_peft_model(headed(task), kind(task_type=task))
        expected = made.peft_config["default"]
        assert second.peft_config["default"].modules_to_save == expected.modules_to_save
        assert second.peft_config["default"].deltas.mask_source is None
        assert config.modules_to_save == expected.modules_to_save  # as PEFT leaves every config
        names = {name for name, p in second.named_parameters() if p.requires_grad}
        assert names == {name for name, p in made.named_parameters() if p.requires_grad}
        fill(second, "default")
        second.save_pretrained(tmp_path)
        loaded, batch = PeftModel.from_pretrained(headed(task), tmp_path), inputs("bert")
        assert torch.equal(output(loaded, batch), output(second, batch))


def assert_same_masks(model, first, second):
    masks = [{name: delta.tuned() for name, delta in deltas(model, adapter).items()} for adapter in (first, second)]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def copy_values(model, source="default", target="ref"):
    """As TRL's trainers make their reference adapter."""
    for name, parameter in list(model.named_parameters()):
        if f".{source}." in name:
            model.get_parameter(name.replace(f".{source}.", f".{target}.")).data.copy_(parameter.data)


KINDS = {
    "norms": LNTuningConfig,
    "fisher": FisherLNConfig,
    "components": partial(ModuleTuningConfig, components=["query", "norm"]),
    "unified": ln_and_adapters,
}


@pytest.mark.parametrize("kind", KINDS)
class TestCopies:
    """An adapter made from the config of a masked one of the same model has its masks; that of no other is guessed."""

    def masked(self, kind):
        model = get_peft_model(build("bert"), KINDS[kind]()).eval()
        masks = {name: torch.rand(delta.shape) < 0.4 for name, delta in deltas(model).items()}
        masks[min(masks)][:] = False  # one that is not tuned at all
        model.set_masks(masks, source={"made": "here"})
        fill(model, "default")
        return model

    @pytest.mark.parametrize("copied", ["itself", "deepcopy", "meta"])
    def test_a_reference_adapter(self, kind, copied):
        model, batch = self.masked(kind), inputs("bert")
        before = output(model, batch)
        config = model.peft_config["default"]
        model.add_adapter("ref", copy.deepcopy(config) if copied == "deepcopy" else config)
        assert_same_masks(model, "default", "ref")
        assert not any(delta.weight.any() for delta in deltas(model, "ref").values())
        assert torch.equal(output(model, batch), before)
        copy_values(model)
        model.set_adapter("ref")
        assert torch.equal(output(model, batch), before)
        assert model.peft_config["ref"].deltas.mask_source == {"made": "here"}

    def test_of_one_that_was_loaded_and_it_saves(self, kind, tmp_path):
        model, batch = self.masked(kind), inputs("bert")
        model.save_pretrained(tmp_path / "saved")
        loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "saved", is_trainable=True).eval()
        loaded.add_adapter("ref", loaded.peft_config["default"])
        copy_values(loaded)
        loaded.save_pretrained(tmp_path, selected_adapters=["ref"])
        again = PeftModel.from_pretrained(build("bert"), tmp_path / "ref")
        assert torch.equal(output(again, batch), output(model, batch))

    def test_with_new_tensors_on_meta(self, kind):
        model = self.masked(kind)
        model.add_adapter("ref", model.peft_config["default"], low_cpu_mem_usage=True)
        assert_same_masks(model, "default", "ref")

    def test_it_is_refused_where_the_masks_are_not_known(self, kind):
        model = self.masked(kind)
        other = build("bert")
        names = [name for name, _ in other.named_modules()]
        with pytest.raises(ConfigError, match="mask is not known here"):
            get_peft_model(other, model.peft_config["default"])
        assert [name for name, _ in other.named_modules()] == names
        fresh = get_peft_model(other, model.peft_config["default"].unmasked())
        assert all(delta.mask is None for delta in deltas(fresh).values())

    def test_two_masks_under_one_config_are_not_guessed_between(self, kind):
        model = self.masked(kind)
        config = model.peft_config["default"]
        model.add_adapter("ref", config)
        masks = {name: ~delta.tuned() for name, delta in deltas(model, "ref").items()}
        model.set_masks(masks, "ref", {"made": "here"})
        before = snapshot(model)
        with pytest.raises(ConfigError, match=r"adapters 'default' and 'ref' have it with different masks"):
            model.add_adapter("third", config)
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default", "ref"]


class TestClear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.filterwarnings("ignore:autocast_adapter_dtype=False keeps")
    @pytest.mark.parametrize("options", [{}, {"autocast_adapter_dtype": False}], ids=["wide", "own dtype"])
    def test_all_entries_are_back(self, dtype, options):
        base, batch = build("bert", dtype), inputs("bert")
        peft_model = get_peft_model(
            base, LNTuningConfig(exclude_modules=["cls.predictions.transform.LayerNorm"]), **options
        )
        fill(peft_model, "default")
        before = {name: (delta.weight.dtype, delta.shape) for name, delta in deltas(peft_model).items()}
        masks = random_masks(peft_model)
        del masks[min(masks)]
        peft_model.set_masks(masks)
        values = {name: delta.dense().clone() for name, delta in deltas(peft_model).items()}
        expected = output(peft_model, batch)
        peft_model.clear_masks()
        found = deltas(peft_model)
        assert {name: (delta.weight.dtype, delta.weight.shape) for name, delta in found.items()} == before
        for name, delta in found.items():
            assert torch.equal(delta.weight, values.get(name, torch.zeros_like(delta.weight)))
            assert delta.weight.requires_grad
        assert peft_model.peft_config["default"].mask_source is None
        assert torch.equal(output(peft_model, batch), expected)

    def test_of_an_adapter_that_was_loaded(self, tmp_path):
        """The model has no layer then where nothing was tuned."""
        peft_model = adapt(build("bert"), "a")
        names = list(deltas(peft_model, "a"))
        peft_model.set_masks({names[0]: torch.arange(16) < 3}, "a")
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "a", "a", is_trainable=True)
        loaded.add_adapter("other", dataclasses.replace(loaded.peft_config["a"].unmasked(), roles=["ffn"]))
        fill(loaded, "other")
        other = {name: delta.dense().clone() for name, delta in deltas(loaded, "other").items()}
        loaded.clear_masks("a")
        assert list(deltas(loaded, "a")) == names
        assert torch.equal(deltas(loaded, "a")[names[0]].dense(), deltas(peft_model, "a")[names[0]].dense())
        assert loaded.active_adapters == ["a"]
        assert all(delta.weight.requires_grad for delta in deltas(loaded, "a").values())
        assert {name for name, p in loaded.named_parameters() if p.requires_grad and ".a." not in name} == set()
        assert all(torch.equal(delta.dense(), other[name]) for name, delta in deltas(loaded, "other").items())

    def test_an_unknown_adapter(self):
        with pytest.raises(ConfigError, match=r"adapter 'x' not found; this model has \['default'\]"):
            adapt(build("bert")).clear_masks("x")


ONES = torch.ones(16, dtype=torch.bool)
NORM = "bert.embeddings.LayerNorm.weight"
REFUSED = {
    "unknown name": ({"bert.nowhere.weight": ONES}, r"masks name 'bert\.nowhere\.weight' .*It tunes: bert\.embeddings"),
    "wrong dtype": ({NORM: ONES.float()}, r"bool tensor of shape \(16,\), but is torch\.float32 of shape \(16,\)"),
    "wrong shape": ({NORM: ONES[:5]}, r"bool tensor of shape \(16,\), but is torch\.bool of shape \(5,\)"),
    "nothing chosen": ({NORM: ~ONES}, "choose no entry at all"),
    "empty": ({}, "choose no entry at all"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_masks_that_do_not_fit_are_refused_before_anything_changes(case):
    masks, message = REFUSED[case]
    peft_model = adapt(build("bert"))
    before = snapshot(peft_model)
    with pytest.raises(ConfigError, match=message):
        peft_model.set_masks(masks)
    assert_unchanged(peft_model, before)


def test_masks_of_an_unknown_adapter_are_refused():
    peft_model = adapt(build("bert"))
    with pytest.raises(ConfigError, match=r"adapter 'other' not found; this model has \['default'\]"):
        peft_model.set_masks({NORM: ONES}, adapter_name="other")
