"""Modules and parameters that a model holds more than once: one layer and one delta everywhere, or a refusal."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lntune import (
    AdapterBank,
    FisherLNConfig,
    LNTuningConfig,
    ManyTasks,
    ModuleTuningConfig,
    SupermaskConfig,
    UnifiedConfig,
    fisher_scores,
    fit_fisher_masks,
)
from peft_lntune.core.shared import find_places
from peft_lntune.errors import AdapterFileError, ConfigError, UnsupportedError
from peft_lntune.layers import ReplacementLayer
from tests.selection.oracles import loop_scores
from tests.tolerance import assert_close


class TiedNorms(nn.Module):
    """The second norm has both parameters of the first, the third its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.n3 = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.n2.weight, self.n2.bias, self.n3.weight = self.n1.weight, self.n1.bias, self.n1.weight

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"y": self.n3(self.n2(self.n1(x).cumsum(-1)).cumsum(-1)).cumsum(-1).tanh()}


class SharedNorm(nn.Module):
    """One norm under two names, and in plain lists, tuples, dicts and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.block = nn.Sequential(nn.Linear(8, 8), self.norm)
        self.norms, self.pair, self.by_name = [self.norm], (1, (self.norm, 2)), {"a": [self.norm]}
        self.__dict__["hidden"] = self.norm

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norms[0](self.block(x)).cumsum(-1)
        x = self.pair[1][0](x).cumsum(-1) + self.by_name["a"][0](x.cumsum(-1))
        return {"y": self.hidden(self.norm(x).cumsum(-1)).cumsum(-1)}


class TiedWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"y": self.head(self.norm(self.words(ids)))}


class SharedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.block = nn.Sequential(self.up, nn.Tanh())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.up(self.block(x))}


def vectors() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, dtype=torch.float64)


def words() -> Tensor:
    return torch.arange(9).reshape(3, 3)


BOTH = ["words", "head"]
CASES = {
    "tied norms": (TiedNorms, LNTuningConfig, {}, vectors, 24),
    "tied norms, weights": (TiedNorms, LNTuningConfig, {"tune": "weight"}, vectors, 8),
    "tied norms by component": (TiedNorms, ModuleTuningConfig, {"components": ["norm"]}, vectors, 24),
    "shared norm": (SharedNorm, LNTuningConfig, {}, vectors, 16),
    "tied words": (TiedWords, ModuleTuningConfig, {"target_modules": BOTH}, words, 72),
    "masked tied words": (TiedWords, SupermaskConfig, {"target_modules": BOTH}, words, 72),
    "shared linear": (SharedLinear, ModuleTuningConfig, {"target_modules": ["up"]}, vectors, 72),
    "masked shared linear": (SharedLinear, SupermaskConfig, {"target_modules": ["up"]}, vectors, 64),
}


def base_of(case: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[case][0]()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.double().eval()


def adapted(case: str) -> PeftModel:
    _, config, options, _, _ = CASES[case]
    model = get_peft_model(base_of(case), config(**options))
    model.add_adapter("other", config(**options))
    randomize(model)
    return model.eval()


def randomize(model: nn.Module) -> None:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lntune_" in name:
            nn.init.normal_(parameter)


@pytest.mark.parametrize("case", CASES)
def test_one_delta_in_every_state(case):
    model, base, x = adapted(case), base_of(case), CASES[case][3]()
    trained = [p for name, p in model.named_parameters() if "lntune_" in name and ".default" in name]
    assert sum(p.numel() for p in trained) == CASES[case][4]
    before = {name: p.clone() for name, p in base.named_parameters()}
    single = model(x)["y"].detach()
    # By hand: one effective parameter under all its names.
    plain = base_of(case)
    for layer in model.modules():
        if isinstance(layer, ReplacementLayer):
            module = plain.get_submodule(layer.label)
            for parameter in layer.tunes("default"):
                setattr(module, parameter, nn.Parameter(layer.effective(parameter, ["default"]).detach()))
    assert_close(single, plain(x)["y"])
    assert not torch.allclose(single, base(x)["y"])
    model.merge_adapter()
    assert_close(model(x)["y"], single)
    model.unmerge_adapter()
    assert torch.equal(model(x)["y"], single)
    kept = {n.replace(".base_layer", ""): p for n, p in model.base_model.model.named_parameters() if "lntune_" not in n}
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="You are now additionally merging other"):
        model.merge_adapter(["other"])
    model.unmerge_adapter()
    assert torch.equal(model(x)["y"], single)
    with model.disable_adapter():
        assert torch.equal(model(x)["y"], base(x)["y"])
    with torch.no_grad():
        rows = model(x, adapter_names=["default", "other", "__base__"])["y"]
        model.set_adapter("other")
        other = model(x)["y"]
        model.set_adapter("default")
    assert_close(rows, torch.stack([single[0], other[1], base(x)["y"][2]]))
    copied = copy.deepcopy(model)
    merged = model.merge_and_unload()
    assert_close(merged(x)["y"], single)
    assert not any(isinstance(module, ReplacementLayer) for module in merged.modules())
    assert torch.equal(copied(x)["y"], single)
    unloaded = copied.unload()
    assert torch.equal(unloaded(x)["y"], base(x)["y"])


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded(case, tmp_path):
    model, x = adapted(case), CASES[case][3]()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(case), tmp_path).eval()
    assert_close(loaded(x)["y"], model(x)["y"])
    loaded.merge_adapter()
    assert_close(loaded(x)["y"], model(x)["y"])


@pytest.mark.parametrize("case", ["tied norms", "shared norm", "shared linear", "tied words"])
def test_training_moves_all_places_together(case):
    model, x = adapted(case).train(), CASES[case][3]()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x)["y"].square().mean().backward()
        optimizer.step()
    single = model.eval()(x)["y"].detach()
    assert_close(model.merge_and_unload()(x)["y"], single)


@pytest.mark.parametrize("case", ["tied norms", "shared norm"])
def test_bank(case, tmp_path):
    model, x, base = adapted(case), CASES[case][3](), base_of(case)
    model.save_pretrained(tmp_path)
    bank = AdapterBank(base, dtype=torch.float64)
    bank.add("here", (model, "default"))
    bank.add("saved", tmp_path)
    bank.attach()
    with torch.no_grad(), bank.route(["here", "saved", "__base__"]):
        found = base(x)["y"]
    bank.detach()
    single, plain = model(x)["y"], base(x)["y"]
    assert_close(found, torch.stack([single[0], single[1], plain[2]]))


def loss_of(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return (outputs["y"].flatten(1).mean(1) - batch["labels"]).square()


def test_fisher_and_masks():
    batch = {"x": vectors(), "labels": torch.arange(3.0).double()}
    scores = fisher_scores(base_of("tied norms"), [batch], loss=loss_of)
    expected = loop_scores(base_of("tied norms"), [batch], loss_of)
    assert list(scores) == ["n1.weight", "n1.bias", "n3.bias"] == list(expected)
    for name, value in scores.items():
        assert_close(value, expected[name])
    model = get_peft_model(base_of("tied norms"), FisherLNConfig(density=0.5, num_samples=3))
    fit_fisher_masks(model, [batch], loss=loss_of)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12
    randomize(model)
    single = model.eval()(vectors())["y"].detach()
    model.merge_adapter()
    assert_close(model(vectors())["y"], single)
    model.unmerge_adapter()
    model.clear_masks()
    assert torch.equal(model(vectors())["y"], single)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 24
    mask = torch.arange(8) < 3
    with pytest.raises(ConfigError, match=r"n1.weight and n2.weight are one parameter, and their masks differ"):
        model.set_masks({"n1.weight": mask, "n2.weight": ~mask})
    model.set_masks({"n2.weight": mask})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3


def test_weighted_sum():
    model, x = adapted("tied norms"), vectors()
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum")
    model.set_adapter("sum")
    single = model(x)["y"].detach()
    model.merge_adapter()
    assert_close(model(x)["y"], single)


PARTIAL = {
    "one of tied norms": (TiedNorms, LNTuningConfig(target_modules=["n1"]), vectors, "n1.weight.*tied to.* n2, n3"),
    "two of three": (TiedNorms, LNTuningConfig(exclude_modules=["n3"]), vectors, "n1.weight.*tied to.* n3"),
    "the head alone": (TiedWords, ModuleTuningConfig(target_modules=["head"]), words, "head.weight.*tied to.* words"),
    "masked words alone": (TiedWords, SupermaskConfig(target_modules=["words"]), words, "words.weight.*tied to.* head"),
}


@pytest.mark.parametrize("case", PARTIAL)
def test_what_tunes_some_places_alone_is_not_merged(case):
    make, config, inputs, message = PARTIAL[case]
    torch.manual_seed(0)
    model = get_peft_model(make().double().eval(), config)
    randomize(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    single = model(inputs())["y"]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match=message):
            merge()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert torch.equal(model(inputs())["y"], single)


def test_parts_that_differ_on_one_parameter():
    parts = [ModuleTuningConfig(target_modules=["words"]), SupermaskConfig(target_modules=["head"])]
    model = TiedWords()
    with pytest.raises(
        UnsupportedError, match=r"words.weight and head.weight are one parameter, and this config tunes"
    ):
        get_peft_model(model, UnifiedConfig(parts=parts))
    assert not any(isinstance(module, ReplacementLayer) for module in model.modules())


def test_components_that_are_tied_to_the_head_are_refused():
    model = hf.BertForMaskedLM(hf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    with pytest.raises(UnsupportedError, match="is tied to"):
        get_peft_model(model, ModuleTuningConfig(components=["embedding"]))


@pytest.mark.parametrize("reference", ["method", "list", "closure"])
def test_a_place_that_no_layer_can_take_is_refused(reference):
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    norm = model[0]
    model.call = {
        "method": norm.forward,
        "list": [SimpleNamespace(), {"f": norm.__call__}],
        "closure": lambda x: norm(x),
    }[reference]
    said = r"\(a closure over norm\)" if reference == "closure" else r"\(a bound method\)"
    with pytest.raises(UnsupportedError, match=rf"0 is to be tuned, and call.*{said} would still call it"):
        get_peft_model(model, LNTuningConfig())
    assert type(model[0]) is nn.LayerNorm
    get_peft_model(model, LNTuningConfig(target_modules=["1"]))  # another module is not concerned


def test_an_adapter_that_was_trained_apart_is_refused(tmp_path):
    apart = base_of("tied norms")
    for name in ("n2", "n3"):
        setattr(apart, name, copy.deepcopy(getattr(apart, name)))
    model = get_peft_model(apart, LNTuningConfig())
    randomize(model)
    model.save_pretrained(tmp_path)
    base = base_of("tied norms")
    with pytest.raises(AdapterFileError, match="differ in the file, and in this model modules share the parameter"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, ReplacementLayer) for module in base.modules())


def in_a_tuple(first, second):
    pair = (first, second)
    return pair, lambda pair, x: pair[1](pair[0](x).cumsum(-1))


def in_a_partial(first, second):
    return partial(lambda a, x, b: b(a(x).cumsum(-1)), first, b=second), lambda held, x: held(x)


def in_an_object(first, second):
    return SimpleNamespace(a=first, more=SimpleNamespace(b=second)), lambda held, x: held.more.b(held.a(x).cumsum(-1))


@pytest.mark.parametrize("hold", [in_a_tuple, in_a_partial, in_an_object])
def test_norms_are_tuned_where_a_model_calls_them(hold):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
            self.held, self.call = hold(self.first, self.second)

        def forward(self, x: Tensor) -> Tensor:
            return self.call(self.held, x)

    torch.manual_seed(0)
    base, x = Holder().double(), torch.randn(3, 8, dtype=torch.float64)
    own = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LNTuningConfig())
    randomize(model)
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    y = model(x)
    merged = model.merge_and_unload()
    assert_close(merged(x), y)
    assert not any(isinstance(module, ReplacementLayer) for module in merged.modules())
    assert not torch.equal(merged.first.weight, own["first.weight"])
    merged.load_state_dict(own)
    assert not torch.allclose(merged(x), y)  # it calls the modules that it has


def test_many_tasks_refuse_one_parameter_of_several_norms():
    with pytest.raises(UnsupportedError, match=r"n1.weight and n2.weight and n3.weight are one parameter"):
        ManyTasks(adapted("tied norms"))
    ManyTasks(adapted("shared norm")).close()


def test_a_hybrid_model_of_transformers():
    """Zamba's blocks of attention are tied: the same parameters in several layers."""
    torch.manual_seed(0)
    config = hf.ZambaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_mamba_heads=2,
        mamba_d_state=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        pad_token_id=0,
    )
    model = get_peft_model(hf.ZambaForCausalLM(config).eval(), LNTuningConfig())
    tied = [
        layer for layer in model.modules() if isinstance(layer, ReplacementLayer) and layer.tied_to("weight", "default")
    ]
    assert tied
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lntune_" in name:
                parameter.normal_(std=0.3)
        ids = torch.randint(1, 32, (2, 5))
        single = model(input_ids=ids, use_cache=False).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, single, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, single)


def test_lora_around_one_name_of_a_shared_linear():
    """PEFT puts its layer under the first name alone, so ours around it would not be called under the others."""
    model = get_peft_model(SharedLinear(), LoraConfig(target_modules=["up"]), mixed=True)
    with pytest.raises(UnsupportedError, match=r"up is to be tuned, and .*block\.0 would still call it without"):
        model.add_adapter("ours", LNTuningConfig(target_modules=["up"]))
    assert not any(isinstance(module, ReplacementLayer) for module in model.modules())


def test_places():
    model = SharedNorm()
    (found,) = find_places(model, [model.norm]).values()
    names = ["norms[0]", "pair[1][0]", "by_name['a'][0]", "hidden", "norm", "block.1"]
    assert [place.name for place in found] == names
    other = nn.LayerNorm(8)
    for place in found:
        place.put(other)
    assert find_places(model, [model.norm])[other][0].name == "norms[0]"
    assert model.norms[0] is model.pair[1][0] is model.by_name["a"][0] is model.hidden is model.block[1] is other
    assert model.pair[1][1] == 2
