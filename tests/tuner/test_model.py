"""Deltas on norms in whole models: their values, several adapters, and PEFT's verbs beyond the contract table."""

from copy import deepcopy

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_lntune import LNTuningConfig
from peft_lntune.errors import ConfigError, NoMatchError
from tests.adapted import (
    DTYPES,
    adapt,
    assert_unchanged,
    build,
    deltas,
    fill,
    inputs,
    layers,
    output,
    said,
    snapshot,
)
from tests.cases import QUICK, few
from tests.oracles import alone, written

FAMILIES = [
    "bert",
    "roberta-classifier",
    "gpt2",
    "llama",
    "gemma2",
    "gemma3",
    "qwen3",
    "t5",
    "bart",
    "vit",
    "mamba",
    "cohere",
]
FEW = ["bert", "llama", "t5"]


def dense(model, adapter="default"):
    return {name: delta.dense() for name, delta in deltas(model, adapter).items()}


class TestIdentity:
    def test_a_new_adapter_changes_no_bit_of_a_quantized_model(self):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model, batch = build("bert", torch.bfloat16), inputs("bert")
        quantize_(model, Int8WeightOnlyConfig(version=2))
        assert type(model.bert.encoder.layer[0].attention.self.query.weight.data) is not torch.Tensor
        base = output(model, batch)
        peft_model = adapt(model, std=0)
        assert torch.equal(output(peft_model, batch), base)
        said(peft_model, batch).float().square().sum().backward()
        assert all(delta.weight.grad.abs().sum() > 0 for delta in deltas(peft_model).values())

    def test_a_delta_on_a_quantized_weight_is_refused_before_anything_changes(self):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = build("bert", torch.bfloat16)
        quantize_(model, Int8WeightOnlyConfig(version=2))
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=r"query \(Linear\) is chosen to be tuned, but .* floating `weight`"):
            get_peft_model(model, LNTuningConfig(target_modules=["query"]))
        assert [name for name, _ in model.named_modules()] == before

    def test_random_weights_are_not_the_identity(self):
        model, batch = build("bert"), inputs("bert")
        base = output(model, batch)
        assert not torch.equal(output(get_peft_model(model, LNTuningConfig(init_weights=False)), batch), base)


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("family", few(FAMILIES, (*QUICK, "gemma3", "cohere")))
    def test_the_output_is_that_of_base_plus_delta(self, family, dtype):
        """Exactly: in these dtypes the parameter of the plain copy is the very sum that the layer computes."""
        model, batch = build(family, dtype), inputs(family, dtype)
        plain = deepcopy(model)
        peft_model = adapt(model)
        assert torch.equal(output(peft_model, batch), output(written(plain, dense(peft_model)), batch))

    @pytest.mark.parametrize("tune", ["weight", "bias"])
    def test_only_the_chosen_parameter_is_tuned(self, tune):
        peft_model = adapt(build("bert"), tune=tune)
        assert {name.rpartition(".")[2] for name in deltas(peft_model)} == {tune}

    def test_a_bias_of_norms_without_one_selects_nothing(self):
        model = build("llama")
        with pytest.raises(NoMatchError, match="selects none of the 5 norms"):
            get_peft_model(model, LNTuningConfig(tune="bias"))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_deltas_are_kept_in_float32_or_wider(self, dtype):
        found = {delta.weight.dtype for delta in deltas(adapt(build("llama", dtype))).values()}
        assert found == {torch.promote_types(dtype, torch.float32)}

    def test_delta_dtype_overrides(self):
        found = deltas(adapt(build("llama", torch.bfloat16), delta_dtype="float64"))
        assert {delta.weight.dtype for delta in found.values()} == {torch.float64}

    def test_only_deltas_are_trained(self):
        peft_model = adapt(build("llama"))
        trained = {name for name, p in peft_model.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in peft_model.named_parameters() if ".lntune_" in name}
        assert peft_model.get_nb_trainable_parameters()[0] == 5 * 16


class TestSeveralAdapters:
    @pytest.mark.parametrize("family", FEW)
    def test_active_adapters_add(self, family):
        model, batch = build(family), inputs(family)
        plain = deepcopy(model)
        peft_model = adapt(model, "a", "b")
        peft_model.base_model.set_adapter(["a", "b"])
        expected = written(written(plain, dense(peft_model, "a")), dense(peft_model, "b"))
        assert torch.equal(output(peft_model, batch), output(expected, batch))

    def test_set_adapter_switches_what_runs_and_what_is_trained(self):
        model, batch = build("bert"), inputs("bert")
        peft_model = adapt(model, "a", "b")
        outputs = {name: alone(peft_model, batch, name) for name in ("a", "b")}
        assert not torch.equal(outputs["a"], outputs["b"])
        for name, other in (("b", "a"), ("a", "b")):
            peft_model.set_adapter(name)
            assert torch.equal(output(peft_model, batch), outputs[name])
            assert all(delta.weight.requires_grad for delta in deltas(peft_model, name).values())
            assert not any(delta.weight.requires_grad for delta in deltas(peft_model, other).values())

    def test_adapters_with_different_targets(self):
        model, batch = build("bert"), inputs("bert")
        plain = deepcopy(model)
        peft_model = adapt(model, "wide")
        peft_model.add_adapter("narrow", LNTuningConfig(layers_to_transform=[1], roles=["ffn"], tune="bias"))
        fill(peft_model, "narrow", seed=5)
        assert list(deltas(peft_model, "narrow")) == ["bert.encoder.layer.1.output.LayerNorm.bias"]
        for name in ("narrow", "wide"):
            peft_model.set_adapter(name)
            assert torch.equal(output(peft_model, batch), output(written(plain, dense(peft_model, name)), batch))

    def test_deleting_the_active_adapter_activates_one_that_is_left(self):
        model, batch = build("bert"), inputs("bert")
        peft_model = adapt(model, "a", "b")
        expected = alone(peft_model, batch, "b")
        with pytest.warns(UserWarning, match="Setting active adapter to b"):
            peft_model.delete_adapter("a")
        assert peft_model.active_adapters == ["b"]
        assert not deltas(peft_model, "a")
        assert torch.equal(output(peft_model, batch), expected)

    def test_deleting_the_active_adapter_with_other_targets(self):
        """Layers that only the deleted adapter touched must not answer for it afterwards."""
        model, batch = build("bert"), inputs("bert")
        peft_model = adapt(model, "wide")
        peft_model.add_adapter("narrow", LNTuningConfig(roles=["embedding"]))
        peft_model.add_adapter("third", LNTuningConfig(roles=["ffn"]))
        for seed, name in enumerate(("narrow", "third"), start=5):
            fill(peft_model, name, seed=seed)
        expected = {name: alone(peft_model, batch, name) for name in ("narrow", "third")}
        with pytest.warns(UserWarning, match="Adapter wide was active"):
            peft_model.delete_adapter("wide")
        (active,) = peft_model.active_adapters
        assert torch.equal(output(peft_model, batch), expected[active])
        assert peft_model.get_model_status().active_adapters == [active]
        peft_model.set_adapter("third")
        assert torch.equal(output(peft_model, batch), expected["third"])

    def test_deleting_an_inactive_adapter_keeps_the_active_one(self):
        peft_model = adapt(build("bert"), "a", "b", "c")
        peft_model.set_adapter("b")
        peft_model.delete_adapter("a")
        assert peft_model.active_adapters == ["b"]
        with pytest.raises(ValueError, match="Adapter a does not exist"):
            peft_model.delete_adapter("a")

    def test_adding_a_name_twice_is_refused(self):
        peft_model = adapt(build("bert"))
        with pytest.raises(ValueError, match="'default' already exists"):
            peft_model.add_adapter("default", LNTuningConfig())

    def test_an_adapter_that_selects_nothing_leaves_no_name_behind(self):
        peft_model = adapt(build("llama"))
        before = snapshot(peft_model)
        with pytest.raises(NoMatchError, match="selects none"):
            peft_model.add_adapter("other", LNTuningConfig(roles=["embedding"]))
        assert list(peft_model.peft_config) == ["default"]
        assert_unchanged(peft_model, before)

    def test_a_second_adapter_for_inference_is_frozen(self):
        peft_model = adapt(build("bert"))
        peft_model.add_adapter("served", LNTuningConfig(inference_mode=True))
        peft_model.set_adapter("served", inference_mode=True)
        assert not any(p.requires_grad for p in peft_model.parameters())

    @pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")  # PEFT, of every type
    @pytest.mark.parametrize("name", ["lntune", "weight", "bias", "ln", "lntune_weight", "base_layer", "mask"])
    def test_names_that_are_parts_of_the_prefix(self, name):
        model, batch = build("bert"), inputs("bert")
        peft_model = adapt(model, "first", name)
        peft_model.set_adapter(name)
        expected = output(peft_model, batch)
        stored = get_peft_model_state_dict(peft_model, adapter_name=name)
        assert len(stored) == len(deltas(peft_model, name)) == 12
        other = adapt(build("bert"), name, std=0)
        set_peft_model_state_dict(other, stored, adapter_name=name)
        assert torch.equal(output(other, batch), expected)
        assert torch.equal(output(peft_model, batch, adapter_names=[name] * 3), expected)
        with pytest.warns(UserWarning, match="Setting active adapter to first"):
            peft_model.delete_adapter(name)
        assert peft_model.active_adapters == ["first"]


class TestMerged:
    def test_what_has_no_effect_while_another_is_merged_is_told_once(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        peft_model.set_adapter("b")
        peft_model.merge_adapter(["a"])
        with pytest.warns(UserWarning, match="adapter 'a' is merged.* adapter 'b' is active and has no effect there"):
            merged = output(peft_model, batch)
        assert torch.equal(output(peft_model, batch), merged)
        peft_model.unmerge_adapter()
        assert not torch.equal(output(peft_model, batch), merged)

    def test_training_what_is_merged_is_told(self):
        peft_model, batch = adapt(build("bert")), inputs("bert")
        peft_model.merge_adapter()
        output(peft_model, batch)
        with pytest.warns(UserWarning, match="adapter 'default' is merged.* training does not change it"):
            assert not said(peft_model.train(), batch).requires_grad
        with peft_model.disable_adapter():
            said(peft_model, batch)


class TestDisabled:
    def test_disabling_a_merged_adapter_gives_the_base(self):
        model, batch = build("bert", torch.bfloat16), inputs("bert")
        base = output(model, batch)
        peft_model = adapt(model)
        peft_model.merge_adapter()
        with peft_model.disable_adapter():
            assert torch.equal(output(peft_model, batch), base)

    def test_a_head_that_is_a_block_is_taken_out(self):
        # PEFT asks what it takes out for a weight, and RoBERTa's classifier has none (peft#3114).
        model, batch = build("roberta-classifier"), inputs("roberta-classifier")
        peft_model = adapt(model, modules_to_save=["classifier"])
        head = peft_model.base_model.model.classifier.modules_to_save["default"]
        nn.init.ones_(head.out_proj.bias)
        tuned = output(peft_model, batch)
        merged = peft_model.merge_and_unload()
        assert merged.classifier is head
        torch.testing.assert_close(output(merged, batch), tuned)

    def test_the_base_keeps_its_names_and_attributes(self):
        model = build("bert")
        peft_model = adapt(model)
        norm = peft_model.base_model.model.bert.embeddings.LayerNorm
        assert (norm.eps, norm.normalized_shape) == (norm.base_layer.eps, norm.base_layer.normalized_shape)
        for parameter in ("weight", "bias"):  # what the layer computes with, and what it is made from
            assert torch.equal(getattr(norm, parameter), norm.effective(parameter, ["default"]))
            assert norm.base_parameter(parameter) is getattr(norm.base_layer, parameter)
        with pytest.raises(AttributeError, match="no attribute 'not_there'"):
            _ = norm.not_there


class TestCopies:
    def test_a_copy_routes_on_its_own(self):
        model, batch = build("bert"), inputs("bert")
        peft_model = adapt(model, "a", "b")
        twin = deepcopy(peft_model)
        routes = {id(layer._route) for layer in layers(peft_model)}, {id(layer._route) for layer in layers(twin)}
        assert [len(found) for found in routes] == [1, 1]
        assert not routes[0] & routes[1]
        names, others = ["a", "b", "a"], ["b", "b", "b"]
        expected = output(peft_model, batch, adapter_names=names)
        with twin.base_model._enable_peft_forward_hooks(adapter_names=others):
            assert torch.equal(output(peft_model, batch, adapter_names=names), expected)

    def test_low_cpu_mem_usage_makes_deltas_on_meta_and_loads_them_exactly(self):
        batch = inputs("bert")
        peft_model = adapt(build("bert"))
        stored = get_peft_model_state_dict(peft_model)
        light = get_peft_model(build("bert"), LNTuningConfig(), low_cpu_mem_usage=True)
        assert all(delta.weight.is_meta for delta in deltas(light).values())
        set_peft_model_state_dict(light, stored, low_cpu_mem_usage=True)
        assert not any(delta.weight.is_meta for delta in deltas(light).values())
        assert torch.equal(output(light.eval(), batch), output(peft_model, batch))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("asked", ["by the config", "without autocast"])
    def test_deltas_take_the_dtype_of_the_base(self, dtype, asked):
        model, batch, name = build("llama", dtype), inputs("llama"), str(dtype).removeprefix("torch.")
        base = output(model, batch)
        if asked == "by the config":
            peft_model = get_peft_model(model, LNTuningConfig(delta_dtype=name)).eval()
        else:
            with pytest.warns(UserWarning, match=rf"keeps what adapter 'default' trains in {name}.*delta_dtype"):
                peft_model = get_peft_model(model, LNTuningConfig(), autocast_adapter_dtype=False).eval()
        assert {delta.weight.dtype for delta in deltas(peft_model).values()} == {dtype}
        assert torch.equal(output(peft_model, batch), base)
        fill(peft_model, "default")
        assert output(peft_model, batch).dtype == base.dtype
        assert peft_model(**batch).logits.requires_grad


class TestStatus:
    def test_layer_status_names_every_delta(self):
        peft_model = adapt(build("bert"), "a", "b")
        peft_model.merge_adapter(["a"])
        status = peft_model.get_layer_status()
        assert len(status) == 6
        for entry in status:
            assert entry.available_adapters == ["a", "b"]
            assert entry.active_adapters == ["a"]
            assert entry.merged_adapters == ["a"]
            assert entry.requires_grad == {"a": True, "b": False}
            assert entry.enabled
            assert entry.devices == {"a": ["cpu"], "b": ["cpu"]}

    def test_model_status_counts_what_is_trained(self):
        peft_model = adapt(build("bert"), "a", "b")
        status = peft_model.get_model_status()
        assert status.trainable_params == 6 * 2 * 16
        assert status.num_adapter_layers == 6
        assert status.active_adapters == ["a"]
        assert status.peft_types == {"a": "LNTUNE", "b": "LNTUNE"}
        assert status.merged_adapters == []

    def test_targeted_modules_are_named(self):
        peft_model = adapt(build("bert"), roles=["embedding"])
        assert peft_model.targeted_module_names == ["bert.embeddings.LayerNorm"]
        assert "lntune.NormLayer" in repr(peft_model)


class TestRefusals:
    def test_another_peft_type_is_refused(self):
        from peft import IA3Config

        peft_model = adapt(build("bert"))
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            peft_model.add_adapter("other", IA3Config(target_modules=["query"], feedforward_modules=[]))

    def test_a_norm_used_in_two_places_is_tuned_once(self):
        """One module under two names has one delta: PEFT names it once, and so do we."""
        shared = nn.LayerNorm(8)
        model = nn.ModuleDict({"first": nn.Sequential(nn.Linear(8, 8), shared), "second": nn.Sequential(shared)})
        peft_model = get_peft_model(model, LNTuningConfig())
        assert list(deltas(peft_model)) == ["first.1.weight", "first.1.bias"]

    @pytest.mark.parametrize("name", ["modules", "training", "pop", "with.dot", "__base__"])
    def test_names_that_cannot_be_used_are_refused_before_anything_changes(self, name):
        peft_model = adapt(build("bert"))
        before = snapshot(peft_model)
        with pytest.raises(ConfigError, match=rf"cannot be named '{name}'.* Choose another name"):
            peft_model.add_adapter(name, LNTuningConfig())
        assert list(peft_model.peft_config) == ["default"]
        assert_unchanged(peft_model, before)

    def test_config_errors_come_first(self):
        with pytest.raises(ConfigError, match="choose one of 'both', 'weight', 'bias'"):
            LNTuningConfig(tune="gain")
