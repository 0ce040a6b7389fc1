"""Row i of a routed batch is what its adapter alone would have said, and nothing else of the model changes."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from benchmarks.harness.counting import count_operations
from peft_lntune import AdapterBank, FisherLNConfig, LNTuningConfig, ModuleTuningConfig, UnifiedConfig
from peft_lntune.errors import AdapterFileError, ConfigError, RoutingError, UnsupportedError
from tests.adapted import adapt, assert_unchanged, build, deltas, fill, inputs, layers, output, said, snapshot
from tests.bank.banked import CLOSE, NAMES, banked, routed
from tests.cases import QUICK, few, spread
from tests.oracles import alone, each_alone, generated_alone
from tests.selection.test_masks import random_masks

FAMILIES = ["bert", "roberta", "gpt2", "llama", "gemma3", "qwen3", "olmo2", "cohere", "mixtral", "t5", "bart", "opt"]
FAMILIES += ["whisper", "vit", "mamba2", "modernbert"]


class TestRows:
    @pytest.mark.parametrize("family", few(FAMILIES, (*QUICK, "gemma3", "cohere")))
    def test_row_i_is_what_its_adapter_alone_says(self, family):
        model, bank = banked(family)
        batch = inputs(family)
        expected = each_alone(model, batch, NAMES)
        torch.testing.assert_close(routed(bank, model, batch, NAMES), expected, **CLOSE)
        torch.testing.assert_close(routed(bank, model, batch, bank.index(NAMES)), expected, **CLOSE)

    @pytest.mark.parametrize("family", ["bert", "llama", "gemma3"])
    def test_on_the_plain_model(self, family):
        """The bank needs no PeftModel to serve."""
        tuned, plain, batch = adapt(build(family), "a", "b"), build(family), inputs(family)
        bank = AdapterBank(plain)
        bank.add_many({name: (tuned, name) for name in ("a", "b")})
        bank.attach()
        mixed = routed(bank, plain, batch, NAMES)
        torch.testing.assert_close(mixed, each_alone(tuned, batch, NAMES), **CLOSE)
        assert not torch.equal(mixed[0], mixed[1])

    @pytest.mark.parametrize("family", ["bert", "llama", "t5", "cohere"])
    def test_in_bfloat16_rows_differ_by_rounding_only(self, family):
        model, bank = banked(family, dtype=torch.bfloat16)
        batch = inputs(family, torch.bfloat16)
        mixed, expected = routed(bank, model, batch, NAMES), each_alone(model, batch, NAMES)
        assert mixed.dtype == expected.dtype == torch.bfloat16
        # Each norm may round its last bit the other way (2^-8), and a few layers carry that on.
        torch.testing.assert_close(mixed, expected, rtol=0, atol=0.05 * expected.float().abs().max().item())

    def test_a_narrower_bank_rounds_the_deltas(self):
        model, batch = adapt(build("bert"), "a", "b"), inputs("bert")
        bank = AdapterBank(model, dtype=torch.bfloat16)
        bank.add_many({name: (model, name) for name in ("a", "b")})
        bank.attach()
        mixed, wide = routed(bank, model, batch, NAMES), each_alone(model, batch, NAMES)
        with torch.no_grad():
            for name in ("a", "b"):
                for delta in deltas(model, name).values():
                    delta.weight.copy_(delta.weight.bfloat16().float())
        rounded = each_alone(model, batch, NAMES)
        torch.testing.assert_close(mixed, rounded, **CLOSE)
        assert not torch.allclose(mixed, wide, **CLOSE)
        assert 2 * bank.row_bytes == AdapterBank(model).row_bytes

    def test_one_string_means_all_rows(self):
        model, bank = banked("bert")
        batch = inputs("bert")
        for name in ("a", "__base__"):
            torch.testing.assert_close(routed(bank, model, batch, name), alone(model, batch, name), **CLOSE)

    def test_zero_is_the_base_model(self):
        model, bank = banked("bert")
        batch = inputs("bert")
        assert torch.equal(
            routed(bank, model, batch, [0, "a", 0]), routed(bank, model, batch, ["__base__", "a", "__base__"])
        )
        assert bank.index(["__base__", "a"]).tolist()[0] == 0

    def test_masked_adapters_and_some_of_the_norms(self):
        model, batch = adapt(build("bert"), "wide"), inputs("bert", batch=4)
        model.add_adapter("one-layer", LNTuningConfig(layers_to_transform=[1]))
        model.add_adapter("bias", LNTuningConfig(tune="bias", roles=["attention"]))
        model.add_adapter("masked", LNTuningConfig())
        model.base_model.set_masks(random_masks(model, "masked"), "masked")
        names = ["masked", "one-layer", "bias", "wide"]
        for seed, name in enumerate(names, start=4):
            fill(model, name, seed=seed)
        bank = AdapterBank(model)
        bank.add_many({name: (model, name) for name in names})
        bank.attach()
        torch.testing.assert_close(routed(bank, model, batch, names), each_alone(model, batch, names), **CLOSE)

    def test_a_base_that_changes_is_followed(self):
        model, bank = banked("bert")
        batch = inputs("bert")
        routed(bank, model, batch, NAMES)
        with torch.no_grad():
            model.base_model.model.bert.embeddings.LayerNorm.base_layer.weight.mul_(2)
        torch.testing.assert_close(routed(bank, model, batch, NAMES), each_alone(model, batch, NAMES), **CLOSE)

    def test_in_inference_mode_and_with_gradients_to_the_inputs(self):
        model, bank = banked("bert")
        batch = inputs("bert")
        expected = routed(bank, model, batch, NAMES)
        with torch.inference_mode():
            bank.add("late", (model, "a"))
            assert torch.equal(routed(bank, model, batch, ["b", "__base__", "late"]), expected)
        embedding = model.base_model.model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
        with bank.route(["b", "__base__", "late"]):
            said(model, batch).square().sum().backward()
        assert embedding.grad.abs().sum() > 0

    def test_a_batch_costs_a_tenth_more_however_many_adapters(self):
        model = build("bert")
        tuned, batch = adapt(build("bert"), "a"), inputs("bert", batch=32)
        base = count_operations(lambda: output(model, batch))
        bank = AdapterBank(model)
        bank.add_many({str(number): (tuned, "a") for number in range(32)})
        bank.attach()
        counts = set()
        for distinct in (1, 8, 32):
            names = [str(row % distinct) for row in range(32)]
            routed(bank, model, batch, names)  # the base's rows are made once
            counts.add(count_operations(lambda names=names: routed(bank, model, batch, names)))
        assert len(counts) == 1
        norms = len(list(layers(tuned)))
        assert counts.pop() <= base + norms + 6


class TestBesidePeft:
    def test_peft_adapters_are_off_inside_and_on_again_after(self):
        model, bank = banked("bert")
        batch = inputs("bert")
        model.set_adapter("b")
        before = output(model, batch)
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert torch.equal(routed(bank, model, batch, "__base__"), alone(model, batch, "__base__"))
        assert torch.equal(output(model, batch), before)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags

    def test_lora_on_the_same_model_is_off_inside(self):
        model, tuned, batch = build("bert"), adapt(build("bert"), "a"), inputs("bert")
        bank = AdapterBank(model)
        bank.add("a", (tuned, "a"))
        bank.attach()
        lora = get_peft_model(model, LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
        with_lora = output(lora, batch)
        torch.testing.assert_close(routed(bank, lora, batch, "a"), alone(tuned, batch, "a"), **CLOSE)
        assert torch.equal(output(lora, batch), with_lora)

    def test_one_that_was_disabled_stays_so(self):
        model, bank = banked("bert")
        with model.disable_adapter():
            routed(bank, model, inputs("bert"), NAMES)
            assert all(layer.disable_adapters for layer in layers(model))

    def test_merged_adapters_are_refused(self):
        model, bank = banked("bert")
        model.merge_adapter(["a"])
        with pytest.raises(RoutingError, match="merged adapters, please call `unmerge_adapter` first"):
            routed(bank, model, inputs("bert"), NAMES)

    def test_learned_prompts_are_refused(self):
        model = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        with pytest.raises(UnsupportedError, match="learned prompts, which a route cannot switch off"):
            AdapterBank(model)


class TestSourcesThatAreModels:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                LoraConfig(target_modules=["query"]),
                "adapter 'x' has LoraConfig, and a bank holds only deltas of norms",
            ),
            (UnifiedConfig(preset="mha-adapter+ln"), "has BottleneckConfig, LNTuningConfig, and a bank"),
            (ModuleTuningConfig(components=["query"]), "has ModuleTuningConfig"),
            (
                LNTuningConfig(target_modules=["query", "LayerNorm"]),
                r"tunes 2 modules other than norms, such as .*query \(Linear\)",
            ),
        ],
        ids=["lora", "unified", "modules", "named"],
    )
    def test_what_is_not_of_norms_is_refused(self, config, message):
        model = get_peft_model(build("bert"), config)
        bank = AdapterBank(build("bert"))
        with pytest.raises(UnsupportedError, match=message):
            bank.add("x", (model, "default"))
        assert bank.names == []

    def test_another_model_is_refused(self):
        bank = AdapterBank(build("bert"))
        with pytest.raises(AdapterFileError, match="'x' does not fit this model: it belongs to a model of type 'gpt2'"):
            bank.add("x", (adapt(build("gpt2")), "default"))
        wide = build("bert")
        norm = wide.bert.encoder.layer[1].output.LayerNorm
        norm.weight, norm.normalized_shape = nn.Parameter(torch.ones(8)), (8,)
        norm.bias = nn.Parameter(torch.ones(8))
        with pytest.raises(AdapterFileError, match=r"of another shape: .*is \(8,\) in the file, \(16,\) here"):
            bank.add("x", (adapt(wide), "default"))

    def test_an_adapter_that_misses_norms_is_refused(self):
        model = adapt(build("bert"))
        del model.base_model.model.bert.embeddings.LayerNorm.lntune_bias["default"]
        with pytest.raises(AdapterFileError, match=r"1 missing, such as bert\.embeddings\.LayerNorm\.bias"):
            AdapterBank(model).add("x", (model, "default"))

    def test_neither_a_directory_nor_a_model_is_refused(self):
        model = adapt(build("bert"))
        bank = AdapterBank(model)
        with pytest.raises(ConfigError, match="'nobody' not found; the given model has \\['default'\\]"):
            bank.add("x", (model, "nobody"))
        with pytest.raises(ConfigError, match="the given model has BertForMaskedLM"):
            bank.add("x", (build("bert"), "default"))
        with pytest.raises(ConfigError, match="from a folder or from \\(peft_model, adapter_name\\), but got 3"):
            bank.add("x", 3)

    @pytest.mark.parametrize("value", [float("nan"), 1e6])
    def test_values_that_are_not_finite_are_refused(self, value):
        model = adapt(build("bert"))
        deltas(model)["bert.embeddings.LayerNorm.bias"].weight.data[0] = value
        bank = AdapterBank(model, dtype=torch.float16)
        with pytest.raises(AdapterFileError, match=r"adapter 'x' holds values that are not finite in torch\.float16"):
            bank.add("x", (model, "default"))
        assert bank.names == []

    def test_of_many_with_a_bad_one_none_is_taken(self):
        good, bad = adapt(build("bert")), adapt(build("gpt2"))
        bank = AdapterBank(good, capacity=2)
        for _ in range(3):
            with pytest.raises(AdapterFileError, match="does not fit"):
                bank.add_many({"a": (good, "default"), "b": (bad, "default")})
        assert bank.names == []
        assert bank.capacity == 2  # the places are free again

    def test_an_unfitted_fisher_adapter(self):
        model = get_peft_model(build("bert"), FisherLNConfig()).eval()
        fill(model, "default")
        bank = AdapterBank(model)
        bank.add("x", (model, "default"))
        for name, value in bank.deltas("x").items():
            assert torch.equal(value, deltas(model)[name].weight)


class TestNames:
    def test_growing_keeps_every_row(self):
        model = adapt(build("bert"), *map(str, range(9)))
        bank, batch = AdapterBank(model, capacity=1), inputs("bert", batch=9)
        bank.attach()
        sizes = []
        for number in range(9):
            bank.add(str(number), (model, str(number)))
            sizes.append(bank.capacity)
        assert sizes == [1, 3, 3, 7, 7, 7, 7, 15, 15]
        names = [str(number) for number in range(9)]
        assert bank.names == names
        assert len(bank) == 9
        torch.testing.assert_close(routed(bank, model, batch, names), each_alone(model, batch, names), **CLOSE)

    def test_a_removed_place_is_used_again(self):
        model, bank = banked("bert", "a", "b", "c")
        before = bank.index(["b"]).item()
        bank.remove("b")
        assert bank.names == ["a", "c"]
        assert "b" not in bank
        with pytest.raises(RoutingError, match=f"no adapter has the number {before}: it was removed"):
            routed(bank, model, inputs("bert"), torch.tensor([before] * 3))
        bank.add("d", (model, "b"))
        assert bank.index(["d"]).item() == before
        batch = inputs("bert")
        mixed = routed(bank, model, batch, ["d", "c", "a"])
        torch.testing.assert_close(mixed, each_alone(model, batch, ["b", "c", "a"]), **CLOSE)

    def test_many_lie_in_a_row(self):
        model, bank = banked("bert", "a", "b", "c")
        bank.remove("b")
        bank.add_many(dict.fromkeys("xyz", (model, "b")))
        first = bank.index(["x"]).item()
        assert bank.index(["x", "y", "z"]).tolist() == [first, first + 1, first + 2]

    @pytest.mark.parametrize("name", ["", "__base__", 3])
    def test_impossible_names_are_refused(self, name):
        model, bank = banked("bert")
        with pytest.raises(ConfigError, match="an adapter cannot be named"):
            bank.add(name, (model, "a"))

    def test_an_adapter_of_another_architecture_is_refused(self):
        """Norms of Mistral and Llama have the same names and shapes."""
        bank = AdapterBank(build("llama"))
        other = adapt(build("llama"))
        other.get_base_model().config.model_type = "mistral"
        with pytest.raises(
            AdapterFileError, match="'a' does not fit this model: it belongs to a model of type 'mistral'"
        ):
            bank.add("a", (other, "default"))
        assert not len(bank)

    def test_taken_and_unknown_names_are_refused(self):
        model, bank = banked("bert")
        with pytest.raises(ConfigError, match=r"an adapter named 'a' is in the bank\. Remove it first"):
            bank.add("a", (model, "b"))
        for call in (bank.remove, bank.deltas, bank.heads, lambda name: bank.load([name])):
            with pytest.raises(ConfigError, match="adapter 'z' is not in the bank, which has a, b"):
                call("z")
        with pytest.raises(RoutingError, match=r"non-existing adapter\(s\): z\. Known adapters: a, b, __base__\."):
            bank.index(["a", "z"])
        with pytest.raises(RoutingError, match=r"non-existing adapter\(s\): \['a'\]"):
            bank.index([["a"]])

    def test_what_it_says_of_itself(self):
        _, bank = banked("bert")
        assert repr(bank) == f"AdapterBank(2 adapters of BertForMaskedLM, {bank.row_bytes:,} bytes each)"
        assert bank.row_bytes == sum(value.numel() * 4 for value in bank.deltas("a").values())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"capacity": 0}, "capacity=0 should be a number of adapters"),
            ({"capacity": 2.5}, "capacity=2.5 should be"),
            ({"dtype": torch.int8}, r"dtype=torch\.int8 is not a floating dtype"),
            ({"dtype": "float32"}, "dtype='float32' is not a floating dtype of torch"),
        ],
    )
    def test_impossible_options_are_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            AdapterBank(build("bert"), **options)

    def test_a_model_without_norms_is_refused(self):
        with pytest.raises(UnsupportedError, match="no norm with a weight"):
            AdapterBank(nn.Linear(3, 3))


class TestAttach:
    def test_the_model_is_as_before_but_in_a_route(self):
        model = build("llama")
        batch, before = inputs("llama"), snapshot(model)
        expected, dicts = output(model, batch), {name: set(m.__dict__) for name, m in model.named_modules()}
        bank = AdapterBank(model)
        bank.attach()
        bank.attach()
        assert_unchanged(model, before)
        assert torch.equal(output(model, batch), expected)
        bank.detach()
        assert {name: set(m.__dict__) for name, m in model.named_modules()} == dicts
        assert torch.equal(output(model, batch), expected)
        with pytest.raises(RoutingError, match=r"not attached to its model\. Call bank\.attach\(\) first"):
            routed(bank, model, batch, "__base__")

    def test_an_attached_bank_costs_the_tuner_nothing(self):
        model, batch = adapt(build("bert")), inputs("bert")
        expected, count = output(model, batch), count_operations(lambda: output(model, batch))
        bank = AdapterBank(model)
        bank.attach()
        assert torch.equal(output(model, batch), expected)
        assert count_operations(lambda: output(model, batch)) == count

    def test_a_forward_in_the_instance_is_kept(self):
        """As accelerate puts one there; below ours if it was first, above it if it came later."""
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        model, bank_model = adapt(build("bert"), "a", "b"), build("bert")
        norm, batch = bank_model.bert.embeddings.LayerNorm, inputs("bert")
        expected = each_alone(model, batch, NAMES)
        calls = []

        class Seen(ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                calls.append(1)
                return args, kwargs

        add_hook_to_module(norm, Seen())
        theirs = norm.__dict__["forward"]
        bank = AdapterBank(bank_model)
        bank.add_many({name: (model, name) for name in ("a", "b")})
        bank.attach()
        torch.testing.assert_close(routed(bank, bank_model, batch, NAMES), expected, **CLOSE)
        assert len(calls) == 1
        bank.detach()
        assert norm.__dict__["forward"] is theirs
        remove_hook_from_module(norm)

        bank.attach()
        add_hook_to_module(norm, Seen())
        torch.testing.assert_close(routed(bank, bank_model, batch, NAMES), expected, **CLOSE)
        bank.detach()
        assert len(calls) == 2
        before = output(bank_model, batch)
        bank.attach()
        torch.testing.assert_close(routed(bank, bank_model, batch, NAMES), expected, **CLOSE)
        bank.detach()
        assert torch.equal(output(bank_model, batch), before)

    @pytest.mark.parametrize("family", ["bert", "llama"])
    def test_hooks_run_once_and_see_the_rows(self, family):
        model, bank = banked(family)
        seen, batch = [], inputs(family)
        norm = next(module for module in layers(model)).base_layer
        norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        norm.register_forward_hook(lambda module, args, output: seen.append(output))
        mixed = routed(bank, model, batch, NAMES)
        assert len(seen) == 2
        torch.testing.assert_close(mixed, each_alone(model, batch, NAMES), **CLOSE)

    def test_two_banks_on_one_model_are_refused(self):
        model, bank = banked("bert")
        other = AdapterBank(model)
        with pytest.raises(UnsupportedError, match=r"another bank is attached to this model\. Call its detach\(\)"):
            other.attach()
        bank.detach()
        other.attach()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_a_copy_is_not_attached(self, copied):
        tuned, model, batch = adapt(build("bert"), "a", "b"), build("bert"), inputs("bert")
        bank = AdapterBank(model)
        bank.add_many({name: (tuned, name) for name in ("a", "b")})
        bank.attach()
        expected = output(model, batch)
        with bank.route(NAMES):
            twin = copied(model)
            plain = output(twin, batch)
        assert torch.equal(plain, expected)
        other = AdapterBank(twin)
        other.add_many({name: (tuned, name) for name in ("a", "b")})
        other.attach()
        torch.testing.assert_close(routed(other, twin, batch, NAMES), each_alone(tuned, batch, NAMES), **CLOSE)
        assert torch.equal(output(model, batch), expected)

    def test_detaching_inside_a_route_is_refused(self):
        model, bank = banked("bert")
        with bank.route(NAMES):
            with pytest.raises(RoutingError, match=r"running a forward pass routed to"):
                bank.detach()
            output(model, inputs("bert"))

    def test_norms_on_meta_are_refused(self):
        model = build("bert")
        bank = AdapterBank(model)
        bank.attach()
        model.to("meta")
        with (
            pytest.raises(UnsupportedError, match="norms of this model are on the meta device"),
            bank.route("__base__"),
        ):
            pass
        assert not bank._route.active


class TestRoute:
    @pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a"] * 6, []])
    def test_another_length_is_refused(self, names):
        model, bank = banked("bert")
        message = f"Length of the names or index given to `route` .* but got {len(names)} and 3 respectively"
        with pytest.raises(RoutingError, match=message):
            routed(bank, model, inputs("bert"), names)
        routed(bank, model, inputs("bert"), NAMES)

    @pytest.mark.parametrize("index", [torch.ones(3), torch.ones(1, 3, dtype=torch.long)], ids=["float", "2d"])
    def test_a_tensor_that_is_no_index_is_refused(self, index):
        model, bank = banked("bert")
        with pytest.raises(RoutingError, match=r"an index is int64 of shape \(B,\), as bank\.index returns it"):
            routed(bank, model, inputs("bert"), index)

    def test_training_mode_is_refused(self):
        model, bank = banked("bert")
        with pytest.raises(RoutingError, match=r"in training mode\. Call model\.eval\(\) first"):
            routed(bank, model.train(), inputs("bert"), NAMES)

    def test_a_second_entry_raises_and_the_first_goes_on(self):
        model, bank = banked("bert")
        batch = inputs("bert")
        expected = routed(bank, model, batch, NAMES)
        with bank.route(NAMES):
            with pytest.raises(RoutingError, match=r"running a forward pass routed to \['__base__', 'a', 'b'\]"):
                routed(bank, model, batch, ["a"] * 3)
            assert torch.equal(output(model, batch), expected)
        assert torch.equal(output(model, batch), alone(model, batch, "a"))

    def test_after_a_forward_that_raises(self):
        model, bank = banked("bert-classifier", task_type="SEQ_CLS")
        batch = inputs("bert-classifier")
        expected, mixed = output(model, batch), routed(bank, model, batch, NAMES)
        handle = model.base_model.model.bert.encoder.layer[1].register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="half way"):
            routed(bank, model, batch, NAMES)
        handle.remove()
        assert torch.equal(output(model, batch), expected)
        assert torch.equal(routed(bank, model, batch, NAMES), mixed)

    def test_a_route_keeps_the_rows_it_has_gathered(self):
        model, bank = banked("bert")
        batch = inputs("bert")
        expected = routed(bank, model, batch, NAMES)
        with bank.route(NAMES):
            bank.remove("a")
            bank.add("other", (model, "b"))  # in the place of `a`
            bank.add_many({str(number): (model, "b") for number in range(2000)})  # and room is made
            assert torch.equal(output(model, batch), expected)
        with pytest.raises(RoutingError, match=r"Known adapters: b, other, .* and \d+ others"):
            routed(bank, model, batch, NAMES)


def _fail(*_):
    raise RuntimeError("half way")


GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "beams and returns": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
}


class TestGenerate:
    @pytest.mark.parametrize(("family", "way"), spread(["llama", "gpt2", "t5", "bart"], GENERATIONS))
    def test_row_i_is_what_its_adapter_alone_generates(self, family, way):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, **GENERATIONS[way]}
        task = "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "CAUSAL_LM"
        model, bank = banked(family, std=1.0, task_type=task)
        batch = {name: value for name, value in inputs(family).items() if name in ("input_ids", "attention_mask")}
        with bank.route(NAMES):
            mixed = model.generate(**batch, **options)
        returns = options.get("num_return_sequences", 1)
        bank.detach()
        for i, name in enumerate(NAMES):
            rows = slice(i * returns, (i + 1) * returns)
            assert torch.equal(mixed[rows], generated_alone(model, batch, name, **options)[rows])
        assert family != "llama" or not torch.equal(
            generated_alone(model, batch, "a", **options), generated_alone(model, batch, "b", **options)
        )

    def test_padding_on_the_left_and_a_config_by_position(self):
        from transformers import GenerationConfig

        model, bank = banked("llama", std=1.0, task_type="CAUSAL_LM")
        batch = inputs("llama")
        batch["attention_mask"][0, :4] = 0
        config = GenerationConfig(num_beams=3, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
        base = model.get_base_model()
        with bank.route(NAMES):
            mixed = base.generate(batch["input_ids"], config, attention_mask=batch["attention_mask"])
        bank.detach()
        for i, name in enumerate(NAMES):
            assert torch.equal(mixed[i], generated_alone(model, batch, name, generation_config=config)[i])

    def test_beams_are_known_inside_generate_alone(self):
        model, bank = banked("llama", task_type="CAUSAL_LM")
        batch = inputs("llama", batch=6)
        with bank.route(NAMES):
            model.generate(**inputs("llama"), num_beams=2, max_new_tokens=2)
            with pytest.raises(RoutingError, match="but got 3 and 6 respectively"):
                output(model, batch)
