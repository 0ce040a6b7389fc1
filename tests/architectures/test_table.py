"""An architecture is one row: roles, sub-layers, components and the defaults of LoRA follow from it."""

import pytest
from peft import LoraConfig
from torch import nn

from peft_lntune import BottleneckConfig, ModuleTuningConfig, plan
from peft_lntune.architectures.components import ParameterPlace, find_components
from peft_lntune.architectures.roles import find_roles
from peft_lntune.architectures.sublayers import Sublayer, find_sublayers
from peft_lntune.architectures.table import (
    ARCHITECTURES,
    LAYER_MATRICES,
    MATRICES,
    Architecture,
    Component,
    NormPlace,
    attention,
    ffn,
    lora_targets,
)
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import ConfigError, NoMatchError
from peft_lntune.norms.find import find_norms
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.plan import plan_parts

TOY = Architecture(
    NormPlace("looker thinker", {"one": "attention", "two": "ffn"}),
    attention("looker", "ask tell give say"),
    ffn("thinker", "wide narrow"),
    lora="ask give",
)


def toy() -> nn.Module:
    """Two blocks in words that no rule reads."""

    def block() -> nn.Module:
        looker = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("ask", "tell", "give", "say")})
        thinker = nn.ModuleDict({"wide": nn.Linear(4, 8), "narrow": nn.Linear(8, 4)})
        return nn.ModuleDict({"one": nn.LayerNorm(4), "looker": looker, "two": nn.LayerNorm(4), "thinker": thinker})

    return nn.ModuleDict({"stack": nn.ModuleList([block(), block()])})


@pytest.fixture
def with_row(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "toy", TOY)


def test_without_a_row_nothing_is_known():
    model = toy()
    assert {norm.roles for norm in find_norms(model).values()} == {()}
    assert find_sublayers(base_modules(model)) == []
    assert find_components(["stack.0.looker.ask.weight"])["stack.0.looker.ask.weight"].component == "stack.looker.ask"
    with pytest.raises(NoMatchError):
        plan(model, ModuleTuningConfig(components=["query"]))
    with pytest.raises(ConfigError, match="knows default target modules"):
        plan(model, LoraConfig())


def test_a_row_answers_all_questions(with_row):
    model = toy()
    modules = base_modules(model)
    assert find_roles(modules, ["stack.0.one", "stack.1.two"]) == {
        "stack.0.one": ("attention",),
        "stack.1.two": ("ffn",),
    }
    assert find_sublayers(modules)[:2] == [
        Sublayer("attention", "stack.0", "stack.0.looker.ask", "stack.0.looker.say"),
        Sublayer("ffn", "stack.0", "stack.0.thinker.wide", "stack.0.thinker.narrow"),
    ]
    assert find_components(["stack.1.looker.tell.bias", "stack.0.thinker.wide.weight"]) == {
        "stack.1.looker.tell.bias": ParameterPlace("key", 1, "bias"),
        "stack.0.thinker.wide.weight": ParameterPlace("FFN up", 0, "weight"),
    }
    assert list(plan(model, ModuleTuningConfig(components=["query"])).parts) == [
        "stack.0.looker.ask",
        "stack.1.looker.ask",
    ]
    assert len(plan(model, BottleneckConfig(reduction_factor=2)).parts) == 4
    assert lora_targets(modules) == ("ask", "give")
    ((config, planned),) = plan_parts(ModelFacts(model), LoraConfig())
    assert set(config.target_modules) == {"ask", "give"}
    assert len(planned.parts) == 4


def test_components_are_their_values():
    """Configs store plain strings, and what is shown is made from the members."""
    config = ModuleTuningConfig(components=[Component.QUERY, "ffn_up"])
    assert [type(name) for name in config.components] == [str, str]
    assert config.components == ["query", "ffn_up"]
    assert set(MATRICES) == {*Component} - {Component.NORM}
    assert set(MATRICES) - set(LAYER_MATRICES) == {Component.EMBEDDING, Component.POOLER}
