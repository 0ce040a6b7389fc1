"""Supermasks on models: where they go, that switched off is zero and nothing else, and PEFT's verbs."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lntune import (
    BottleneckConfig,
    FisherLNConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    SupermaskConfig,
    UnifiedConfig,
    fit_fisher_masks,
    plan,
)
from peft_lntune.architectures.table import LAYER_MATRICES
from peft_lntune.errors import ConfigError, NoMatchError, UnsupportedError
from peft_lntune.interop import to_stock
from peft_lntune.layers.held import supermasks_of
from peft_lntune.tuner.supermasks import keep_masks, sampled_masks, start_masks
from tests import adapted
from tests.cases import few
from tests.oracles import each_alone
from tests.tuner.test_module_tuning import TABLE

FAMILIES = ["bert", "roberta", "distilbert", "gpt2", "llama", "t5", "vit"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUERIES = [f"bert.encoder.layer.{layer}.attention.self.query" for layer in range(2)]
VALUES = [name.replace("query", "value") for name in QUERIES]


def masked(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PeftModel:
    """A model in evaluation with supermasks of random scores, so that half of the entries are off."""
    model = get_peft_model(adapted.build(family, dtype), SupermaskConfig(**options)).eval()
    adapted.fill(model, "default", seed=seed)
    return model


def switched_off(family: str, dtype: torch.dtype, *masks: dict[str, Tensor]) -> nn.Module:
    """The plain model with zeros in its weights: slow, and obviously right."""
    model = adapted.build(family, dtype)
    for kept in masks:
        for name, keep in kept.items():
            weight = model.get_parameter(name)
            weight.data = weight.data.masked_fill(~keep, 0)
    return model


class TestWhere:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_matrix_of_attention_and_ffn(self, family):
        model = get_peft_model(adapted.build(family), SupermaskConfig())
        if family == "gpt2":
            ends = ["attn.c_attn", "attn.c_proj", "crossattention.q_attn", "crossattention.c_attn"]
            ends += ["crossattention.c_proj", "mlp.c_fc", "mlp.c_proj"]
        else:
            rows = TABLE["bert" if family == "roberta" else family]
            ends = [end for component in LAYER_MATRICES for end in rows.get(component, "").split()]
        heads = ("cls.", "vocab_", "lm_head", "classifier")
        expected = {
            f"{name}.weight"
            for name, _ in adapted.build(family).named_modules()
            if name.endswith(tuple(ends)) and not name.startswith(heads)
        }
        assert keep_masks(model).keys() == expected
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {
            f"base_model.model.{name.removesuffix('.weight')}.lntune_supermask.default.weight" for name in expected
        }
        entries = sum(adapted.build(family).get_parameter(name).numel() for name in expected)
        assert plan(adapted.build(family), SupermaskConfig()).entries == entries
        assert model.get_nb_trainable_parameters()[0] == entries

    def test_the_gate_of_llama(self):
        assert any("gate_proj" in name for name in keep_masks(masked("llama")))

    def test_queries_in_a_fused_projection(self):
        model = masked("gpt2", components=["query"])
        name = "transformer.h.0.attn.c_attn"
        keep = keep_masks(model)[f"{name}.weight"]
        assert supermasks_of(model, "default")[f"base_model.model.{name}"].weight.shape == (16, 16)
        assert keep[:, 16:].all()
        assert 0 < int(keep[:, :16].sum()) < 16 * 16
        layer = model.get_base_model().get_submodule(name)
        effective, base = layer.effective("weight", ["default"]), layer.base_parameter("weight")
        assert torch.equal(effective[:, 16:], base[:, 16:])
        assert torch.equal(effective, base * keep)
        # Cross-attention has its queries in a matrix of their own.
        assert keep_masks(model)["transformer.h.0.crossattention.q_attn.weight"].shape == (16, 16)
        found = plan(adapted.build("gpt2"), SupermaskConfig(components=["query"])).parts[name]
        assert (found.entries, found.bytes, found.method) == ({"weight": (256, 256)}, 32, "supermask")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, QUERIES),
            ({"layers_to_transform": [1]}, QUERIES[1:]),
            ({"layers_to_exclude": 1}, QUERIES[:1]),
            ({"exclude_modules": ["layer.0.attention.self.query"]}, QUERIES[1:]),
            ({"exclude_modules": r".*\.layer\.1\..*"}, QUERIES[:1]),
            ({"modules_to_save": ["layer.0.attention.self.query"]}, QUERIES[1:]),
        ],
    )
    @pytest.mark.parametrize("named", [False, True])
    def test_layers_and_tensors_left_out(self, options, expected, named):
        chosen = {"target_modules": ["query"]} if named else {"components": ["query"]}
        config = SupermaskConfig(**chosen, **options)
        assert list(plan(adapted.build("bert"), config).parts) == expected
        model = get_peft_model(adapted.build("bert"), config)
        assert list(keep_masks(model)) == [f"{name}.weight" for name in expected]

    def test_by_regular_expression(self):
        config = SupermaskConfig(target_modules=r".*layer\.1\..*\.(key|value)")
        assert [name.rpartition(".")[2] for name in plan(adapted.build("bert"), config).parts] == ["key", "value"]

    def test_a_head_is_tuned_densely(self):
        model = get_peft_model(adapted.build("bert-classifier"), SupermaskConfig(task_type="SEQ_CLS"))
        head = [name for name, p in model.named_parameters() if p.requires_grad and "supermask" not in name]
        assert head == [
            "base_model.model.classifier.modules_to_save.default.weight",
            "base_model.model.classifier.modules_to_save.default.bias",
        ]
        assert not any("classifier" in name for name in keep_masks(model))
        model.train()
        adapted.said(model, adapted.inputs("bert-classifier")).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n in head)

    def test_embeddings_and_convolutions_by_name(self):
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.emb, self.conv, self.lin = nn.Embedding(9, 4), nn.Conv1d(4, 6, 3), nn.Linear(6, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.lin(self.conv(self.emb(x).transpose(1, 2)).transpose(1, 2))

        plain, x = Net().eval(), torch.randint(9, (3, 5))
        config = SupermaskConfig(target_modules=["emb", "conv", "lin"], initial_sparsity=0.5)
        model = get_peft_model(copy.deepcopy(plain), config).eval()
        for name, keep in keep_masks(model).items():
            plain.get_parameter(name).data.mul_(keep)
        assert torch.equal(model(x), plain(x))
        assert len(keep_masks(model)) == 3


class TestStart:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_smallest_of_each_tensor_are_off(self, dtype):
        model = get_peft_model(adapted.build("llama", dtype), SupermaskConfig(initial_sparsity=0.3))
        for name, keep in keep_masks(model).items():
            size = model.get_base_model().get_submodule(name.removesuffix(".weight")).base_parameter("weight").abs()
            assert int((~keep).sum()) == round(0.3 * keep.numel())
            assert size[~keep].max() <= size[keep].min()
        assert all(m.weight.abs().eq(5).all() for m in supermasks_of(model, "default").values())

    def test_an_adapter_added_to_a_merged_model_ranks_the_weights_themselves(self):
        model = masked("bert", components=["query"])
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):  # PEFT, when the ranking is done
            model.add_adapter("later", SupermaskConfig(components=["query"], initial_sparsity=0.3))
        alone = get_peft_model(adapted.build("bert"), SupermaskConfig(components=["query"], initial_sparsity=0.3))
        expected = keep_masks(alone)
        found, start = keep_masks(model, "later"), start_masks(model, "later")
        assert all(torch.equal(found[name], keep) for name, keep in expected.items())
        assert all(torch.equal(start[name], keep) for name, keep in expected.items())


class TestEvaluation:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("family", few(FAMILIES))
    def test_switched_off_is_zero_and_nothing_else(self, family, dtype):
        model, batch = masked(family, dtype), adapted.inputs(family, dtype)
        expected = adapted.output(switched_off(family, dtype, keep_masks(model)), batch)
        assert torch.equal(adapted.output(model, batch), expected)
        assert torch.equal(adapted.said(model, batch).detach(), expected)  # with gradients, so nothing is kept
        assert not torch.equal(expected, adapted.output(adapted.build(family, dtype), batch))

    def test_kept_weights_follow_their_scores(self):
        model, batch = masked("bert"), adapted.inputs("bert")
        first = adapted.output(model, batch)
        adapted.fill(model, "default", seed=5)
        second = adapted.output(model, batch)
        assert not torch.equal(first, second)
        assert torch.equal(second, adapted.output(switched_off("bert", torch.float32, keep_masks(model)), batch))

    def test_draws_are_never_kept(self):
        """Also where modes are set one module at a time, as those do who put them back."""
        model, batch = masked("distilbert"), adapted.inputs("distilbert")
        still = adapted.output(model, batch)
        for module in model.modules():
            if "Dropout" not in type(module).__name__:
                module.training = True
        assert not torch.equal(adapted.output(model, batch), adapted.output(model, batch))
        assert torch.equal(adapted.output(model.eval(), batch), still)

    @pytest.mark.parametrize("training", [True, False])
    def test_a_new_mask_is_in_the_mode_of_its_model(self, training):
        model = get_peft_model(adapted.build("bert").train(training), SupermaskConfig(initial_score=0.1))
        assert {mask.drawn for mask in supermasks_of(model, "default").values()} == {training}


class TestSampled:
    def test_drawn_within_and_as_before_afterwards(self):
        model, batch = masked("bert"), adapted.inputs("bert")
        still = adapted.output(model, batch)
        with sampled_masks(model):
            torch.manual_seed(0)
            draws = [adapted.output(model, batch) for _ in range(2)]
            assert not torch.equal(*draws)
            torch.manual_seed(0)
            assert torch.equal(adapted.output(model, batch), draws[0])
            with sampled_masks(model):
                pass
            assert not torch.equal(adapted.output(model, batch), adapted.output(model, batch))
        assert torch.equal(adapted.output(model, batch), still)

    def test_their_mean_tends_to_that_of_the_distribution(self):
        torch.manual_seed(0)
        layer = nn.Linear(30, 4, bias=False)
        model = get_peft_model(nn.Sequential(layer), SupermaskConfig(target_modules=["0"])).eval()
        adapted.fill(model, "default", std=1.0)
        x = torch.randn(8, 30)
        (mask,) = supermasks_of(model, "default").values()
        p, weight = mask.weight.detach().sigmoid(), layer.weight.detach()
        with sampled_masks(model), torch.no_grad():
            mean = torch.stack([model(x) for _ in range(2000)]).mean(0)
        deviation = (x.square() @ (weight.square() * p * (1 - p)).T / 2000).sqrt()
        assert ((mean - x @ (weight * p).T).abs() < 5 * deviation).all()

    def test_an_error_within_ends_it(self):
        model, batch = masked("bert"), adapted.inputs("bert")
        still = adapted.output(model, batch)
        with pytest.raises(RuntimeError, match="of the test"), sampled_masks(model):
            raise RuntimeError("of the test")
        assert torch.equal(adapted.output(model, batch), still)

    def test_what_is_refused(self, tmp_path):
        model = masked("bert", components=["query"])
        with pytest.raises(ConfigError, match=r"no supermasks of an adapter 'x'; it has those of \['default'\]"):
            sampled_masks(model, "x").__enter__()
        with pytest.raises(ConfigError, match="it has those of none"):
            keep_masks(adapted.adapt(adapted.build("bert")))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(adapted.build("bert"), tmp_path)
        with pytest.raises(UnsupportedError, match=r"holds only bits.*save_scores=True"):
            sampled_masks(loaded).__enter__()
        model.merge_adapter()
        with pytest.raises(UnsupportedError, match=r"is merged, so nothing is drawn. Call unmerge_adapter\(\)"):
            sampled_masks(model).__enter__()


class TestMerge:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("family", ["bert", *few(FAMILIES[1:], ())])
    @pytest.mark.parametrize("training", [False, True])
    def test_bit_for_bit_there_and_back(self, family, dtype, training):
        model, batch = masked(family, dtype, initial_sparsity=0.2), adapted.inputs(family, dtype)
        expected, before = adapted.output(model, batch), adapted.snapshot(model)
        model.train(training)
        model.merge_adapter(safe_merge=True)
        model.eval()
        assert torch.equal(adapted.output(model, batch), expected)
        model.train(training)
        model.unmerge_adapter()
        adapted.assert_unchanged(model, before)
        assert torch.equal(adapted.output(model.eval(), batch), expected)
        plain = model.merge_and_unload()
        assert not list(adapted.layers(plain))
        assert torch.equal(adapted.output(plain, batch), expected)

    def test_a_safe_merge_of_a_broken_base_changes_nothing(self):
        model = masked("bert", components=["query"])
        layer = model.get_base_model().get_submodule(QUERIES[1])
        keep = keep_masks(model)[f"{QUERIES[1]}.weight"]
        with torch.no_grad():
            layer.base_layer.weight[keep] = torch.nan
        before = {name: value for name, value in adapted.snapshot(model).items() if "layer.0" in name}
        with pytest.raises(ValueError, match=f"the weight of {QUERIES[1]} would not be finite"):
            model.merge_adapter(safe_merge=True)
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        with torch.no_grad():  # what is off may be anything
            layer.base_layer.weight.fill_(1.0)[~keep] = torch.nan
        model.merge_adapter(safe_merge=True)


# Two supermasks and two others on one model.
CONFIGS = {
    "a": lambda: SupermaskConfig(),
    "b": lambda: SupermaskConfig(components=["query", "ffn_up"]),
    "norms": lambda: LNTuningConfig(),
    "delta": lambda: ModuleTuningConfig(components=["query"], tune="weight"),
}


def several(dtype: torch.dtype = torch.float32) -> PeftModel:
    model = get_peft_model(adapted.build("bert", dtype), CONFIGS["a"](), adapter_name="a")
    for name in ("b", "norms", "delta"):
        model.add_adapter(name, CONFIGS[name]())
    for seed, name in enumerate(CONFIGS):
        adapted.fill(model, name, std=0.1, seed=seed)
    return model.eval()


class TestSeveral:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_switching_and_disabling(self, dtype):
        model, batch = several(dtype), adapted.inputs("bert", dtype)
        base = adapted.output(adapted.build("bert", dtype), batch)
        for name in "abab":
            model.set_adapter(name)
            expected = adapted.output(switched_off("bert", dtype, keep_masks(model, name)), batch)
            assert torch.equal(adapted.output(model, batch), expected)
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            assert trained
            assert all(f".lntune_supermask.{name}." in n for n in trained)
            with model.disable_adapter():
                assert torch.equal(adapted.output(model, batch), base)

    @pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]], ids="".join)
    def test_two_active_keep_what_both_keep(self, order):
        model, batch = several(), adapted.inputs("bert")
        model.base_model.set_adapter(order)
        both = switched_off("bert", torch.float32, keep_masks(model, "a"), keep_masks(model, "b"))
        expected = adapted.output(both, batch)
        assert torch.equal(adapted.output(model, batch), expected)
        model.merge_adapter()
        assert torch.equal(adapted.output(model, batch), expected)
        # Both are trained: the gradient of the one is that of the entries which the other keeps.
        model.unmerge_adapter()
        adapted.said(model, batch).square().sum().backward()
        layer = model.get_base_model().get_submodule(QUERIES[0])
        masks = layer.lntune_supermask
        for one, other in (order, order[::-1]):
            gradient = masks[one].weight.grad
            assert gradient[~masks[other].mask()].eq(0).all()
            assert gradient[masks[other].mask()].ne(0).any()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("order", [["a", "delta", "norms"], ["norms", "delta", "a"]], ids="-".join)
    def test_a_delta_is_added_behind_the_mask(self, order, dtype):
        model, batch = several(dtype), adapted.inputs("bert", dtype)
        model.base_model.set_adapter(order)
        plain = switched_off("bert", dtype, keep_masks(model, "a"))
        for name in ("delta", "norms"):
            for key, delta in adapted.deltas(model, name).items():
                if name == "delta":
                    parameter = plain.get_parameter(key)
                    parameter.data = (parameter.data + delta.dense()).to(dtype)
        layer = model.get_base_model().get_submodule(QUERIES[0])
        effective = layer.effective("weight", order).to(dtype)
        assert torch.equal(effective, plain.get_parameter(f"{QUERIES[0]}.weight"))
        assert effective[~keep_masks(model, "a")[f"{QUERIES[0]}.weight"]].abs().sum() > 0
        before, tuned = adapted.snapshot(model), adapted.output(model, batch)
        model.merge_adapter()
        assert torch.equal(layer.base_parameter("weight"), effective)
        if dtype == torch.float32:
            assert torch.equal(adapted.output(model, batch), tuned)
        model.unmerge_adapter()
        adapted.assert_unchanged(model, before)

    def test_merged_one_after_the_other(self):
        model, batch = several(), adapted.inputs("bert")
        model.base_model.set_adapter(["a", "delta"])
        expected = adapted.output(model, batch)
        model.merge_adapter(["delta"])
        with pytest.warns(UserWarning, match="Already following adapters were merged"):
            model.merge_adapter(["a"])
        assert torch.equal(adapted.output(model, batch), expected)

    def test_mixed_batches(self):
        model, batch = several(), adapted.inputs("bert", batch=6)
        names = ["a", "norms", "__base__", "b", "delta", "a"]
        mixed = adapted.output(model, batch, adapter_names=names)
        torch.testing.assert_close(mixed, each_alone(model, batch, names), rtol=1e-5, atol=1e-5)

    def test_deleting_one_leaves_the_others(self):
        model, batch = several(), adapted.inputs("bert")
        model.set_adapter("b")
        expected = adapted.output(model, batch)
        model.delete_adapter("a")
        assert not any(".a." in name for name in model.state_dict())
        assert torch.equal(adapted.output(model, batch), expected)
        with pytest.warns(UserWarning, match="Adapter b was active which is now deleted"):
            model.delete_adapter("b")
        with pytest.raises(ConfigError, match="it has those of none"):
            keep_masks(model, "b")
        assert sorted(model.peft_config) == ["delta", "norms"]

    def test_one_of_a_combined_adapter(self):
        batch = adapted.inputs("bert")
        config = UnifiedConfig(parts=[SupermaskConfig(components=["query", "key"]), LNTuningConfig()])
        model = get_peft_model(adapted.build("bert"), config).eval()
        assert {part.method for part in plan(adapted.build("bert"), config).parts.values()} == {"supermask", "delta"}
        adapted.fill(model, "default")
        plain = switched_off("bert", torch.float32, keep_masks(model))
        alone = adapted.adapt(plain)
        for name, delta in adapted.deltas(model).items():
            adapted.deltas(alone)[name].fill(delta.dense())
        assert torch.equal(adapted.output(model, batch), adapted.output(alone, batch))
        expected = adapted.output(model, batch)
        assert torch.equal(adapted.output(model.merge_and_unload(), batch), expected)

    def test_two_parts_on_one_place(self):
        parts = [SupermaskConfig(components=["query"]), ModuleTuningConfig(components=["query"])]
        with pytest.raises(ConfigError, match=r"SupermaskConfig and ModuleTuningConfig both work on .*query"):
            get_peft_model(adapted.build("bert"), UnifiedConfig(parts=parts))


def beside_lora(order: list[str], mixed: bool, ours: Any = SupermaskConfig) -> Any:
    """A supermask (or other adapter) and LoRA on the same modules, both active; LoRA's layer is outside or inside."""
    lora = LoraConfig(target_modules=["value"], r=2, init_lora_weights=False)
    configs = {"ours": ours(target_modules=["value"]), "other": lora if mixed else UnifiedConfig(parts=[lora])}
    first, second = order
    model = get_peft_model(adapted.build("bert"), configs[first], first, mixed=mixed)
    model.add_adapter(second, configs[second])
    adapted.fill(model, "ours")
    activate(model, order)
    return model.eval()


def activate(model: Any, names: list[str]) -> None:
    (model.base_model if isinstance(model, PeftModel) else model).set_adapter(names)


@pytest.mark.parametrize("order", [["ours", "other"], ["other", "ours"]], ids="-".join)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "parts"])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")  # PEFT says so at every second merge
class TestBesideLora:
    """On one module, whichever came first: the mask is over the base, and what LoRA has learnt stays."""

    def test_what_they_say(self, order, mixed):
        model, batch = beside_lora(order, mixed), adapted.inputs("bert")
        plain = switched_off("bert", torch.float32, keep_masks(model, "ours"))
        lora = get_peft_model(plain, LoraConfig(target_modules=["value"], r=2)).eval()
        own = dict(lora.named_parameters())
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                plain_name = name.replace(".base_layer.lora_", ".lora_").replace(".other.", ".default.")
                own[plain_name].data.copy_(parameter)
        torch.testing.assert_close(adapted.output(model, batch), adapted.output(lora, batch), rtol=1e-5, atol=1e-6)
        activate(model, ["ours"])
        expected = adapted.output(switched_off("bert", torch.float32, keep_masks(model, "ours")), batch)
        assert torch.equal(adapted.output(model, batch), expected)
        with sampled_masks(model, "ours"):
            assert not torch.equal(adapted.output(model, batch), adapted.output(model, batch))

    @pytest.mark.parametrize("ours", [SupermaskConfig, ModuleTuningConfig])
    @pytest.mark.parametrize("steps", [[None], [["ours", "other"]], [["ours"], ["other"]]], ids=str)
    def test_merging_and_back(self, order, mixed, ours, steps):
        model, batch = beside_lora(order, mixed, ours), adapted.inputs("bert")
        both, before = adapted.output(model, batch), adapted.snapshot(model)
        for names in steps:
            model.merge_adapter(names)
        torch.testing.assert_close(adapted.output(model, batch), both, rtol=1e-5, atol=1e-6)
        model.unmerge_adapter()
        adapted.assert_unchanged(model, before)
        assert torch.equal(adapted.output(model, batch), both)
        torch.testing.assert_close(adapted.output(model.merge_and_unload(), batch), both, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("ours", [SupermaskConfig, ModuleTuningConfig])
    def test_disabling_unmerges_both(self, order, mixed, ours):
        model, batch = beside_lora(order, mixed, ours), adapted.inputs("bert")
        both, before = adapted.output(model, batch), adapted.snapshot(model)
        model.merge_adapter()
        with model.disable_adapter():
            base = adapted.output(model, batch)
        assert torch.equal(base, adapted.output(adapted.build("bert"), batch))
        adapted.assert_unchanged(model, before)
        assert torch.equal(adapted.output(model, batch), both)

    def test_lora_alone_is_not_merged_behind_an_active_mask(self, order, mixed):
        model, batch = beside_lora(order, mixed), adapted.inputs("bert")
        both, before = adapted.output(model, batch), adapted.snapshot(model)
        with pytest.raises(
            UnsupportedError, match=rf"'ours' is active on {VALUES[0]}, .* merge_adapter\(\['other', 'ours'\]\)"
        ):
            model.merge_adapter(["other"])
        with pytest.raises(UnsupportedError, match="or neither"):
            model.merge_and_unload(adapter_names=["other"])
        adapted.assert_unchanged(model, before)
        assert torch.equal(adapted.output(model, batch), both)
        activate(model, ["other"])
        alone = adapted.output(model, batch)
        model.merge_adapter(["other"])
        torch.testing.assert_close(adapted.output(model, batch), alone, rtol=1e-5, atol=1e-6)
        # Then ours as well: LoRA is taken off, and comes again.
        model.merge_adapter(["ours"])
        torch.testing.assert_close(adapted.output(model, batch), both, rtol=1e-5, atol=1e-6)

    def test_unloading(self, order, mixed):
        model, batch = beside_lora(order, mixed), adapted.inputs("bert")
        plain = model.unload()
        adapted.assert_unchanged(plain, adapted.snapshot(adapted.build("bert")))
        assert torch.equal(adapted.output(plain, batch), adapted.output(adapted.build("bert"), batch))


class TestRefused:
    VERBS: tuple[tuple[str, Any, type[Exception], str], ...] = (
        (
            "set_masks",
            lambda model: model.base_model.set_masks({f"{QUERIES[0]}.weight": torch.ones(16, 16).bool()}),
            ConfigError,
            "adapter 'default' has SupermaskConfig, and no deltas; masks choose entries of deltas",
        ),
        (
            "clear_masks",
            lambda model: model.base_model.clear_masks(),
            ConfigError,
            "has SupermaskConfig, and no deltas",
        ),
        (
            "add_weighted_adapter",
            lambda model: model.add_weighted_adapter(["default", "norms"], [0.5, 0.5], "sum"),
            UnsupportedError,
            r"adapter 'default' has supermasks, and a weighted sum of masks is not a mask.*"
            r"peft_model\.base_model\.set_adapter\(\['default', 'norms'\]\)",
        ),
        (
            "fit_fisher_masks",
            lambda model: fit_fisher_masks(model, [adapted.inputs("bert")]),
            ConfigError,
            "has a SupermaskConfig, and masks are fitted for a FisherLNConfig",
        ),
        (
            "to_stock",
            lambda model: to_stock(model, "nowhere"),
            UnsupportedError,
            r"has parts \(SupermaskConfig\) that PEFT's LN_TUNING format cannot hold",
        ),
    )

    @pytest.mark.parametrize(("verb", "call", "error", "message"), VERBS, ids=[row[0] for row in VERBS])
    def test_verbs_of_deltas(self, verb, call, error, message):
        model = masked("bert", components=["query"])
        model.add_adapter("norms", LNTuningConfig())
        before = adapted.snapshot(model)
        with pytest.raises(error, match=message):
            call(model)
        adapted.assert_unchanged(model, before)
        assert sorted(model.peft_config) == ["default", "norms"]

    def test_clearing_masks_of_the_norms_leaves_the_other_parts(self):
        parts = [FisherLNConfig(), SupermaskConfig(components=["query"]), BottleneckConfig(roles=["attention"])]
        parts.append(LoraConfig(target_modules=["value"], r=2))
        model = get_peft_model(adapted.build("bert"), UnifiedConfig(parts=parts)).eval()
        norms = adapted.deltas(model)
        model.base_model.set_masks({name: torch.arange(delta.shape.numel()) < 3 for name, delta in norms.items()})
        adapted.fill(model, "default")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        batch = adapted.inputs("bert")
        before, expected = adapted.snapshot(model), adapted.output(model, batch)
        model.base_model.clear_masks()
        after = model.state_dict()
        others = [name for name in before if "lntune_weight" not in name and "lntune_bias" not in name]
        assert len(others) > 20
        assert [name for name in others if not torch.equal(before[name], after[name])] == []
        assert torch.equal(adapted.output(model, batch), expected)
        assert all(delta.mask is None for delta in adapted.deltas(model).values())

    @pytest.mark.parametrize(
        ("family", "options", "error", "message"),
        [
            (
                "bert",
                {"target_modules": ["query", "layer.1.output.LayerNorm"]},
                UnsupportedError,
                r"bert.encoder.layer.1.output.LayerNorm is named in target_modules.*a norm. Tune norms with LNTuning",
            ),
            (
                "bert",
                {"target_modules": ["query", "attention.self"]},
                UnsupportedError,
                r"bert.encoder.layer.0.attention.self \(BertSelfAttention\) is chosen .* floating `weight`, .* none",
            ),
            ("bert", {"components": ["ffn_gate"]}, NoMatchError, r"components=\['ffn_gate'\] selects no weight"),
            ("bert", {"layers_to_transform": [7]}, NoMatchError, "selects no weight in the chosen layers"),
            ("bert", {"target_modules": ["nothing"]}, NoMatchError, r"target_modules=\{'nothing'\} selects no weight"),
            ("gpt2", {"components": ["embedding"]}, UnsupportedError, "wte.weight is tied to lm_head.weight"),
        ],
    )
    def test_places(self, family, options, error, message):
        model = adapted.build(family)
        before = adapted.snapshot(model)
        with pytest.raises(error, match=message):
            get_peft_model(model, SupermaskConfig(**options))
        adapted.assert_unchanged(model, before)
        wrapped = adapted.adapt(model, "first")
        before = adapted.snapshot(wrapped)
        with pytest.raises(error, match=message):
            wrapped.add_adapter("second", SupermaskConfig(**options))
        adapted.assert_unchanged(wrapped, before)
        assert list(wrapped.peft_config) == ["first"]

    @pytest.mark.parametrize("chosen", [{"components": ["query"]}, {"target_modules": ["query"]}], ids=str)
    def test_a_quantized_model(self, chosen):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = adapted.build("bert")
        quantize_(model, Int8WeightOnlyConfig(version=2))
        before = {name: str(value) for name, value in model.state_dict().items()}
        with pytest.raises(UnsupportedError, match=rf"{QUERIES[0]} \(Linear\) is chosen .* it has one of Int8Tensor"):
            get_peft_model(model, SupermaskConfig(**chosen))
        assert {name: str(value) for name, value in model.state_dict().items()} == before
