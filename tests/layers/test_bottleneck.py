"""Bottlenecks beside sub-layers: against blocks written out, and all that may be done to a model that has them."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_lntune.architectures.sublayers import SUBLAYER_ROLES, find_sublayers
from peft_lntune.config.bottleneck import BottleneckConfig
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import ConfigError, RoutingError, UnsupportedError
from peft_lntune.layers.bottleneck import BottleneckLayer, check_combine, combine_bottlenecks
from peft_lntune.routing.entries import Entries
from peft_lntune.routing.route import BASE, Route
from tests.adapted import DTYPES, assert_unchanged, build, inputs, output, said, snapshot
from tests.cases import FAMILIES, LAYERS, few
from tests.tolerance import assert_close

POSITIONS = ["sequential", "parallel"]
ALL = list(SUBLAYER_ROLES)
FEW = ["bert", "llama", "gpt2", "t5", "opt", "whisper"]  # norm last, norm first, fused, three sub-layers, flat tokens


# Putting layers into a model, as the tuner does.


def put(model: nn.Module, std: float = 0.3, **adapters: BottleneckConfig) -> list[BottleneckLayer]:
    """Layers with these adapters beside the sub-layers of a model; the first adapter is active."""
    route, layers, modules = Route(), [], base_modules(model)
    for place in find_sublayers(modules):
        wanted = {name: config for name, config in adapters.items() if place.role in config.roles}
        if not wanted:
            continue
        layer = BottleneckLayer.of(route, place, modules)
        layer.attach(modules[place.exit.rpartition(".")[0]])
        layer.set_adapter(next(iter(adapters)))
        for name, config in wanted.items():
            layer.update_layer(name, config)
        layers.append(layer.eval())
    if std:
        fill(layers, std)
    return layers


@torch.no_grad()
def fill(layers: list[BottleneckLayer], std: float = 0.3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


@contextmanager
def measured(model: nn.Module, layers: list[BottleneckLayer]) -> Iterator[None]:
    """Within a route, as the tuner does: where each layer has the samples is measured before the model runs."""
    modules = dict(model.named_modules())
    places = {layer.label: modules[layer.label] for layer in layers}
    with ExitStack() as stack:
        for detour in Entries(model, layers[0]._route, lambda: places).detours(modules, places):
            detour.patch()
            stack.callback(detour.restore)
        yield


def activate(layers: list[BottleneckLayer], *names: str) -> None:
    for layer in layers:
        layer.set_adapter(list(names))


def enable(layers: list[BottleneckLayer], enabled: bool) -> None:
    for layer in layers:
        layer.enable_adapters(enabled)


def config(position: str = "sequential", **options) -> BottleneckConfig:
    return BottleneckConfig(**{"position": position, "roles": ALL, "bottleneck_size": 3, **options})


def layers_of(model: nn.Module) -> list[BottleneckLayer]:
    return [module for module in model.modules() if isinstance(module, BottleneckLayer)]


# The same, written out. What x and h are is told by modules around the leaves, in words of each model's own.

LLAMA = {"model.layers.*.self_attn": "o_proj", "model.layers.*.mlp": "down_proj"}
NEOX = {"gpt_neox.layers.*.attention": "dense", "gpt_neox.layers.*.mlp": "dense_4h_to_h"}
SEQ2SEQ = {
    "model.encoder.layers.*.self_attn": "out_proj",
    "model.encoder.layers.*": "fc2",
    "model.decoder.layers.*.self_attn": "out_proj",
    "model.decoder.layers.*.encoder_attn": "out_proj",
    "model.decoder.layers.*": "fc2",
}


def bert(body: str, *more: str) -> dict[str, str]:
    return {f"{body}.encoder.layer.*.{path}output": "dense" for path in ("attention.", "", *more)}


# The module around a sub-layer, and below it the leaf beside whose output the adapter is.
AROUND: dict[str, dict[str, str]] = {
    "bert": bert("bert"),
    "bert-crossed": bert("bert", "crossattention."),
    "roberta": bert("roberta"),
    "xlm-roberta": bert("roberta"),
    "electra": bert("electra"),
    "deberta-v2": bert("deberta"),
    "distilbert": {
        "distilbert.transformer.layer.*.attention": "out_lin",
        "distilbert.transformer.layer.*.ffn": "lin2",
    },
    "modernbert": {"model.layers.*.attn": "Wo", "model.layers.*.mlp": "Wo"},
    "gpt2": {f"transformer.h.*.{path}": "c_proj" for path in ("attn", "crossattention", "mlp")},
    "gpt-neox": NEOX,
    "gpt-neox-sequential": NEOX,
    "opt": {"model.decoder.layers.*.self_attn": "out_proj", "model.decoder.layers.*": "fc2"},
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo", "olmo2"], LLAMA
    ),
    "cohere": LLAMA,
    "mixtral": {"model.layers.*.self_attn": "o_proj"},
    "mamba": {},
    "mamba2": {},
    "t5": {
        "encoder.block.*.layer.0.SelfAttention": "o",
        "encoder.block.*.layer.1.DenseReluDense": "wo",
        "decoder.block.*.layer.0.SelfAttention": "o",
        "decoder.block.*.layer.1.EncDecAttention": "o",
        "decoder.block.*.layer.2.DenseReluDense": "wo",
    },
    "bart": SEQ2SEQ,
    "whisper": SEQ2SEQ,
    "vit": {"vit.layers.*.attention": "o_proj", "vit.layers.*.mlp": "fc2"},
    "clip": {
        f"{tower}_model.encoder.layers.*.{path}": leaf
        for tower in ("text", "vision")
        for path, leaf in (("self_attn", "out_proj"), ("mlp", "fc2"))
    },
}

Added = Callable[[Tensor, Tensor], Tensor]  # (x, h) -> what is added to h


def write_out(model: nn.Module, family: str, added: dict[str, Added]) -> nn.Module:
    """Change a plain model so that each sub-layer answers h + added(x, h); keyed by the leaf's name."""
    seen = set()
    for pattern, leaf in AROUND[family].items():
        for layer in range(LAYERS):
            around = model.get_submodule(pattern.replace("*", str(layer)))
            seen.add(name := f"{pattern.replace('*', str(layer))}.{leaf}")
            if leaf == "dense" and pattern.endswith("output"):
                _write_norm_last(around, added[name])
            elif leaf == "fc2" and not pattern.endswith("mlp"):
                _write_loose_leaves(around, added[name])
            else:
                around.register_forward_hook(_write_module(added[name]), with_kwargs=True)
    assert seen == added.keys()
    return model


def _write_norm_last(around: nn.Module, added: Added) -> None:
    def forward(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        x, h = input_tensor, around.dense(hidden_states)
        return around.LayerNorm(x + (h + added(x, h)))

    around.forward = forward


def _write_module(added: Added) -> Callable:
    def hook(module, args, kwargs, answer):
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(answer, tuple):
            return (answer[0] + added(x, answer[0]), *answer[1:])
        return answer + added(x, answer)

    return hook


def _write_loose_leaves(block: nn.Module, added: Added) -> None:
    first, last, seen = block.fc1.forward, block.fc2.forward, {}

    def enter(x):
        seen["x"] = x
        return first(x)

    def leave(inner):
        h = last(inner)
        return h + added(seen.pop("x"), h)

    block.fc1.forward, block.fc2.forward = enter, leave


def formula(layer: BottleneckLayer, *names: str) -> Added:
    """s U f(D .) of these adapters, summed, with a relu."""

    def added(x: Tensor, h: Tensor) -> Tensor:
        total = torch.zeros_like(h)
        for name in names:
            recipe = layer._recipes[name]
            read = x if recipe.position == "parallel" else h
            down, up = layer.lntune_down[name], layer.lntune_up[name]
            inner = (read.to(down.weight.dtype) @ down.weight.T + down.bias).clamp(min=0)
            total = total + recipe.scale * (inner @ up.weight.T + up.bias)
        return total

    return added


def written(family: str, layers: list[BottleneckLayer], *names: str) -> nn.Module:
    return write_out(build(family), family, {layer.label: formula(layer, *names) for layer in layers})


def close(actual, expected, factor=1.0):
    torch.testing.assert_close(actual, expected, rtol=1e-5 * factor, atol=2e-6 * factor)


ADAPTABLE = [family for family in FAMILIES if AROUND[family]]


def test_the_table_has_every_family():
    assert AROUND.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", few(ADAPTABLE))
class TestEveryFamily:
    @pytest.mark.parametrize("position", POSITIONS)
    def test_as_written_out(self, family, position):
        model, batch = build(family), inputs(family)
        base = output(model, batch)
        layers = put(model, a=config(position, scale=0.7))
        reference = written(family, layers, "a")
        answer, expected = said(model, batch), said(reference, batch)
        close(answer, expected)
        assert not torch.allclose(answer, base)
        weights = [parameter for layer in layers for parameter in layer.parameters()]
        loss = [y.tanh().sum() for y in (answer, expected)]
        # What only a model's other outputs depend on has no gradient in either.
        gradients = [torch.autograd.grad(value, weights, allow_unused=True) for value in loss]
        assert any(gradient is not None for gradient in gradients[0])
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                close(ours, theirs, 20)

    def test_rows_of_many_adapters_and_of_the_base(self, family):
        model, batch = build(family), inputs(family, batch=5)
        base = by_sample(model, batch)
        # Sizes, positions and activations that differ, a learned scale, and one adapter that is not everywhere.
        adapters = {
            "a": config("sequential", bottleneck_size=2),
            "b": config("parallel", bottleneck_size=5, scale="learned"),
            "c": config("sequential", activation="tanh", roles=["attention"], scale=-0.5),
            "d": config("sequential", bottleneck_size=4, roles=["attention"]),
        }
        layers = put(model, **adapters)
        names = ["b", "__base__", "a", "c", "d"]
        with layers[0]._route.serving(names, order=[BASE, *adapters]), measured(model, layers):
            mixed = by_sample(model, batch)
        if family == "mixtral":  # an expert's product is of as many rows as it gets, and so depends on the others
            assert_close(mixed[1], base[1])
        else:
            assert torch.equal(mixed[1], base[1])
        for row, name in enumerate(names):
            if name != "__base__":
                activate(layers, name)
                close(mixed[row], by_sample(model, batch)[row], 5)


@torch.no_grad()
def by_sample(model: nn.Module, batch) -> Tensor:
    """What the model says, a row a sample; CLIP's logits are of each image with each text."""
    answer = model(**batch)
    return answer["text_embeds"] if "text_embeds" in answer else next(iter(answer.values()))


def routed(model: nn.Module, layers: list[BottleneckLayer], batch, names, expansions=(1,), **options) -> Tensor:
    adapters = list(dict.fromkeys(name for layer in layers for name in layer.lntune_down))
    route = layers[0]._route
    with route.serving(names, order=[BASE, *adapters]), route.expanding(set(expansions)):
        return output(model, batch, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
class TestDtypes:
    def test_identity(self, dtype, position):
        model, batch = build("bert", dtype), inputs("bert", dtype)
        base = output(model, batch)
        layers = put(model, std=0, a=config(position))
        assert torch.equal(output(model, batch), base)
        assert torch.equal(routed(model, layers, batch, ["a", "__base__", "a"]), base)
        wide = torch.promote_types(dtype, torch.float32)
        assert {parameter.dtype for parameter in layers[0].parameters()} == {wide}

    def test_the_sum_is_made_wide_and_rounded_once(self, dtype, position):
        entry, exit = nn.Linear(6, 8).to(dtype), nn.Linear(8, 6).to(dtype)
        host = nn.Sequential(entry, exit)
        x = torch.randn(2, 6, dtype=dtype)
        h = exit(entry(x))
        layer = alone(host, config(position), fill_in=True)
        answer, added = exit(entry(x)), formula(layer, "a")(x, h.to(layer.lntune_down["a"].weight.dtype))
        assert answer.dtype == dtype
        torch.testing.assert_close(answer, h + added.to(dtype))


def alone(host: nn.Sequential, *configs: BottleneckConfig, fill_in: bool = False, **options) -> BottleneckLayer:
    """A layer around the first and last module of a sequence, with adapters a, b, ..., of which a is active."""
    layer = BottleneckLayer(Route(), "end", host[0], host[-1], "ffn")
    layer.attach(host)
    layer.set_adapter("a")
    for name, one in zip("abcdef", configs, strict=False):
        layer.update_layer(name, one, **options)
    if fill_in:
        fill([layer])
    return layer


class Block(nn.Sequential):
    """A sequence that runs its own modules and not the layer beside them."""

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_children():
            if name.isdigit():
                x = module(x)
        return x


def block(*widths: int) -> Block:
    """An FFN that answers in the width it is asked in."""
    torch.manual_seed(0)
    first, inner = widths or (6, 8)
    return Block(nn.Linear(first, inner), nn.ReLU(), nn.Linear(inner, first)).requires_grad_(False)


class TestAdapters:
    def test_names_and_shapes(self):
        host = Block(nn.Linear(6, 8), nn.Linear(8, 4))
        before = set(dict(host.named_parameters()))
        layer = alone(host, config("parallel"), config("sequential", scale="learned", bottleneck_size=2))
        shapes = {name: tuple(p.shape) for name, p in host.named_parameters() if name not in before}
        assert shapes == {
            "ffn_bottleneck.lntune_down.a.weight": (3, 6),
            "ffn_bottleneck.lntune_down.a.bias": (3,),
            "ffn_bottleneck.lntune_up.a.weight": (4, 3),
            "ffn_bottleneck.lntune_up.a.bias": (4,),
            "ffn_bottleneck.lntune_down.b.weight": (2, 4),
            "ffn_bottleneck.lntune_down.b.bias": (2,),
            "ffn_bottleneck.lntune_up.b.weight": (4, 2),
            "ffn_bottleneck.lntune_up.b.bias": (4,),
            "ffn_bottleneck.lntune_scale.b.weight": (),
        }
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
            f"lntune_{part}.a.{tensor}" for part in ("down", "up") for tensor in ("weight", "bias")
        ]
        assert "lntune.BottleneckLayer" in repr(host)

    def test_a_child_is_named_by_its_role(self):
        model = build("t5")
        put(model, a=config())
        put_in = {name for module in model.modules() for name in module._modules if name.endswith("_bottleneck")}
        assert put_in == {f"{role}_bottleneck" for role in SUBLAYER_ROLES}

    def test_size_follows_the_model(self):
        layers = put(build("bert"), a=BottleneckConfig(), b=BottleneckConfig(position="parallel"))
        assert {tuple(layer.lntune_down["a"].weight.shape) for layer in layers} == {(1, 16)}
        assert {tuple(layer.lntune_down["b"].weight.shape) for layer in layers} == {(8, 16)}

    def test_not_the_identity_where_asked(self):
        host, x = block(), torch.randn(2, 6)
        base = host(x)
        alone(host, config(init_weights=False))
        assert not torch.allclose(host(x), base)

    @pytest.mark.parametrize("family", FEW)
    def test_several_active_ones_are_summed_and_read_the_base(self, family):
        model, batch = build(family), inputs(family)
        layers = put(model, a=config("sequential"), b=config("parallel", bottleneck_size=2, scale=0.5))
        activate(layers, "a", "b")
        close(output(model, batch), output(written(family, layers, "a", "b"), batch))
        activate(layers, "b")
        close(output(model, batch), output(written(family, layers, "b"), batch))

    def test_an_adapter_of_another_kind_does_nothing_here(self):
        host, x = block(), torch.randn(2, 6)
        base = host(x)
        layer = alone(host, config("parallel"), fill_in=True)
        layer.set_adapter(["other"])
        assert torch.equal(host(x), base)
        layer.set_adapter(["other", "a"])
        assert not torch.equal(host(x), base)

    def test_deleted(self):
        host, x = block(), torch.randn(2, 6)
        base = host(x)
        layer = alone(host, config("parallel"), config(), fill_in=True)
        assert hooks(host) == 2
        with pytest.warns(UserWarning, match="a was active which is now deleted"):
            layer.delete_adapter("a")
        assert hooks(host) == 1  # nothing reads x any more
        assert {name.split(".")[1] for name, _ in layer.named_parameters()} == {"b"}
        layer.set_adapter([])
        layer.delete_adapter("b")
        assert torch.equal(host(x), base)
        assert not list(layer.parameters())

    def test_made_again_under_its_name(self):
        host = block()
        layer = alone(host, config("parallel", scale="learned"))
        layer.update_layer("a", config(bottleneck_size=5))
        assert "a" not in layer.lntune_scale
        assert layer.lntune_down["a"].weight.shape == (5, 6)
        assert hooks(host) == 1

    def test_a_learned_scale_learns(self):
        host, x = block(), torch.randn(2, 6)
        layer = alone(host, config(scale="learned"), fill_in=True)
        with torch.no_grad():
            layer.lntune_scale["a"].weight.fill_(0.25)
        base = host[2](host[1](host[0](x)))  # with the adapter: hooks are on the leaf
        layer.enable_adapters(False)
        h = host(x)
        layer.enable_adapters(True)
        torch.testing.assert_close(base, h + 0.25 * formula(layer, "a")(x, h))
        base.sum().backward()
        torch.testing.assert_close(layer.lntune_scale["a"].weight.grad, formula(layer, "a")(x, h).sum().detach())

    def test_dropout_in_training_only(self):
        host, x = block(), torch.randn(64, 6)
        layer = alone(host, config(dropout=0.5, bottleneck_size=32, activation="identity"), fill_in=True)
        host.eval()
        quiet = host(x)
        assert torch.equal(host(x), quiet)
        host.train()
        torch.manual_seed(1)
        noisy = host(x)
        torch.manual_seed(1)
        layer.enable_adapters(False)
        h = host(x)
        layer.enable_adapters(True)
        inner = F.dropout(layer.lntune_down["a"](h), 0.5)
        torch.testing.assert_close(noisy, h + layer.lntune_up["a"](inner))
        assert not torch.allclose(noisy, quiet)

    def test_for_inference_nothing_requires_a_gradient(self):
        layer = alone(block(), config(inference_mode=True))
        assert not any(parameter.requires_grad for parameter in layer.parameters())

    def test_dtype_as_asked(self):
        layer = alone(block(), config(delta_dtype="bfloat16"))
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}

    def test_beside_leaves_on_meta(self):
        with torch.device("meta"):
            host = Block(nn.Linear(6, 8), nn.Linear(8, 6))
        layer = alone(host, config(scale="learned"))
        assert all(parameter.is_meta for parameter in layer.parameters())

    def test_beside_integers(self):
        host = block()
        host[2].weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
        layer = alone(host, config())
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}

    def test_a_leaf_of_unknown_width(self):
        host = Block(nn.Linear(6, 8), nn.ReLU())
        with pytest.raises(
            UnsupportedError, match=r"a bottleneck at end needs to know how wide .* but ReLU has neither"
        ):
            alone(host, config())
        assert hooks(host) == 0


def children(module: nn.Module) -> list[BottleneckLayer]:
    return [child for child in module.children() if isinstance(child, BottleneckLayer)]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class TestRoute:
    @pytest.mark.parametrize("family", FEW)
    @pytest.mark.parametrize("position", POSITIONS)
    def test_one_name_for_all_rows(self, family, position):
        model, batch = build(family), inputs(family)
        base = output(model, batch)
        layers = put(model, a=config(), b=config(position, scale="learned"))
        alike = routed(model, layers, batch, "b")
        assert torch.equal(routed(model, layers, batch, "__base__"), base)
        activate(layers, "b")
        close(alike, output(model, batch))

    @pytest.mark.parametrize("role", ["attention", "ffn"])
    def test_flat_tokens_alone(self, role):
        """OPT's FFN sees (samples * tokens, d); with no other layer in the model to say how many tokens there are."""
        model, batch = build("opt"), inputs("opt")
        layers = put(model, a=config("parallel", roles=[role]), b=config(roles=[role]))
        names = ["b", "__base__", "a"]
        mixed = routed(model, layers, batch, names)
        for row, name in enumerate(names):
            if name != "__base__":
                activate(layers, name)
                close(mixed[row], output(model, batch)[row])

    @pytest.mark.parametrize("family", ["llama", "opt", "bart"])
    @pytest.mark.parametrize("position", POSITIONS)
    def test_beams(self, family, position):
        model, batch = build(family), inputs(family)
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        layers = put(model, std=0.6, a=config(position), b=config(position, bottleneck_size=5))
        options = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        names = ["b", "a", "__base__"]
        route = layers[0]._route
        with route.serving(names, order=[BASE, "a", "b"]), route.expanding({1, 2}):
            mixed = model.generate(**batch, **options)
        for row, name in enumerate(names):
            activate(layers, *([] if name == "__base__" else [name]))
            assert torch.equal(mixed[row], model.generate(**batch, **options)[row])

    def test_names_of_another_number(self):
        model, batch = build("bert"), inputs("bert")
        layers = put(model, a=config("parallel"))
        with pytest.raises(RoutingError, match=r"attention\.output\.dense"):
            routed(model, layers, batch, ["a", "a"])
        assert torch.equal(output(model, batch), output(model, batch))

    def test_disabled(self):
        model, batch = build("bert"), inputs("bert")
        base = output(model, batch)
        layers = put(model, a=config("parallel"))
        enable(layers, False)
        assert torch.equal(routed(model, layers, batch, ["a"] * 3), base)

    @pytest.mark.parametrize("position", POSITIONS)
    def test_no_more_operations_for_more_adapters(self, position):
        host = block()
        layer = alone(host, *[config(position, bottleneck_size=size) for size in range(1, 7)], fill_in=True)
        layer.requires_grad_(False)  # stacks of what can be trained are made at every call
        x = torch.randn(6, 3, 6)
        counts = []
        for names in (["a", "b"] * 3, list("abcdef")):
            with layer._route.serving(names, order=[BASE, *"abcdef"]), torch.no_grad():
                host(x)  # stacks are made
                with Operations() as counted:
                    host(x)
            counts.append(counted.number)
        assert counts[0] == counts[1] < 30

    def test_stacks_follow_what_they_were_made_of(self):
        host, x = block(), torch.randn(2, 3, 6)
        layer = alone(host, config(scale="learned"), config(), fill_in=True)
        order = ["a", "b"]
        seen = [routed_alone(host, layer, x, order)]
        with torch.no_grad():
            layer.lntune_up["b"].weight.mul_(2)
        seen.append(routed_alone(host, layer, x, order))
        with torch.no_grad():
            layer.lntune_scale["a"].weight.mul_(2)
        seen.append(routed_alone(host, layer, x, order))
        layer.update_layer("b", config(init_weights=False, scale=2.0))
        assert layer._cache is None  # its tensors may lie where those of the old one lay
        seen.append(routed_alone(host, layer, x, order))
        same = [[torch.equal(one[row], two[row]) for row in (0, 1)] for one, two in pairwise(seen)]
        assert same == [[True, False], [False, True], [True, False]]
        layer.set_adapter("b")
        with torch.no_grad():
            close(seen[-1][1], host(x)[1])

    def test_a_layer_without_the_adapters_of_the_batch(self):
        host, x = block(), torch.randn(2, 3, 6)
        base = host(x)
        layer = alone(host, config("parallel"), fill_in=True)
        with layer._route.serving(["other", "__base__"], order=[BASE, "other", "a"]):
            assert torch.equal(host(x), base)
        layer.delete_adapter("a")
        with layer._route.serving(["other", "__base__"], order=[BASE, "other"]):
            assert torch.equal(host(x), base)


def routed_alone(host: nn.Module, layer: BottleneckLayer, x: Tensor, names: list[str]) -> Tensor:
    with layer._route.serving(names, order=[BASE, *layer.lntune_down]), torch.no_grad():
        return host(x)


class Operations(TorchDispatchMode):
    """Counts the operations that are run."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


class TestCopies:
    @pytest.mark.parametrize("position", POSITIONS)
    def test_hooks_of_a_copy_act_on_the_copy(self, position):
        model, batch = build("bert"), inputs("bert")
        base = output(model, batch)
        layers = put(model, a=config(position), b=config())
        before = output(model, batch)
        copied = copy.deepcopy(model)
        assert torch.equal(output(copied, batch), before)
        others = layers_of(copied)
        fill(others, seed=5)
        changed = output(copied, batch)
        assert not torch.equal(changed, before)
        assert torch.equal(output(model, batch), before)
        # Routes are apart, too.
        with layers[0]._route.serving(["a", "b", "__base__"], order=[BASE, "a", "b"]):
            assert torch.equal(output(copied, batch), changed)
        enable(others, False)
        assert torch.equal(output(copied, batch), base)
        enable(others, True)
        take_out(copied)
        assert torch.equal(output(copied, batch), base)
        assert hooks(copied) == 0
        assert torch.equal(output(model, batch), before)

    def test_a_copy_takes_new_adapters(self):
        host, x = block(), torch.randn(2, 6)
        alone(host, config())
        base = host(x)
        copied = copy.deepcopy(host)
        layer = copied.ffn_bottleneck
        layer.update_layer("b", config("parallel", init_weights=False))
        layer.set_adapter("b")
        assert hooks(copied) == 2
        assert not torch.equal(copied(x), base)
        assert torch.equal(host(x), base)


def take_out(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for layer in children(parent):
            layer.detach(parent)


@pytest.mark.parametrize("family", FEW)
def test_taken_out_nothing_is_left(family):
    model, batch = build(family), inputs(family)
    before, base, at_first = snapshot(model), output(model, batch), hooks(model)
    put(model, a=config("parallel"), b=config())
    assert hooks(model) > at_first
    take_out(model)
    assert_unchanged(model, before)
    assert hooks(model) == at_first
    assert not layers_of(model)
    assert torch.equal(output(model, batch), base)


@pytest.mark.parametrize("position", POSITIONS)
class TestTraining:
    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # transformers 5 renames it
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_holds_nothing(self, position, reentrant):
        model, batch = build("bert"), inputs("bert")
        layers = put(model, a=config(position))
        model.get_input_embeddings().weight.requires_grad_()  # a reentrant one wants an input with a gradient
        weights = [parameter for layer in layers for parameter in layer.parameters()]
        model.train()
        torch.manual_seed(0)  # both passes drop the same
        plain = torch.autograd.grad(said(model, batch, use_cache=False).sin().sum(), weights)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(0)
        said(model, batch, use_cache=False).sin().sum().backward()
        for weight, gradient in zip(weights, plain, strict=True):
            torch.testing.assert_close(weight.grad, gradient)
        assert all(layer._held.x is None for layer in layers)

    def test_autocast(self, position):
        model, batch = build("bert"), inputs("bert")
        with torch.autocast("cpu", torch.bfloat16):
            base = output(model, batch)
            layers = put(model, std=0, a=config(position))
            assert torch.equal(output(model, batch), base)
            fill(layers, 0.1)
            answer = output(model, batch)
            mixed = routed(model, layers, batch, ["a"] * 3)
            said(model, batch).sum().backward()
        assert answer.dtype == base.dtype
        exact = output(model, batch)
        torch.testing.assert_close(answer.float(), exact, rtol=0.1, atol=0.1)
        torch.testing.assert_close(mixed.float(), exact, rtol=0.1, atol=0.1)
        assert all(parameter.grad.dtype == torch.float32 for parameter in layers[0].parameters())

    @pytest.mark.full  # compiling takes long; tests/tuner/test_unified.py does it in the quick suite
    @pytest.mark.parametrize("family", ["bert", "llama"])
    def test_compiled_it_is_one_graph(self, family, position):
        dtype = torch.bfloat16 if family == "llama" else torch.float32
        model, batch = build(family, dtype), inputs(family, dtype)
        layers = put(model, a=config(position), b=config("parallel", scale="learned"))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for seed, names in enumerate((["a"], ["a", "b"])):
            activate(layers, *names)
            fill(layers, seed=seed)
            answer = said(compiled, batch)
            assert torch.equal(answer, output(model, batch))
        answer.float().sum().backward()
        assert all(parameter.grad is not None for parameter in layers[0].parameters())
        assert all(layer._held.x is None for layer in layers)

    @pytest.mark.full
    def test_compiled_and_routed(self, position):
        model, batch = build("bert"), inputs("bert")
        layers = put(model, a=config(position), b=config("sequential", scale="learned", activation="gelu"))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for seed, names in enumerate((["a", "b", "__base__"], ["b", "b", "a"])):
            fill(layers, seed=seed)
            assert torch.equal(routed(compiled, layers, batch, names), routed(model, layers, batch, names))


class TestWhatIsHeld:
    def test_an_error_on_the_way_leaves_nothing_for_the_next_call(self):
        class Fails(nn.Module):
            failing = True

            def forward(self, x):
                if self.failing:
                    raise RuntimeError("on the way")
                return x

        host = Block(nn.Linear(6, 8), Fails(), nn.Linear(8, 6)).requires_grad_(False)
        layer = alone(host, config("parallel"), config(), fill_in=True)
        x, y = torch.randn(2, 6), torch.randn(2, 6)
        with pytest.raises(RuntimeError, match="on the way"):
            host(x)
        host[1].failing = False
        again = host(y)
        layer.enable_adapters(False)
        h = host(y)
        close(again, h + formula(layer, "a")(y, h))
        layer.enable_adapters(True)
        host[1].failing = True
        with pytest.raises(RuntimeError, match="on the way"):
            host(x)
        layer.set_adapter("b")
        host[1].failing = False
        host(y)
        assert layer._held.x is None

    def test_an_error_in_the_layer_itself(self):
        host = block()
        layer = alone(host, config("parallel"))
        with layer._route.serving(["a"], order=[BASE, "a"]), pytest.raises(RoutingError, match="Seen in end"):
            host(torch.randn(2, 3, 6))
        assert layer._held.x is None
        with pytest.raises(UnsupportedError, match=r"end has a parallel bottleneck, .* was not called in this forward"):
            host[2](torch.randn(2, 8))

    def test_threads_do_not_share_it(self):
        model = build("bert")
        put(model, a=config("parallel"))
        others = [inputs("bert", seed=seed) for seed in range(4)]
        expected = [output(model, other) for other in others]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda i: output(model, others[i % 4]), range(40)))
        finally:
            sys.setswitchinterval(before)
        assert all(torch.equal(answer, expected[i % 4]) for i, answer in enumerate(answers))

    def test_two_threads_between_entry_and_exit(self):
        barrier = threading.Barrier(2)

        class Meets(nn.Module):
            def forward(self, x):
                barrier.wait(timeout=20)
                return x

        host = Block(nn.Linear(6, 8), Meets(), nn.Linear(8, 6)).requires_grad_(False)
        layer = alone(host, config("parallel"), fill_in=True)
        xs = [torch.randn(2, 6), torch.randn(2, 6)]
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(host, xs))
        for x, answer in zip(xs, answers, strict=True):
            h = F.linear(host[0](x), host[2].weight, host[2].bias)
            close(answer, h + formula(layer, "a")(x, h))


class TestOtherTuners:
    @pytest.mark.parametrize("position", POSITIONS)
    @pytest.mark.parametrize("first", ["lora", "bottleneck"])
    def test_lora_on_the_same_leaves(self, first, position):
        """The bottleneck reads the x and h of the base, whichever came first."""
        host, x = block(), torch.randn(2, 3, 6)
        base = copy.deepcopy(host)
        lora = LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
        if first == "lora":
            inject_adapter_in_model(lora, host)
            layer = alone(host, config(position), fill_in=True)
        else:
            layer = alone(host, config(position), fill_in=True)
            inject_adapter_in_model(lora, host)
        host.eval()
        answer = host(x)
        layer.enable_adapters(False)
        without = host(x)
        # h is what the base's leaf says of what it is given, here by the LoRA on the entry.
        h = base[2](F.relu(host[0](x)))
        close(answer, without + formula(layer, "a")(x, h))
        layer.detach(host)
        assert hooks(host) == 0
        assert torch.equal(host(x), without)

    def test_a_forward_put_in_place_by_accelerate(self):
        from accelerate.hooks import ModelHook, add_hook_to_module

        host, x = block(), torch.randn(2, 6)
        alone(host, config("parallel"), fill_in=True)
        before = host(x)
        for module in host[0], host[2]:
            add_hook_to_module(module, ModelHook())
        assert torch.equal(host(x), before)

    def test_torchs_own_layers_leave_their_fast_path(self):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval().requires_grad_(False)
        x = torch.randn(2, 3, 8)
        base = model(x)
        (layer,) = put(model, std=0, a=config("parallel", roles=["ffn"]))
        close(model(x), base)
        fill([layer])
        attended = model.norm1(x + model.self_attn(x, x, x)[0])
        h = F.linear(F.relu(model.linear1(attended)), model.linear2.weight, model.linear2.bias)
        close(model(x), model.norm2(attended + h + formula(layer, "a")(attended, h)))


class TestCombine:
    @pytest.mark.parametrize("position", POSITIONS)
    @pytest.mark.parametrize("scale", [1.0, 2.0, "learned"])
    def test_the_weighted_sum_is_exact(self, position, scale):
        host, x = block(), torch.randn(2, 3, 6)
        sizes = {"a": (2, 0.5), "b": (3, "learned"), "c": (6, scale)}
        layer = alone(host, *[config(position, bottleneck_size=n, scale=s) for n, s in sizes.values()], fill_in=True)
        layer.enable_adapters(False)
        h = host(x)
        layer.enable_adapters(True)
        single = {}
        for name in ("a", "b"):
            layer.set_adapter(name)
            single[name] = host(x) - h
        combine_bottlenecks(layer, ["a", "b"], [0.3, -2.0], "c")
        layer.set_adapter("c")
        close(host(x), h + 0.3 * single["a"] - 2.0 * single["b"], 5)
        assert not layer.lntune_down["c"].weight[5:].any()
        for name in ("a", "b"):  # the others are as they were
            layer.set_adapter(name)
            close(host(x) - h, single[name])

    def test_into_one_of_them(self):
        host, x = block(), torch.randn(2, 6)
        layer = alone(host, config(bottleneck_size=3, scale="learned"), fill_in=True)
        layer.enable_adapters(False)
        h = host(x)
        layer.enable_adapters(True)
        before = host(x) - h
        combine_bottlenecks(layer, ["a"], [3.0], "a")
        close(host(x), h + 3 * before, 5)

    def test_an_adapter_that_is_not_here_adds_nothing(self):
        host, x = block(), torch.randn(2, 6)
        layer = alone(host, config(), config(bottleneck_size=3), fill_in=True)
        base = host(x)
        combine_bottlenecks(layer, ["elsewhere", "a"], [5.0, 1.0], "b")
        layer.set_adapter("b")
        close(host(x), base)
        combine_bottlenecks(layer, ["elsewhere"], [5.0], "b")
        layer.enable_adapters(False)
        h = host(x)
        layer.enable_adapters(True)
        assert torch.equal(host(x), h)
        combine_bottlenecks(layer, ["a"], [1.0], "elsewhere")  # and takes nothing

    @pytest.mark.parametrize(
        ("other", "said_of"),
        [
            (config("parallel"), "position 'sequential' and 'parallel'"),
            (config(activation="gelu"), "activation 'relu' and 'gelu'"),
        ],
    )
    def test_no_sum_across_kinds(self, other, said_of):
        layer = alone(block(), config(), other, config(bottleneck_size=9), fill_in=True)
        before = snapshot(layer)
        for call in (
            lambda: check_combine(layer, ["a", "b"]),
            lambda: combine_bottlenecks(layer, ["a", "b"], [1.0, 1.0], "c"),
        ):
            with pytest.raises(UnsupportedError, match=f"{said_of}. Make both active"):
                call()
        assert_unchanged(layer, before)

    def test_too_narrow(self):
        layer = alone(block(), config(), config(), config(bottleneck_size=5), fill_in=True)
        before = snapshot(layer)
        with pytest.raises(
            ConfigError, match=r"'a', 'b' at end are 6 wide together, but 'c' is 5 wide .*size=6 or more"
        ):
            combine_bottlenecks(layer, ["a", "b"], [1.0, 1.0], "c")
        assert_unchanged(layer, before)
