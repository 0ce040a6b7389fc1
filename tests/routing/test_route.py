"""`adapter_names`: PEFT's contract, and row i of the batch is what its adapter alone would have said."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.harness.counting import count_operations
from peft_lntune import AdapterBank, LNTuningConfig
from peft_lntune.errors import RoutingError
from peft_lntune.tuner import heads as tuner_heads
from tests.adapted import adapt, build, deltas, fill, inputs, layers, output, said
from tests.cases import QUICK, few, spread
from tests.oracles import alone, each_alone, generated_alone

FAMILIES = [
    "bert",
    "gpt2",
    "gpt-neox",
    "llama",
    "mixtral",
    "gemma2",
    "gemma3",
    "qwen3",
    "olmo2",
    "cohere",
    "t5",
    "bart",
    "whisper",
    "vit",
    "mamba",
    "mamba2",
    "modernbert",
]
NAMES = ["b", "__base__", "a"]


def hooks(model):
    """How many hooks there are in a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class TestRows:
    @pytest.mark.parametrize("family", few(FAMILIES, (*QUICK, "gemma3", "cohere")))
    def test_row_i_is_what_its_adapter_alone_says(self, family):
        peft_model, batch = adapt(build(family), "a", "b"), inputs(family)
        mixed = output(peft_model, batch, adapter_names=NAMES)
        # Fused kernels sum in another order than xhat * weight + bias.
        torch.testing.assert_close(mixed, each_alone(peft_model, batch, NAMES), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("family", ["bert", "llama", "gemma3", "t5", "cohere"])
    def test_in_bfloat16_rows_differ_by_rounding_only(self, family):
        peft_model = adapt(build(family, torch.bfloat16), "a", "b")
        batch = inputs(family, torch.bfloat16)
        mixed, expected = output(peft_model, batch, adapter_names=NAMES), each_alone(peft_model, batch, NAMES)
        assert mixed.dtype == expected.dtype == torch.bfloat16
        # Each norm may round its last bit the other way (2^-8), and a few layers carry that on.
        size = expected.float().abs().max().item()
        torch.testing.assert_close(mixed, expected, rtol=0, atol=0.05 * size)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_one_string_means_all_rows(self, dtype):
        peft_model, batch = adapt(build("llama", dtype), "a", "b"), inputs("llama")
        for name in ("a", "b", "__base__"):
            mixed = output(peft_model, batch, adapter_names=name)
            assert torch.equal(mixed, output(peft_model, batch, adapter_names=[name] * 3))
            tolerance = 1e-5 if dtype == torch.float32 else 0.05  # as above
            torch.testing.assert_close(mixed, alone(peft_model, batch, name), rtol=tolerance, atol=tolerance)

    def test_adapters_that_lack_a_layer_or_a_parameter(self):
        peft_model, batch = adapt(build("bert"), "wide"), inputs("bert", batch=4)
        peft_model.add_adapter("one-layer", LNTuningConfig(layers_to_transform=[1]))
        peft_model.add_adapter("bias", LNTuningConfig(tune="bias", roles=["attention"]))
        for seed, name in enumerate(("one-layer", "bias"), start=4):
            fill(peft_model, name, seed=seed)
        names = ["one-layer", "wide", "__base__", "bias"]
        mixed = output(peft_model, batch, adapter_names=names)
        torch.testing.assert_close(mixed, each_alone(peft_model, batch, names), rtol=1e-5, atol=1e-5)

    def test_what_is_active_does_not_matter(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        expected = output(peft_model, batch, adapter_names=NAMES)
        peft_model.set_adapter("b")
        assert torch.equal(output(peft_model, batch, adapter_names=NAMES), expected)
        assert peft_model.active_adapters == ["b"]

    def test_other_batches_and_names_follow(self):
        peft_model = adapt(build("bert"), "a", "b")
        for names in (["a"], ["a", "a"], ["b", "a", "b", "__base__", "a"], NAMES):
            batch = inputs("bert", batch=len(names))
            mixed = output(peft_model, batch, adapter_names=names)
            torch.testing.assert_close(mixed, each_alone(peft_model, batch, names), rtol=1e-5, atol=1e-5)

    def test_an_adapter_added_or_deleted_between_batches(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        output(peft_model, batch, adapter_names=NAMES)
        peft_model.add_adapter("c", LNTuningConfig())
        fill(peft_model, "c", seed=8)
        peft_model.delete_adapter("b")
        names = ["c", "a", "__base__"]
        mixed = output(peft_model, batch, adapter_names=names)
        torch.testing.assert_close(mixed, each_alone(peft_model, batch, names), rtol=1e-5, atol=1e-5)
        with pytest.raises(RoutingError, match=r"non-existing adapter\(s\): b\. Known adapters: a, c, __base__"):
            output(peft_model, batch, adapter_names=NAMES)

    def test_a_padded_batch(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        batch["attention_mask"][0, 4:] = 0
        mixed = output(peft_model, batch, adapter_names=NAMES)
        torch.testing.assert_close(mixed, each_alone(peft_model, batch, NAMES), rtol=1e-5, atol=1e-5)


class TestContract:
    """PEFT's rules, and its sentences word for word, to which ours may add."""

    def test_training_mode_is_refused(self):
        peft_model, batch = adapt(build("bert"), "a", "b").train(), inputs("bert")
        with pytest.raises(ValueError, match=r"^Cannot pass `adapter_names` when the model is in training mode\."):
            peft_model(**batch, adapter_names=NAMES)

    @pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a"] * 4, ["a"] * 6])
    def test_another_length_is_refused(self, names):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        expected = (
            "^Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and 3 respectively."
        )
        with pytest.raises(ValueError, match=expected):
            output(peft_model, batch, adapter_names=names)
        output(peft_model, batch, adapter_names=NAMES)

    def test_unknown_names_are_refused_with_those_known(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        expected = r"^Trying to infer with non-existing adapter\(s\): foo, other\. Known adapters: a, b, __base__\."
        with pytest.raises(ValueError, match=expected):
            output(peft_model, batch, adapter_names=["other", "foo", "a"])
        with pytest.raises(RoutingError, match=r"non-existing adapter\(s\): other\."):
            output(peft_model, batch, adapter_names="other")

    def test_merged_adapters_are_refused(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        peft_model.merge_adapter(["a"])
        expected = "^Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        with pytest.raises(ValueError, match=expected):
            output(peft_model, batch, adapter_names=NAMES)
        peft_model.unmerge_adapter()
        output(peft_model, batch, adapter_names=NAMES)

    def test_with_adapters_disabled_names_are_ignored(self):
        model, batch = build("bert"), inputs("bert")
        base = output(model, batch)
        peft_model = adapt(model, "a", "b")
        with peft_model.disable_adapter():
            assert torch.equal(output(peft_model, batch, adapter_names=NAMES), base)
            assert torch.equal(output(peft_model, batch, adapter_names=["nobody"] * 3), base)

    def test_the_sentences_are_those_of_peft(self):
        """Against LoRA itself, so that a change there is noticed."""
        ours = adapt(build("bert"), "own")
        lora = get_peft_model(build("bert"), LoraConfig(target_modules=["query"]), adapter_name="own").eval()
        batch = inputs("bert")
        for names, training in ((["own"] * 2, False), (["x"] * 3, False), (["own"] * 3, True)):
            texts = []
            for peft_model in (lora, ours):
                peft_model.train(training)
                with pytest.raises(ValueError, match="adapter") as caught:
                    peft_model(**batch, adapter_names=names)
                texts.append(str(caught.value))
            assert texts[1].startswith(texts[0])

    def test_an_empty_list_is_refused(self):
        peft_model, batch = adapt(build("bert"), "a"), inputs("bert")
        with pytest.raises(RoutingError, match="but got 0 and 3 respectively"):
            output(peft_model, batch, adapter_names=[])


class TestNothingLeaks:
    def test_after_a_forward_that_raises(self):
        peft_model, batch = adapt(build("bert-classifier"), "a", "b", task_type="SEQ_CLS"), inputs("bert-classifier")
        expected, mixed = output(peft_model, batch), output(peft_model, batch, adapter_names=NAMES)
        before = hooks(peft_model)
        body = peft_model.base_model.model.bert.encoder.layer[1]
        handle = body.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="half way"):
            output(peft_model, batch, adapter_names=NAMES)
        handle.remove()
        assert hooks(peft_model) == before
        assert not any(layer._route.active for layer in layers(peft_model))
        assert not any("forward" in module.__dict__ for module in peft_model.modules())
        assert torch.equal(output(peft_model, batch), expected)
        assert torch.equal(output(peft_model, batch, adapter_names=NAMES), mixed)

    @pytest.mark.parametrize("names", [["a"], ["nobody"] * 3, "nobody"], ids=str)
    def test_after_names_that_are_refused(self, names):
        peft_model, batch = adapt(build("bert-classifier"), "a", "b", task_type="SEQ_CLS"), inputs("bert-classifier")
        before, expected = hooks(peft_model), output(peft_model, batch)
        with pytest.raises(RoutingError, match="adapter"):
            output(peft_model, batch, adapter_names=names)
        assert hooks(peft_model) == before
        assert torch.equal(output(peft_model, batch), expected)

    def test_after_a_generation_that_raises(self):
        peft_model, batch = adapt(build("llama"), "a", "b"), inputs("llama")
        expected = output(peft_model, batch)
        handle = peft_model.base_model.model.model.layers[1].register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="half way"):
            peft_model.generate(**batch, adapter_names=NAMES, max_new_tokens=2)
        handle.remove()
        assert torch.equal(output(peft_model, batch), expected)

    def test_a_second_entry_raises_and_the_first_goes_on(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        expected = output(peft_model, batch, adapter_names=NAMES)
        with peft_model._enable_peft_forward_hooks(adapter_names=NAMES):
            with pytest.raises(RoutingError, match=r"running a forward pass routed to \['__base__', 'a', 'b'\]"):
                output(peft_model, batch, adapter_names=["a"] * 3)
            assert torch.equal(output(peft_model, batch), expected)
        assert torch.equal(output(peft_model, batch), alone(peft_model, batch, "a"))

    def test_a_copy_made_inside_is_not_routed(self):
        peft_model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        with peft_model._enable_peft_forward_hooks(adapter_names=NAMES):
            twin = deepcopy(peft_model)
            assert torch.equal(output(twin, batch), alone(twin, batch, "a"))


def _fail(*_):
    raise RuntimeError("half way")


class TestHeads:
    @pytest.mark.parametrize("family", ["bert-classifier", "llama-classifier"])
    def test_a_plain_head_follows_its_row(self, family):
        peft_model = adapt(build(family), "a", "b", task_type="SEQ_CLS")
        batch = inputs(family)
        mixed = output(peft_model, batch, adapter_names=NAMES)
        torch.testing.assert_close(mixed, each_alone(peft_model, batch, NAMES), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("family", ["roberta-classifier", "electra-classifier"])
    def test_a_composite_head_follows_its_row_as_in_a_bank(self, family):
        peft_model, batch = adapt(build(family), "a", "b", task_type="SEQ_CLS"), inputs(family)
        expected, before = each_alone(peft_model, batch, NAMES), hooks(peft_model)
        for active in ("a", "b"):
            peft_model.set_adapter(active)
            mixed = output(peft_model, batch, adapter_names=NAMES)
            torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
        assert hooks(peft_model) == before
        assert not any("forward" in module.__dict__ for module in peft_model.modules())
        bank = AdapterBank(peft_model)
        bank.add_many({name: (peft_model, name) for name in "ab"})
        bank.attach()
        with bank.route(NAMES):
            torch.testing.assert_close(output(peft_model, batch), expected, rtol=1e-5, atol=1e-5)

    def test_heads_cost_the_same_however_many_adapters(self):
        peft_model = adapt(build("roberta-classifier"), "a", "b", "c", task_type="SEQ_CLS").requires_grad_(False)
        batch = inputs("roberta-classifier")
        counts = []
        for names in (["a", "b", "a"], ["c", "b", "a"]):
            output(peft_model, batch, adapter_names=names)
            counts.append(count_operations(lambda names=names: output(peft_model, batch, adapter_names=names)))
        assert counts[0] == counts[1]

    def test_a_large_layer_of_a_head_is_run_adapter_by_adapter(self, monkeypatch):
        peft_model, batch = adapt(build("roberta-classifier"), "a", "b", task_type="SEQ_CLS"), inputs("bert")
        monkeypatch.setattr(tuner_heads, "LARGE", 3 * 200)  # `dense` has 256 entries, `out_proj` fewer
        mixed = output(peft_model, batch, adapter_names=NAMES)
        torch.testing.assert_close(mixed, each_alone(peft_model, batch, NAMES), rtol=1e-5, atol=1e-5)

    def test_a_head_with_a_tuned_norm_in_it_is_refused_by_name(self):
        peft_model, batch = adapt(build("bert"), "plain"), inputs("bert")
        peft_model.add_adapter("headed", LNTuningConfig(modules_to_save=["transform"]))
        expected = r"transform \(BertPredictionHeadTransform\) is in modules_to_save and cannot be mixed by row"
        before = hooks(peft_model)
        with pytest.raises(RoutingError, match=expected):
            output(peft_model, batch, adapter_names=["headed", "plain", "__base__"])
        assert hooks(peft_model) == before
        assert not any("forward" in module.__dict__ for module in peft_model.modules())
        output(peft_model, batch, adapter_names=["headed"] * 3)

    def test_gradients_reach_the_heads_of_a_mixed_batch(self):
        """With gradients on, in evaluation."""
        peft_model, batch = adapt(build("roberta-classifier"), "a", "b", task_type="SEQ_CLS"), inputs("bert")
        said(peft_model, batch, adapter_names=NAMES).square().sum().backward()
        head = peft_model.base_model.model.classifier.modules_to_save["a"]
        assert head.dense.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("names", ["b", ["b"] * 3, "__base__"], ids=str)
    def test_a_composite_head_serves_one_adapter_a_batch(self, names):
        """A batch of one adapter mixes nothing, so no head stands in its way."""
        peft_model = adapt(build("roberta-classifier"), "a", "b", task_type="SEQ_CLS")
        batch = inputs("roberta-classifier")
        mixed = output(peft_model, batch, adapter_names=names)
        name = names if isinstance(names, str) else names[0]
        torch.testing.assert_close(mixed, alone(peft_model, batch, name), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("active", ["headed", "headless"])
    def test_an_adapter_without_a_head_uses_that_of_the_base(self, active):
        """Whichever is active; PEFT's own mixing gives every row the base's head where the active adapter has none."""
        peft_model, batch = adapt(build("bert-classifier"), "headless"), inputs("bert-classifier")
        peft_model.add_adapter("headed", LNTuningConfig(modules_to_save=["classifier"]))
        fill(peft_model, "headed", seed=4)
        names = ["headed", "headless", "__base__"]
        expected = each_alone(peft_model, batch, names)
        peft_model.set_adapter(active)
        mixed = output(peft_model, batch, adapter_names=names)
        torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)

    def test_a_plain_layer_inside_a_composite_head_is_mixed(self):
        peft_model = adapt(build("roberta-classifier"), "a", "b", modules_to_save=["out_proj"])
        batch = inputs("roberta-classifier")
        mixed = output(peft_model, batch, adapter_names=NAMES)
        torch.testing.assert_close(mixed, each_alone(peft_model, batch, NAMES), rtol=1e-5, atol=1e-5)


GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "beams and returns": {"num_beams": 4, "num_return_sequences": 2},
    "returns": {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
    "no cache": {"use_cache": False},
}


class TestGenerate:
    @pytest.mark.parametrize(("family", "way"), spread(["llama", "gpt2", "t5", "bart"], GENERATIONS))
    def test_row_i_is_what_its_adapter_alone_generates(self, family, way):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, **GENERATIONS[way]}
        task = "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "CAUSAL_LM"
        peft_model = adapt(build(family), "a", "b", std=1.0, task_type=task)
        batch = {name: value for name, value in inputs(family).items() if name in ("input_ids", "attention_mask")}
        mixed = peft_model.generate(**batch, adapter_names=NAMES, **options)
        returns = options.get("num_return_sequences", 1)
        for i, name in enumerate(NAMES):
            rows = slice(i * returns, (i + 1) * returns)
            assert torch.equal(mixed[rows], generated_alone(peft_model, batch, name, **options)[rows])

    def test_adapters_do_generate_differently(self):
        """Else the test above would show nothing."""
        peft_model, batch = adapt(build("llama"), "a", "b", std=1.0), inputs("llama")
        options = {"max_new_tokens": 5, "min_new_tokens": 5}
        a, b, base = (generated_alone(peft_model, batch, name, **options) for name in ("a", "b", "__base__"))
        assert not torch.equal(a, b)
        assert not torch.equal(a, base)

    def test_beams_of_a_generation_config(self):
        from transformers import GenerationConfig

        peft_model, batch = adapt(build("llama"), "a", "b", std=1.0), inputs("llama")
        config = GenerationConfig(num_beams=3, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
        mixed = peft_model.generate(**batch, adapter_names=NAMES, generation_config=config)
        for i, name in enumerate(NAMES):
            expected = generated_alone(peft_model, batch, name, generation_config=config)
            assert torch.equal(mixed[i], expected[i])

    def test_another_length_is_refused_in_generation_too(self):
        peft_model, batch = adapt(build("llama"), "a", "b"), inputs("llama")
        with pytest.raises(RoutingError, match="but got 2 and 3 respectively"):
            peft_model.generate(**batch, adapter_names=["a", "b"], max_new_tokens=2)


def test_gradients_reach_the_inputs_of_a_mixed_batch():
    """With gradients on, in evaluation: for saliency, or a trained module before the norms."""
    peft_model = adapt(build("bert"), "a", "b", modules_to_save=["word_embeddings"])
    peft_model.set_adapter("b")
    batch = inputs("bert")
    said(peft_model, batch, adapter_names=NAMES).square().sum().backward()
    embedding = peft_model.base_model.model.bert.embeddings.word_embeddings.modules_to_save["b"]
    assert embedding.weight.grad.abs().sum() > 0
    assert len(deltas(peft_model, "a")) == len(deltas(peft_model, "b"))


def test_samples_and_tokens_in_one_axis_are_told_apart():
    """OPT flattens (B, T, d) to (B * T, d) before the norm of its feed-forward layer."""
    peft_model, batch = adapt(build("opt"), "a", "b"), inputs("opt")
    mixed = output(peft_model, batch, adapter_names=NAMES)
    torch.testing.assert_close(mixed, each_alone(peft_model, batch, NAMES), rtol=1e-5, atol=1e-5)
