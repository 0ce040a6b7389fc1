"""Prefixes: attention over more columns, in every family, and nothing else is touched."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_lntune.architectures.attention import IMPLEMENTATION, find_attention
from peft_lntune.config.prefix import PrefixConfig
from peft_lntune.errors import RoutingError, UnsupportedError
from peft_lntune.layers.held import prefixes_of
from peft_lntune.layers.prefix import ConfigView, PrefixLayer
from peft_lntune.planning.methods.prefix import folded
from peft_lntune.plugin.attention import register_attention
from peft_lntune.routing.route import BASE, Route
from tests import cases
from tests.adapted import build, output
from tests.cases import few

register_attention()

P = 3
# Where each family has its attention: names with the layer left open, role, key heads, head width.
SELF, CROSS = "attention", "cross_attention"
ATTENTION = {
    "bert": [("bert.encoder.layer.{}.attention.self", SELF, 2, 8)],
    "bert-crossed": [
        ("bert.encoder.layer.{}.attention.self", SELF, 2, 8),
        ("bert.encoder.layer.{}.crossattention.self", CROSS, 2, 8),
    ],
    "roberta": [("roberta.encoder.layer.{}.attention.self", SELF, 2, 8)],
    "xlm-roberta": [("roberta.encoder.layer.{}.attention.self", SELF, 2, 8)],
    "distilbert": [("distilbert.transformer.layer.{}.attention", SELF, 2, 8)],
    "electra": [("electra.encoder.layer.{}.attention.self", SELF, 2, 8)],
    "modernbert": [("model.layers.{}.attn", SELF, 2, 8)],
    "gpt2": [("transformer.h.{}.attn", SELF, 2, 8), ("transformer.h.{}.crossattention", CROSS, 2, 8)],
    "gpt-neox": [("gpt_neox.layers.{}.attention", SELF, 2, 8)],
    "gpt-neox-sequential": [("gpt_neox.layers.{}.attention", SELF, 2, 8)],
    "opt": [("model.decoder.layers.{}.self_attn", SELF, 2, 8)],
    **{
        family: [("model.layers.{}.self_attn", SELF, 1, 8)]
        for family in (
            *("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"),
            *("phi3", "olmo", "olmo2", "cohere"),
        )
    },
    "t5": [
        ("encoder.block.{}.layer.0.SelfAttention", SELF, 2, 8),
        ("decoder.block.{}.layer.0.SelfAttention", SELF, 2, 8),
        ("decoder.block.{}.layer.1.EncDecAttention", CROSS, 2, 8),
    ],
    **{
        family: [
            ("model.encoder.layers.{}.self_attn", SELF, 2, 8),
            ("model.decoder.layers.{}.self_attn", SELF, 2, 8),
            ("model.decoder.layers.{}.encoder_attn", CROSS, 2, 8),
        ]
        for family in ("bart", "whisper")
    },
    "vit": [("vit.layers.{}.attention", SELF, 2, 8)],
    "clip": [
        ("text_model.encoder.layers.{}.self_attn", SELF, 2, 8),
        ("vision_model.encoder.layers.{}.self_attn", SELF, 2, 8),
    ],
}
WITHOUT = ["deberta-v2", "mamba", "mamba2"]
DECODERS = ["gpt2", "gpt-neox", "opt", "llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "cohere"]


def put(model, config=None, *adapters, where=None):
    """Layers with the same config for each adapter at every attention (or those in `where`), the first one active."""
    config = config or PrefixConfig(num_virtual_tokens=P, init_weights=False)
    adapters = adapters or ("a",)
    route, layers = Route(), []
    for name, facts in find_attention(model).items():
        if where is not None and where not in name:
            continue
        layer = PrefixLayer(route, facts)
        layer.attach(model.get_submodule(name))
        layer.set_adapter([adapters[0]])
        for adapter in adapters:
            layer.update_layer(adapter, config)
        layers.append(layer)
    return layers


def host_of(model, layer):
    return model.get_submodule(layer.label)


def switch(layers, on):
    for layer in layers:
        layer.enable_adapters(on)


def activate(layers, *adapters):
    for layer in layers:
        layer.set_adapter(list(adapters))


def padded(family, left):
    """Inputs in which the first row is shorter."""
    batch = cases.inputs(family)
    if "attention_mask" in batch:
        mask = batch["attention_mask"].clone()
        mask[0, :3] = 0
        batch["attention_mask"] = mask if left else mask.flip(1)
    return batch


def in_both(families):
    """Families with each implementation they have: sdpa has no soft cap of scores, as Gemma 2 needs it."""
    return [(f, name) for f in families for name in ("sdpa", "eager") if (f, name) != ("gemma2", "sdpa")]


def with_implementation(family, implementation):
    """The model of a family with this attention implementation."""
    model = build(family)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


# A slow attention that is obviously right. Nothing of ours is in it; a model reaches it by its public name.


def attention_over_prefix(
    module, query, key, value, attention_mask, scaling=None, position_bias=None, softcap=None, **kwargs
):
    prefix = module.the_prefix  # (2, P, H, hd)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = query.shape[1] // key.shape[1]
    result = torch.empty_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            keys = torch.cat([prefix[0, :, h // shared], key[b, h // shared]])
            values = torch.cat([prefix[1, :, h // shared], value[b, h // shared]])
            scores = query[b, h] @ keys.T * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            for added in (position_bias, attention_mask):
                if added is not None:
                    whole = added.expand(query.shape[0], query.shape[1], -1, -1)
                    scores[:, prefix.shape[1] :] += whole[b, h, :, : key.shape[2]]
            result[b, h] = scores.softmax(-1) @ values
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register("attention_over_prefix", attention_over_prefix)
AttentionMaskInterface.register("attention_over_prefix", eager_mask)


def expected(model, layers, batch):
    """What a model without our layers says when its attention is the slow one."""
    slow = copy.deepcopy(model)
    for layer in layers:
        host = host_of(slow, layer)
        values = host.kv_prefix.lntune_prefix["a"]().detach()
        host.kv_prefix.detach(host)
        host.the_prefix = values.view(2, P, *layer._sizes)
    for module in slow.modules():
        if type(module).__name__ in {type(host_of(model, layer)).__name__ for layer in layers}:
            module.__dict__.setdefault("the_prefix", torch.empty(2, 0, *layers[0]._sizes))
    slow.set_attn_implementation("attention_over_prefix")
    for layer in layers:  # an older transformers does not reach the configs of T5's two stacks
        host_of(slow, layer).config._attn_implementation = "attention_over_prefix"
    return output(slow, batch)


class TestFinding:
    @pytest.mark.parametrize("family", ATTENTION)
    def test_the_attention_of_each_family(self, family):
        found = find_attention(cases.build(family))
        rows = {
            name.format(layer): (role, layer, heads, head_dim)
            for name, role, heads, head_dim in ATTENTION[family]
            for layer in range(cases.LAYERS)
        }
        assert {n: (f.role, f.layer, f.heads, f.head_dim) for n, f in found.items()} == rows
        assert all(facts.name == name for name, facts in found.items())

    def test_every_family_is_in_the_tables(self):
        assert cases.FAMILIES.keys() == {*ATTENTION, *WITHOUT}

    @pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
    def test_on_meta_and_under_other_adapters(self, family):
        plain = find_attention(cases.build(family))
        with torch.device("meta"):
            assert find_attention(cases.FAMILIES[family].model()) == plain
        lora = LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2")
        adapted = get_peft_model(cases.build(family), lora)
        assert find_attention(adapted.base_model.model) == plain
        ours = cases.build(family)
        put(ours)
        assert find_attention(ours) == plain

    @pytest.mark.parametrize("family", WITHOUT)
    def test_a_model_without_the_interface(self, family):
        seen = "DebertaV2Attention, DisentangledSelfAttention" if "deberta" in family else "no attention"
        with pytest.raises(UnsupportedError, match=rf"ALL_ATTENTION_FUNCTIONS.*seen: {seen}\. Use norms, LoRA or"):
            find_attention(cases.build(family))

    def test_keys_and_values_of_different_widths(self):
        config = hf.DeepseekV3Config(
            **{**cases._DECODER, "num_key_value_heads": 2},
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=6,
            first_k_dense_replace=2,
        )
        with pytest.raises(UnsupportedError, match=r"such as model.layers.0.self_attn: its keys have 8 entries a head"):
            find_attention(hf.DeepseekV3ForCausalLM(config))

    def test_sizes_that_nobody_tells(self):
        model = cases.build("bert")
        for name in find_attention(model):
            host = model.get_submodule(name)
            del host.key, host.attention_head_size, host.num_attention_heads
            host.config = hf.PreTrainedConfig()
        with pytest.raises(UnsupportedError, match="the number of its key heads, or their width, is not known"):
            find_attention(model)

    def test_a_function_that_is_not_registered(self, monkeypatch):
        monkeypatch.delitem(AttentionInterface._global_mapping, IMPLEMENTATION)
        with pytest.raises(UnsupportedError, match="not among those of transformers: a warning at the import"):
            find_attention(cases.build("bert"))

    def test_a_host_without_the_interface(self):
        facts = next(iter(find_attention(cases.build("bert")).values()))
        host = nn.Linear(2, 2)
        with pytest.raises(UnsupportedError, match=r"Linear.* does not use transformers'"):
            PrefixLayer(Route(), facts).attach(host)
        assert not list(host.children())


class TestFormula:
    @pytest.mark.parametrize("left", [True, False], ids=["left-padded", "right-padded"])
    @pytest.mark.parametrize(("family", "implementation"), few(in_both(ATTENTION)))
    def test_it_is_attention_over_prefix_and_tokens(self, family, implementation, left):
        model, batch = with_implementation(family, implementation), padded(family, left)
        base = output(model, batch)
        layers = put(model)
        got = output(model, batch)
        torch.testing.assert_close(got, expected(model, layers, batch), rtol=1e-5, atol=1e-5)
        assert (got - base).abs().max() > 1e-4

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "bart", "whisper", "vit"])
    def test_without_any_mask(self, family, implementation):
        model, batch = with_implementation(family, implementation), cases.inputs(family)
        batch.pop("attention_mask", None)
        layers = put(model)
        torch.testing.assert_close(output(model, batch), expected(model, layers, batch), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("family", "implementation"), in_both(["mistral", "gemma2", "gemma3", "modernbert"]))
    def test_a_sliding_window_slides_over_the_tokens_only(self, family, implementation):
        model, batch = with_implementation(family, implementation), cases.inputs(family)
        wide = output(model, batch)
        model.config.sliding_window = 3
        assert not torch.equal(output(model, batch), wide) or family == "modernbert"
        layers = put(model)
        torch.testing.assert_close(output(model, batch), expected(model, layers, batch), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("where", ["encoder.layers.1", "decoder.layers.0.self_attn", "encoder_attn"])
    def test_at_some_attention_only(self, where):
        model, batch = build("bart"), padded("bart", left=False)
        layers = put(model, where=where)
        assert 0 < len(layers) < 6
        torch.testing.assert_close(output(model, batch), expected(model, layers, batch), rtol=1e-5, atol=1e-5)

    def test_a_cache_that_holds_the_prefix_says_the_same(self):
        model, ids = build("llama"), cases.inputs("llama")["input_ids"]
        layers = put(model)
        got = output(model, {"input_ids": ids})
        switch(layers, on=False)
        cache = hf.DynamicCache(config=model.config)
        for index, layer in enumerate(layers):
            values = layer.lntune_prefix["a"]().detach().view(2, P, 1, 8).transpose(1, 2)
            cache.update(*(side.expand(2, -1, -1, -1) for side in values), index)
        batch = {
            "input_ids": ids,
            "past_key_values": cache,
            "position_ids": torch.arange(7)[None].expand(2, -1),
            "attention_mask": torch.ones(2, P + 7, dtype=torch.long),
        }
        torch.testing.assert_close(output(model, batch), got, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("family", ["bert", "llama", "t5"])
    def test_attention_weights_are_those_of_the_tokens(self, family):
        model, batch = with_implementation(family, "eager"), cases.inputs(family)
        put(model)
        said = model(**batch, output_attentions=True)
        for weights in said.get("attentions") or (*said.encoder_attentions, *said.decoder_attentions):
            assert weights.shape[-1] == weights.shape[-2]
            assert (weights.sum(-1) < 0.999).all()


class TestState:
    @pytest.mark.parametrize("family", ["bert", "t5"])
    def test_switched_off_or_taken_away_it_is_the_base(self, family):
        model, batch = build(family), cases.inputs(family)
        before, names = output(model, batch), list(model.state_dict())
        configs = {module: module.config for module in model.modules() if hasattr(module, "config")}
        layers = put(model)
        assert not torch.equal(output(model, batch), before)
        switch(layers, on=False)
        assert torch.equal(output(model, batch), before)
        switch(layers, on=True)
        activate(layers, "nobody")
        assert torch.equal(output(model, batch), before)
        for layer in layers:
            layer.detach(host_of(model, layer))
        assert torch.equal(output(model, batch), before)
        assert list(model.state_dict()) == names
        assert all(module.config is config for module, config in configs.items())

    def test_names_of_tensors(self):
        model = build("bert")
        put(model, where="layer.0")
        assert [n for n in model.state_dict() if "kv_prefix" in n] == [
            "bert.encoder.layer.0.attention.self.kv_prefix.lntune_prefix.a.weight"
        ]

    def test_several_active_adapters_stand_side_by_side(self):
        model, batch = build("llama"), padded("llama", left=True)
        layers = put(model, None, "a", "b")
        alone = output(model, batch)
        activate(layers, "a", "b")
        both = output(model, batch)
        assert not torch.allclose(both, alone)
        for layer in layers:
            joined = torch.cat([layer.lntune_prefix[name].weight for name in ("a", "b")], dim=1)
            layer.update_layer("c", PrefixConfig(num_virtual_tokens=2 * P))
            layer.lntune_prefix["c"].weight.data.copy_(joined)
        activate(layers, "c")
        torch.testing.assert_close(output(model, batch), both, rtol=1e-5, atol=1e-6)

    def test_deleting_an_adapter(self):
        model, batch = build("bert"), cases.inputs("bert")
        before = output(model, batch)
        layers = put(model)
        for layer in layers:
            layer.delete_adapter("a")
        assert torch.equal(output(model, batch), before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
    def test_float32_prefix_over_a_half_base(self, family, dtype):
        model = build(family, dtype)
        batch = {n: v.to(dtype) if v.is_floating_point() else v for n, v in cases.inputs(family).items()}
        layers = put(model)
        assert {layer.lntune_prefix["a"].weight.dtype for layer in layers} == {torch.float32}
        got = output(model, batch)
        assert got.dtype == dtype
        wide = copy.deepcopy(model).float()
        exact = output(wide, {n: v.float() if v.is_floating_point() else v for n, v in batch.items()})
        # A few roundings to 8 bits, over a few layers.
        torch.testing.assert_close(got.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())

    def test_delta_dtype_is_kept(self):
        model = build("bert")
        (layer,) = put(model, PrefixConfig(delta_dtype="bfloat16"), where="layer.0")
        assert layer.lntune_prefix["a"].weight.dtype == torch.bfloat16

    def test_under_autocast(self):
        model, batch = build("bert"), cases.inputs("bert")
        put(model)
        exact = output(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = output(model, batch)
        torch.testing.assert_close(got.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
    )
    def test_a_copy_stands_alone(self, copied):
        model, batch = build("t5"), cases.inputs("t5")
        layers = put(model)
        before = output(model, batch)
        twin = copied(model)
        assert torch.equal(output(twin, batch), before)
        for layer in layers:
            host = host_of(twin, layer)
            assert host.config.layer is host.kv_prefix is not layer
            assert host.config.base is not host_of(model, layer).config.base
            nn.init.zeros_(host.kv_prefix.lntune_prefix["a"].weight)
            host.kv_prefix.update_layer("b", PrefixConfig())
        assert len({id(host_of(twin, layer).config.base) for layer in layers}) == len(
            {id(host_of(model, layer).config.base) for layer in layers}
        )
        assert not torch.equal(output(twin, batch), before)
        assert torch.equal(output(model, batch), before)

    def test_it_is_freed(self):
        model = build("bert")
        layer = weakref.ref(put(model)[0])
        del model
        gc.collect()
        assert layer() is None


class TestConfigView:
    def view(self):
        model = build("bert")
        (layer,) = put(model, where="layer.0")
        return model, layer, host_of(model, layer).config

    def test_it_reads_and_writes_the_real_config(self):
        model, _, view = self.view()
        assert isinstance(view, ConfigView)
        assert view.base is model.config
        assert view.hidden_size == 16
        view.something = 3
        assert model.config.something == 3
        with pytest.raises(AttributeError, match="nothing"):
            _ = view.nothing

    def test_it_names_our_function_while_a_prefix_is_at_work(self):
        model, layer, view = self.view()
        assert view._attn_implementation == IMPLEMENTATION
        layer.enable_adapters(False)
        assert view._attn_implementation == model.config._attn_implementation == "sdpa"

    def test_the_model_and_other_modules_see_the_real_one(self):
        model, layer, _ = self.view()
        views = [module for module in model.modules() if isinstance(getattr(module, "config", None), ConfigView)]
        assert views == [host_of(model, layer)]

    def test_set_attn_implementation_later(self):
        model, batch = build("llama"), padded("llama", left=True)
        put(model)
        fast = output(model, batch)
        model.set_attn_implementation("eager")
        said = model(**batch, output_attentions=True)
        assert said.attentions[0] is not None
        torch.testing.assert_close(said.logits, fast, rtol=1e-5, atol=1e-5)

    def test_a_branch_for_eager_is_taken_where_no_prefix_is_at_work(self):
        torch.manual_seed(0)
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=24, vocab_size=40, reorder_and_upcast_attn=True)
        ).eval()
        model.set_attn_implementation("eager")
        batch = cases.inputs("llama")
        before = output(model, batch)
        calls = []
        for module in model.modules():
            if hasattr(module, "_upcast_and_reordered_attn"):
                original = module._upcast_and_reordered_attn
                module._upcast_and_reordered_attn = lambda *a, original=original: calls.append(1) or original(*a)
        layers = put(model)
        switch(layers, on=False)
        assert torch.equal(output(model, batch), before)
        assert len(calls) == 2


class TestTraining:
    @pytest.mark.parametrize("reparametrize", [None, 8])
    @pytest.mark.parametrize("family", ["bert", "llama", "t5", "whisper", "vit"])
    def test_gradients_reach_every_prefix_and_nothing_else(self, family, reparametrize):
        model, batch = build(family), cases.inputs(family)
        put(model, PrefixConfig(num_virtual_tokens=P, reparametrize=reparametrize))
        next(iter(model(**batch).values())).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lntune_prefix" in name)
            assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name

    def test_an_error_on_the_way_leaves_nothing_behind(self):
        model, batch = build("llama"), cases.inputs("llama")
        put(model)
        before = output(model, batch)
        handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        handle.remove()
        assert torch.equal(output(model, batch), before)

    def test_the_network_is_folded_and_files_hold_the_plain_tensor(self):
        model, batch = build("llama"), cases.inputs("llama")
        config = PrefixConfig(num_virtual_tokens=P, reparametrize=8)
        layers = put(model, config)
        before = output(model, batch)
        for prefix in prefixes_of(model, "a"):
            prefix.fold_()
        assert prefixes_of(model, "nobody") == []
        for layer in layers:
            layer.update_layer("b", config, stored=True)
            assert [n for n, _ in layer.named_parameters()] == ["lntune_prefix.a.weight", "lntune_prefix.b.weight"]
        assert torch.equal(output(model, batch), before)

    def test_what_a_process_without_whole_tensors_holds_is_not_folded(self):
        """ZeRO 3 gives whole tensors to the process that writes, and PEFT asks the others for theirs all the same."""
        names = ["embedding", "down.weight", "down.bias", "up.weight", "up.bias"]
        shards = {f"attention.lntune_prefix.{name}": torch.empty(0) for name in names}
        assert folded(shards) == shards

    def test_only_the_active_adapter_is_trained(self):
        layers = put(build("bert"), None, "a", "b")
        for layer in layers:
            assert layer.lntune_prefix["a"].weight.requires_grad
            assert not layer.lntune_prefix["b"].weight.requires_grad


class TestGeneration:
    """Positions and lengths are the base's, so what is generated does not depend on how it is run."""

    @staticmethod
    def generate(model, family, batch, **options):
        batch = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
        if family == "gpt2":
            batch["encoder_hidden_states"] = batch["encoder_hidden_states"].repeat_interleave(
                options.get("num_beams", 1), 0
            )
        return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)

    @pytest.mark.parametrize(("family", "implementation"), few(in_both([*DECODERS, "t5", "bart", "whisper"])))
    def test_with_and_without_cache(self, family, implementation):
        model, batch = with_implementation(family, implementation), padded(family, left=True)
        if "sliding_window" in vars(model.config):
            model.config.sliding_window = 4
        scored = {"return_dict_in_generate": True, "output_scores": True}
        base = self.generate(model, family, batch, **scored)
        put(model)
        cached = self.generate(model, family, batch, **scored)
        whole = self.generate(model, family, batch, use_cache=False, **scored)
        assert torch.equal(cached.sequences, whole.sequences)
        assert cached.sequences.shape == base.sequences.shape
        for one, other in zip(cached.scores, whole.scores, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(cached.scores[0], base.scores[0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("family", ["llama", "gpt-neox", "gemma3"])
    def test_left_padding_changes_nothing(self, family):
        model, ids = build(family), cases.inputs(family)["input_ids"][:1]
        put(model)
        alone = self.generate(model, family, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        longer = nn.functional.pad(ids, (3, 0))
        mask = nn.functional.pad(torch.ones_like(ids), (3, 0))
        batch = {"input_ids": longer, "attention_mask": mask}
        assert torch.equal(self.generate(model, family, batch)[:, 3:], alone)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
    def test_beams_and_caches(self, family, cache):
        model, batch = build(family), cases.inputs(family)
        put(model)
        beams = self.generate(model, family, batch, num_beams=3, use_cache=False)
        implementation = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(self.generate(model, family, batch, num_beams=3, **implementation), beams)


class TestRoute:
    NAMES = ("b", BASE, "a")

    def adapted(self, family, dtype=torch.float32):
        """Two adapters of different lengths, and one that is at some places only."""
        model = build(family, dtype)
        layers = put(model, None, "a")
        for index, layer in enumerate(layers):
            layer.update_layer("b", PrefixConfig(num_virtual_tokens=P + 2, init_weights=False, reparametrize=4))
            if index % 2:
                layer.update_layer("c", PrefixConfig(num_virtual_tokens=1, init_weights=False))
        return model, layers, layers[0]._route

    @staticmethod
    def routed(model, route, names, batch, adapters=("a", "b", "c"), expansions=(1,)):
        with route.serving(names, order=[BASE, *adapters]), route.expanding(set(expansions)):
            return output(model, batch)

    def one_by_one(self, model, layers, names, batch):
        rows = []
        for row, name in enumerate(names):
            activate(layers, name)
            rows.append(output(model, {key: value[row : row + 1] for key, value in batch.items()}))
        activate(layers, "a")
        return torch.cat(rows)

    def batch(self, family, left=True):
        batch = cases.inputs(family, batch=3)
        if "attention_mask" in batch:
            batch["attention_mask"][0, :3] = 0
            batch["attention_mask"] = batch["attention_mask"] if left else batch["attention_mask"].flip(1)
        return batch

    @pytest.mark.parametrize(
        ("family", "implementation"),
        in_both(["bert", "distilbert", "gpt2", "llama", "gemma2", "gemma3", "phi3", "t5", "bart", "whisper", "vit"]),
    )
    def test_row_i_is_what_its_adapter_alone_says(self, family, implementation):
        model, layers, route = self.adapted(family)
        model.set_attn_implementation(implementation)
        batch = self.batch(family)
        for names in (self.NAMES, ("c", "b", BASE)):
            mixed = self.routed(model, route, names, batch)
            torch.testing.assert_close(mixed, self.one_by_one(model, layers, names, batch), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("family", ["bert", "llama", "t5"])
    def test_in_bfloat16(self, family):
        model, layers, route = self.adapted(family, torch.bfloat16)
        batch = self.batch(family)
        mixed, alone = self.routed(model, route, self.NAMES, batch), self.one_by_one(model, layers, self.NAMES, batch)
        wide = copy.deepcopy(model).float()
        exact = self.one_by_one(wide, [host_of(wide, layer).kv_prefix for layer in layers], self.NAMES, batch)
        # Six roundings to 8 bits each, as over a half base without a route; so they are twelve apart at the most.
        for found in (mixed, alone):
            torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())

    @pytest.mark.parametrize("name", ["b", "c", BASE])
    def test_one_name_for_all_rows(self, name):
        model, layers, route = self.adapted("llama")
        batch = self.batch("llama")
        got = self.routed(model, route, name, batch)
        torch.testing.assert_close(got, self.one_by_one(model, layers, [name] * 3, batch), rtol=1e-5, atol=1e-6)

    def test_beams(self):
        model, layers, route = self.adapted("llama")
        batch = cases.inputs("llama", batch=2)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
        with route.serving(["b", "a"], order=[BASE, "a", "b", "c"]), route.expanding({1, 2}):
            mixed = model.generate(**batch, **options)
        for row, name in enumerate(["b", "a"]):
            activate(layers, name)
            alone = model.generate(**{key: value[row : row + 1] for key, value in batch.items()}, **options)
            assert torch.equal(mixed[row : row + 1], alone)

    def test_a_changed_prefix_is_seen(self):
        model, layers, route = self.adapted("bert")
        batch = self.batch("bert")
        before = self.routed(model, route, self.NAMES, batch)
        with torch.no_grad():
            layers[0].lntune_prefix["a"].weight.add_(3)
        after = self.routed(model, route, self.NAMES, batch)
        assert torch.equal(after[:2], before[:2])
        assert not torch.equal(after[2], before[2])

    def test_switched_off_it_is_the_base(self):
        model, layers, route = self.adapted("llama")
        batch = self.batch("llama")
        switch(layers, on=False)
        base = output(model, batch)
        assert torch.equal(self.routed(model, route, self.NAMES, batch), base)

    def test_stacks_made_for_inference_serve_gradients_too(self):
        model, _, route = self.adapted("bert")
        batch = self.batch("bert")
        with torch.inference_mode(), route.serving(self.NAMES, order=[BASE, "a", "b", "c"]):
            model(**batch)
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        with route.serving(self.NAMES, order=[BASE, "a", "b", "c"]):
            model(inputs_embeds=embedded, attention_mask=batch["attention_mask"])[0].sum().backward()
        assert embedded.grad.any()

    def test_a_batch_of_another_length(self):
        model, _, route = self.adapted("bert")
        with pytest.raises(RoutingError, match=r"got 2 and 3 respectively. \(Seen in bert.encoder.layer.0.attention"):
            self.routed(model, route, ["a", "b"], self.batch("bert"))


@pytest.mark.full  # compiling takes long; tests/tuner/test_unified.py does it in the quick suite
@pytest.mark.parametrize("mode", ["running", "switched off", "routed"])
@pytest.mark.parametrize("family", ["bert", "llama", "gemma3", "t5", "gpt2"])
def test_one_graph(family, mode):
    """`fullgraph` raises at a break."""
    torch._dynamo.reset()
    model, batch = build(family), cases.inputs(family)
    layers = put(model)
    if mode == "switched off":
        switch(layers, on=False)

    def run(function):
        with torch.no_grad():
            if mode != "routed":
                return function(**batch)[0]
            with layers[0]._route.serving(["a", BASE], order=[BASE, "a"]):
                return function(**batch)[0]

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), run(model), rtol=1e-6, atol=1e-6)


def fake_flash(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """What flash attention computes: causal, counted from the right, over the tokens that a 2-D mask shows."""
    assert module.config._attn_implementation == "flash_attention_2"
    assert next(iter(module.children())) is module.q_proj
    assert sliding_window is None
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], keys)
        seen = seen & attention_mask.bool()[:, None, None, :]
    key, value = (side.repeat_interleave(query.shape[1] // key.shape[1], 1) for side in (key, value))
    result = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return result.transpose(1, 2).contiguous(), None


class TestOtherImplementations:
    @staticmethod
    def flash(monkeypatch, family="llama"):
        """A model with a prefix, before and after it believes to have flash attention."""
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", fake_flash)
        model = build(family)
        layers = put(model)
        fast = copy.deepcopy(model)
        fast.config._attn_implementation = "flash_attention_2"
        return model, fast, layers

    @pytest.mark.parametrize("left", [True, False, None], ids=["left-padded", "right-padded", "whole"])
    def test_flash(self, monkeypatch, left):
        model, fast, _ = self.flash(monkeypatch)
        batch = cases.inputs("llama") if left is None else padded("llama", left)
        torch.testing.assert_close(output(fast, batch), output(model, batch), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("left", [True, None], ids=["padded", "whole"])
    def test_flash_routed(self, monkeypatch, left):
        model, fast, layers = self.flash(monkeypatch)
        batch = cases.inputs("llama") if left is None else padded("llama", left)
        said = []
        for each in (model, fast):
            with host_of(each, layers[0]).kv_prefix._route.serving([BASE, "a"], order=[BASE, "a"]):
                said.append(output(each, batch))
        torch.testing.assert_close(said[1], said[0], rtol=1e-5, atol=1e-5)

    def test_flash_with_a_sliding_window(self, monkeypatch):
        _, fast, _ = self.flash(monkeypatch, "mistral")
        with pytest.raises(UnsupportedError, match=r"layers.0.self_attn: .* a sliding window in flash.*\"sdpa\""):
            output(fast, cases.inputs("mistral"))

    @pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens_q"])
    def test_flash_with_packed_sequences(self, monkeypatch, told):
        _, fast, _ = self.flash(monkeypatch)
        positions = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
        lengths = {"position_ids": torch.arange(7)[None], "cu_seq_lens_q": torch.tensor([0, 4, 7])}
        batch = {"input_ids": cases.inputs("llama")["input_ids"][:1], "use_cache": False}
        with pytest.raises(UnsupportedError, match="several sequences packed into one in flash_attention_2"):
            output(fast, batch | (positions if told == "position_ids" else lengths))

    @pytest.mark.parametrize(
        ("implementation", "arguments", "problem"),
        [
            ("flex_attention", {}, "flex_attention, whose block masks"),
            ("sdpa", {"attention_mask": object()}, "sdpa, whose block masks"),
            ("sdpa", {"cache": object()}, r"continuous batching, with its paged cache. Use model.generate"),
            ("paged|eager", {}, "continuous batching"),
            (
                "sdpa",
                {"indices": torch.zeros(1)},
                "attention to chosen keys only. Leave this module out with exclude_modules",
            ),
        ],
    )
    def test_what_leaves_no_room(self, implementation, arguments, problem):
        model = build("llama")
        layers = put(model)
        host = host_of(model, layers[0])
        model.config._attn_implementation = implementation
        states = [torch.randn(1, heads, 4, 8) for heads in (2, 1, 1)]
        run = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
        with pytest.raises(UnsupportedError, match=f"model.layers.0.self_attn: a prefix does not work with {problem}"):
            run(host, *states, **{"attention_mask": None, **arguments})

    def test_keys_of_other_sizes_than_were_found(self):
        model = build("llama")
        host = host_of(model, put(model)[0])
        states = [torch.randn(1, 2, 4, 8) for _ in range(3)]
        with pytest.raises(UnsupportedError, match="to have 1 key heads of width 8, but it attends over 2 of width 8"):
            ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION](host, *states, None)

    def test_an_implementation_of_a_user(self):
        seen = []

        def mine(module, query, key, value, attention_mask, **kwargs):
            seen.append((module.config._attn_implementation, key.shape[2], attention_mask.shape[-1]))
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register("mine", mine)
        AttentionMaskInterface.register("mine", AttentionMaskInterface()["sdpa"])
        model, batch = build("llama"), cases.inputs("llama")
        put(model)
        before = output(model, batch)
        model.set_attn_implementation("mine")
        torch.testing.assert_close(output(model, batch), before, rtol=1e-6, atol=1e-6)
        assert seen == [("mine", P + 7, P + 7)] * 2

    def test_a_table_of_a_file_of_its_own(self):
        # Doge makes a table of its own, and keeps it in its modeling file.
        config = hf.DogeConfig(**{**cases._DECODER, "num_key_value_heads": 1})
        torch.manual_seed(0)
        model = hf.DogeForCausalLM(config).eval().requires_grad_(False)
        layers = put(model)
        table = host_of(model, layers[0]).config.interface.functions
        assert table is not ALL_ATTENTION_FUNCTIONS
        batch = cases.inputs("llama")
        before = output(model, batch)
        twin = copy.deepcopy(model)
        assert host_of(twin, layers[0]).config.interface.functions is table
        assert torch.equal(output(twin, batch), before)
        switch(layers, on=False)
        assert not torch.equal(output(model, batch), before)
