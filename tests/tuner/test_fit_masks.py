"""Fitting masks: the entries are those that the scores of the model, as it is, put on top."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from peft_lntune import FisherLNConfig, LNTuningConfig, PeftLNTuneError, fisher_scores, fit_fisher_masks, select
from peft_lntune.errors import AdapterFileError, ConfigError, DataError, UnsupportedError
from peft_lntune.tuner.fit_masks import FisherFit
from tests.adapted import assert_unchanged, build, deltas, fill, inputs, norm_names, output, said, snapshot
from tests.oracles import written

FAMILY = "bert-classifier"
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
NORM = "bert.encoder.layer.0.output.LayerNorm"


def batches(size=3):
    """Six samples with labels."""
    both = {**inputs(FAMILY, batch=6), "labels": LABELS}
    return [{name: value[i : i + size] for name, value in both.items()} for i in range(0, 6, size)]


def adapt(family=FAMILY, adapter="default", **options):
    """A model with one adapter to be fitted on `batches`."""
    options = {"task_type": "SEQ_CLS", "num_samples": 6, **options}
    return get_peft_model(build(family), FisherLNConfig(**options), adapter_name=adapter).eval()


def norm_parameters(model):
    return {f"{name}.{parameter}" for name in norm_names(model) for parameter in ("weight", "bias")}


@pytest.mark.parametrize("kind", ["empirical", "mc", "exact"])
@pytest.mark.parametrize("scope", ["global", "tensor", "layer"])
def test_the_best_entries_are_tuned(kind, scope):
    peft_model, batch = adapt(fisher=kind, scope=scope, density=0.25, seed=5), batches()[0]
    before = output(peft_model, batch)
    fit = fit_fisher_masks(peft_model, batches())
    expected = fisher_scores(build(FAMILY), batches(), kind, seed=5)
    assert fit.scores.keys() == expected.keys() == norm_parameters(build(FAMILY))
    for name, score in expected.items():
        torch.testing.assert_close(fit.scores[name], score, rtol=1e-5, atol=1e-12)
    masks = select(fit.scores, density=0.25, scope=scope)
    assert all(torch.equal(fit.masks[name], mask) for name, mask in masks.items())
    found = deltas(peft_model)
    assert found.keys() == {name for name, mask in masks.items() if mask.any()}
    assert all(torch.equal(delta.tuned(), masks[name]) for name, delta in found.items())
    assert sum(delta.weight.numel() for delta in found.values()) == sum(int(mask.sum()) for mask in masks.values())
    assert torch.equal(output(peft_model, batch), before)
    source = {"made": "fisher", "kind": kind, "samples": 6, "seed": 5, "density": 0.25, "scope": scope}
    assert peft_model.peft_config["default"].mask_source == source


def test_only_what_the_config_selects_is_scored():
    peft_model = adapt(roles=["ffn"], tune="bias", density=0.5, exclude_modules=["encoder.layer.1.output.LayerNorm"])
    fit = fit_fisher_masks(peft_model, batches())
    assert fit.scores.keys() == {f"{NORM}.bias"}
    assert deltas(peft_model)[f"{NORM}.bias"].weight.shape == (8,)


def test_other_modules_can_be_fitted_too():
    peft_model = adapt(target_modules=["intermediate.dense", "LayerNorm"], density=0.1)
    fit = fit_fisher_masks(peft_model, batches())
    assert fit.scores["bert.encoder.layer.0.intermediate.dense.weight"].shape == (24, 16)
    chosen = sum(delta.weight.numel() for delta in deltas(peft_model).values())
    assert chosen == round(0.1 * sum(score.numel() for score in fit.scores.values()))


def test_the_head_in_modules_to_save_is_the_one_that_counts():
    peft_model = adapt()
    plain = build(FAMILY)
    head = peft_model.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        for own, parameter in zip(head.parameters(), plain.classifier.parameters(), strict=True):
            own.add_(1.0 + torch.arange(3.0).view(-1, *[1] * (own.dim() - 1)))
            parameter.copy_(own)
    fit = fit_fisher_masks(peft_model, batches())
    for name, score in fisher_scores(plain, batches()).items():
        torch.testing.assert_close(fit.scores[name], score, rtol=1e-5, atol=1e-12)
    other = fisher_scores(build(FAMILY), batches())
    assert not torch.allclose(fit.scores[f"{NORM}.weight"], other[f"{NORM}.weight"], rtol=1e-2)


def test_the_pass_stops_at_num_samples():
    few, all_of_them = adapt(num_samples=2), [{k: v[:2] for k, v in batches()[0].items()}]
    fit = fit_fisher_masks(few, batches())
    assert fit.samples == few.peft_config["default"].mask_source["samples"] == 2
    for name, score in fisher_scores(build(FAMILY), all_of_them).items():
        torch.testing.assert_close(fit.scores[name], score, rtol=1e-5, atol=1e-12)


def test_fewer_samples_than_asked_for_are_said():
    peft_model = adapt(num_samples=100)
    with pytest.warns(UserWarning, match=r"num_samples=100, but the batches held 6; the masks were made from those"):
        fit = fit_fisher_masks(peft_model, batches())
    assert fit.samples == peft_model.peft_config["default"].mask_source["samples"] == 6


def test_a_loss_of_ones_own():
    peft_model = adapt()
    fit = fit_fisher_masks(peft_model, batches(), loss=lambda outputs, batch: outputs.logits[:, 0])
    own = fisher_scores(build(FAMILY), batches(), loss=lambda outputs, batch: outputs.logits[:, 0])
    for name, score in own.items():
        torch.testing.assert_close(fit.scores[name], score, rtol=1e-5, atol=1e-12)


def test_the_summary_says_where_the_entries_are():
    fit = FisherFit(
        scores={},
        masks={
            "a.weight": torch.arange(16) < 4,
            "b.weight": torch.arange(16) < 0,
            "a.bias": torch.arange(16) < 1,
            "c.bias": torch.arange(2000) < 1000,
        },
        samples=1024,
        roles={"a.weight": "attention", "b.weight": "ffn", "a.bias": "attention", "c.bias": "unknown"},
    )
    assert str(fit) == "\n".join(
        [
            "1,005 of 2,048 (49.1 %) of the entries, in 3 of 4 parameters, chosen by 1,024 samples",
            "  role       weight            bias",
            "  attention  4 of 16 (25.0 %)  1 of 16 (6.2 %)",
            "  ffn        0 of 16 (0.0 %)   -",
            "  unknown    -                 1,000 of 2,000 (50.0 %)",
        ]
    )
    real = str(fit_fisher_masks(adapt(), batches()))
    assert [line.split()[0] for line in real.splitlines()[1:]] == ["role", "embedding", "attention", "ffn"]


def test_training_moves_the_chosen_entries_only():
    peft_model, batch = adapt(density=0.1), batches()[0]
    fit = fit_fisher_masks(peft_model, batches())
    steps = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    peft_model.train()
    said(peft_model, batch).backward()
    steps.step()
    for name, delta in deltas(peft_model).items():
        assert torch.equal(delta.dense() != 0, fit.masks[name])


def test_it_comes_back_from_a_file(tmp_path):
    peft_model, batch = adapt(density=0.1, scope="layer"), batches()[0]
    fit_fisher_masks(peft_model, batches())
    fill(peft_model, "default")
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(FAMILY), tmp_path)
    assert type(loaded.peft_config["default"]) is FisherLNConfig
    assert loaded.peft_config["default"].mask_source == peft_model.peft_config["default"].mask_source
    assert torch.equal(output(loaded, batch), output(peft_model, batch))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: saved[name] for name in ("kind", "density", "scope")} == {
        "kind": "FisherLNConfig",
        "density": 0.1,
        "scope": "layer",
    }


def test_one_of_two_adapters_is_fitted():
    """The other one stays as it is, though both were made from one config."""
    peft_model = adapt(adapter="a")
    peft_model.add_adapter("b", peft_model.peft_config["a"])
    fill(peft_model, "b")
    before = {name: delta.dense().clone() for name, delta in deltas(peft_model, "b").items()}
    fit_fisher_masks(peft_model, batches(), "a")
    assert peft_model.peft_config["b"].mask_source is None
    after = deltas(peft_model, "b")
    assert all(delta.mask is None and torch.equal(delta.dense(), before[name]) for name, delta in after.items())
    assert peft_model.active_adapters == ["a"]


class TestRefit:
    def test_a_trained_adapter_is_scored_as_it_is_and_starts_from_zero(self):
        peft_model = adapt(density=0.3)
        first = fit_fisher_masks(peft_model, batches())
        fill(peft_model, "default")
        head = peft_model.base_model.model.classifier
        head.modules_to_save["default"].load_state_dict(head.original_module.state_dict())
        trained = written(build(FAMILY), {name: delta.dense() for name, delta in deltas(peft_model).items()})
        second = fit_fisher_masks(peft_model, batches(), refit=True)
        for name, score in fisher_scores(trained, batches()).items():
            torch.testing.assert_close(second.scores[name], score, rtol=1e-4, atol=1e-10)
        assert any((second.masks[name] & ~mask).any() for name, mask in first.masks.items())
        found = deltas(peft_model)
        assert found.keys() == {name for name, mask in second.masks.items() if mask.any()}
        assert all(torch.equal(delta.tuned(), second.masks[name]) for name, delta in found.items())
        assert not any(delta.weight.any() for delta in found.values())
        assert all(delta.weight.requires_grad for delta in found.values())

    def test_parameters_that_were_left_out_can_be_chosen(self, tmp_path):
        """Also in a model that was loaded, and has no layer where they are."""
        peft_model = adapt(density=0.5, num_samples=6)
        peft_model.set_masks({f"{NORM}.bias": torch.arange(16) < 2})
        fill(peft_model, "default")
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(FAMILY), tmp_path, is_trainable=True)
        fit = fit_fisher_masks(loaded, batches(), refit=True)
        assert fit.scores.keys() == norm_parameters(build(FAMILY))
        assert sum(delta.weight.numel() for delta in deltas(loaded).values()) == 80
        assert len(deltas(loaded)) > 1

    def test_a_mask_that_was_not_trained_yet_needs_no_word(self):
        peft_model = adapt(density=0.5)
        peft_model.set_masks({f"{NORM}.bias": torch.arange(16) < 2})
        fit_fisher_masks(peft_model, batches())
        assert sum(delta.weight.numel() for delta in deltas(peft_model).values()) == 80
        assert peft_model.peft_config["default"].mask_source["made"] == "fisher"

    def test_dense_deltas(self):
        peft_model = adapt(density=0.5)
        fill(peft_model, "default")
        fit_fisher_masks(peft_model, batches(), refit=True)
        assert not any(delta.dense().any() for delta in deltas(peft_model).values())


def trained(peft_model):
    fill(peft_model, "default")
    return peft_model


def beside(peft_model, config):
    peft_model.add_adapter("other", config)
    return peft_model


def merged(peft_model):
    peft_model.merge_adapter()
    return peft_model


def broken(loss):
    """Batches of which the second has a loss that is not finite."""
    return [batches()[0], {**batches()[1], "labels": torch.tensor([0, 1, 0])}], loss


def second_is_nan(outputs, batch):
    losses = outputs.logits[:, 0]
    return losses if torch.equal(batch["labels"], LABELS[: len(losses)]) else losses * torch.nan


REFUSED = {
    "no PeftModel": (
        lambda: build(FAMILY),
        {},
        ConfigError,
        "takes a PeftModel .* but got BertForSequenceClassification",
    ),
    "another tuner": (
        lambda: get_peft_model(build(FAMILY), LoraConfig(task_type="SEQ_CLS")),
        {},
        ConfigError,
        "takes a PeftModel with adapters of this package",
    ),
    "unknown adapter": (
        adapt,
        {"adapter_name": "x"},
        ConfigError,
        r"adapter 'x' not found; this model has \['default'\]",
    ),
    "another kind": (
        lambda: get_peft_model(build(FAMILY), LNTuningConfig(task_type="SEQ_CLS")),
        {},
        ConfigError,
        "'default' has a LNTuningConfig, and masks are fitted for a FisherLNConfig.*set_masks",
    ),
    "not active": (
        lambda: beside(adapt(), FisherLNConfig()),
        {"adapter_name": "other"},
        ConfigError,
        r"'other' is not active \(active: default\).*set_adapter\('other'\) first",
    ),
    "trained": (
        lambda: trained(adapt()),
        {},
        ConfigError,
        "has been trained: 10 of its deltas are not zero.*refit=True",
    ),
    "merged": (lambda: merged(adapt()), {}, UnsupportedError, r"is merged .* unmerge_adapter\(\) first"),
    "no batches": (adapt, {"batches": []}, DataError, "no sample has been seen"),
    "no labels": (adapt, {"batches": [inputs(FAMILY)]}, DataError, "no labels"),
    "a NaN loss": (adapt, {"loss": second_is_nan}, DataError, "the loss of sample 3 is nan"),
    "a NaN loss at refit": (
        lambda: trained(adapt()),
        {"loss": second_is_nan, "refit": True},
        DataError,
        "the loss of sample 3 is nan",
    ),
    "an unknown loss": (adapt, {"loss": "squared"}, ConfigError, "loss='squared': choose one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case):
    make, given, error, message = REFUSED[case]
    model = make().train()
    before = snapshot(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    configs = copy.deepcopy(getattr(model, "peft_config", None))
    with pytest.raises(error, match=f"(?s){message}") as caught:
        fit_fisher_masks(model, **{"batches": batches(), **given})
    assert isinstance(caught.value, PeftLNTuneError)
    assert_unchanged(model, before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert getattr(model, "peft_config", None) == configs


class TestTrainingWithoutMasks:
    MESSAGE = r"adapter '\w+' has a FisherLNConfig, but no mask was fitted.*fit_fisher_masks"

    def step(self, model):
        said(model.train(), batches()[0]).backward()

    @pytest.mark.parametrize("task", ["SEQ_CLS", None])
    def test_it_warns_once_an_adapter(self, task):
        peft_model = beside(adapt(task_type=task), FisherLNConfig())
        for name in ("default", "other"):
            peft_model.set_adapter(name)
            with pytest.warns(UserWarning, match=self.MESSAGE) as caught:
                self.step(peft_model)
            assert len(caught) == 1
            assert f"'{name}'" in str(caught[0].message)
            self.step(peft_model)

    @pytest.mark.parametrize(
        "case", ["fitted", "by hand", "loaded", "plain", "not active", "evaluation", "no gradients", "scoring"]
    )
    def test_it_says_nothing_without_need(self, case, tmp_path):
        peft_model = adapt()
        if case == "fitted":
            fit_fisher_masks(peft_model, batches())
        elif case in ("by hand", "loaded"):
            peft_model.set_masks({f"{NORM}.bias": torch.arange(16) < 2})
        elif case in ("plain", "not active"):
            beside(peft_model, LNTuningConfig()).set_adapter("other")
        if case == "loaded":
            peft_model.save_pretrained(tmp_path)
            peft_model = PeftModel.from_pretrained(build(FAMILY), tmp_path, is_trainable=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if case == "evaluation":
                said(peft_model.eval(), batches()[0]).backward()
            elif case == "no gradients":
                output(peft_model.train(), batches()[0])
            elif case == "scoring":
                fisher_scores(peft_model.train(), batches())
            else:
                self.step(peft_model)

    @pytest.mark.end_to_end
    def test_one_graph(self):
        """A compiled model trains in one graph."""
        peft_model = adapt("bert", task_type=None).train()
        for module in peft_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch._dynamo.reset()
        compiled = torch.compile(peft_model, backend="eager", fullgraph=True)
        assert torch.equal(said(compiled, inputs("bert")), output(peft_model, inputs("bert")))
        with pytest.warns(UserWarning, match=self.MESSAGE):  # which no graph can say
            said(peft_model, inputs("bert"))


def test_masks_of_a_model_with_fewer_layers_are_refused(tmp_path):
    def bert(layers):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 40}
        config = transformers.BertConfig(**sizes, num_hidden_layers=layers, num_labels=3)
        return transformers.BertForSequenceClassification(config)

    peft_model = get_peft_model(bert(2), FisherLNConfig(density=0.3, num_samples=6, task_type="SEQ_CLS"))
    fit_fisher_masks(peft_model, batches())
    peft_model.save_pretrained(tmp_path)
    deeper = bert(3)
    before = snapshot(deeper)
    with pytest.raises(AdapterFileError, match="chosen among 160 entries, and its config selects 224 in this model"):
        PeftModel.from_pretrained(deeper, tmp_path)
    assert_unchanged(deeper, before)
    PeftModel.from_pretrained(bert(2), tmp_path)


def test_an_adapter_that_is_loaded_over_says_where_its_new_mask_came_from(tmp_path):
    masks = [{f"{NORM}.bias": torch.arange(16) < 4}, {f"{NORM}.bias": torch.arange(16) >= 12}]
    first, second = adapt(), adapt()
    first.base_model.set_masks(masks[0], source={"made": "first"})
    second.base_model.set_masks(masks[1], source={"made": "second"})
    fill(second, "default")
    second.save_pretrained(tmp_path)
    first.load_adapter(tmp_path, "default")
    assert first.peft_config["default"].mask_source == {"made": "second"}
    assert torch.equal(output(first, batches()[0]), output(second, batches()[0]))
    assert torch.equal(deltas(first)[f"{NORM}.bias"].tuned(), masks[1][f"{NORM}.bias"])
