"""The table of methods, and a method that is added to it: its config, its layer, the method and one row."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lntune import LNTuningConfig, UnifiedConfig, plan
from peft_lntune.config.base import PART_KINDS, LNTuneConfig, part_kind
from peft_lntune.errors import ConfigError, NoMatchError, UnsupportedError
from peft_lntune.layers import InsertedLayer
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.methods import METHODS, Injection, method_of
from peft_lntune.planning.methods.inserted import InsertedMethod
from peft_lntune.planning.targets import is_chosen
from peft_lntune.planning.types import Plan, PlannedModule
from peft_lntune.routing.route import Route
from tests import adapted

# 1. The config.


@dataclass(kw_only=True)
class ScaleConfig(LNTuneConfig):
    """A learned factor for each output of chosen linear maps, as (IA)3 has them."""


# 2. The layer.


class Factors(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class ScaleLayer(InsertedLayer):
    adapter_layer_names = ("lntune_factors",)
    child = "factors"
    lntune_factors: Any

    def __init__(self, route: Route, label: str, width: int) -> None:
        super().__init__(route, label)
        self.width = width

    def attach(self, host: nn.Module) -> None:
        super().attach(host)
        self._hook = host.register_forward_hook(self.scale)

    def detach(self, host: nn.Module) -> None:
        self._hook.remove()
        super().detach(host)

    def update_layer(self, adapter_name: str, config: Any, stored: bool = False) -> None:
        self.lntune_factors[adapter_name] = Factors(self.width)
        self.settle(adapter_name, config, torch.device("cpu"))

    def stack(self, order: Sequence[str]) -> dict[str, Tensor]:
        held = self.lntune_factors
        return {"w": torch.stack([held[n].weight if n in held else torch.ones(self.width) for n in order])}

    def scale(self, host: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
        if self._route.on() and not self.disable_adapters:
            rows = self.stacks()["w"][self._route.index(h.shape, self.label, h.device)]
            return h * rows.reshape(len(rows), *[1] * (h.dim() - 2), self.width)
        for name in self.running:
            h = h * self.lntune_factors[name].weight
        return h


# 3. The method.


class Scales(InsertedMethod):
    name = "scale"
    no_sum = "has factors, and a weighted sum of factors does not weigh their effects."

    def plan(self, facts: ModelFacts, config: Any, counts: Any = None) -> Plan:
        found = {n: m for n, m in facts.modules.items() if isinstance(m, nn.Linear) and is_chosen(config, n)}
        if not found:
            raise NoMatchError("this config selects no linear map.")
        return Plan({n: self.planned(config, n, m, None, {"factors": m.out_features}) for n, m in found.items()})

    def make_layer(self, injection: Injection, part: PlannedModule) -> ScaleLayer:
        module: Any = injection.modules[part.name]
        return ScaleLayer(injection.route, part.name, module.out_features)


# 4. The row.


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, ScaleConfig, Scales())
    monkeypatch.setitem(PART_KINDS, ScaleConfig.__name__, ScaleConfig)


def config(unified: bool = False) -> LNTuneConfig:
    own = ScaleConfig(target_modules=["query", "dense"])
    return UnifiedConfig(parts=[LNTuningConfig(), own]) if unified else own


@pytest.mark.usefixtures("scales")
@pytest.mark.parametrize("unified", [False, True], ids=["alone", "with norms"])
class TestAnAddedMethod:
    def test_its_life(self, unified: bool, tmp_path: Path) -> None:
        """Planned, trained, switched off, saved, loaded, in mixed rows, taken off again; merging is refused."""
        base, batch = adapted.build("bert"), adapted.inputs("bert")
        before = adapted.output(base, batch)
        assert "scale" in str(plan(base, config(unified)))
        model = get_peft_model(base, config(unified)).eval()
        assert torch.equal(adapted.output(model, batch), before)
        tuned = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in tuned) == plan(base, config(unified)).entries
        model(**batch)[0].square().sum().backward()
        torch.optim.SGD(tuned, lr=0.1).step()
        trained = adapted.output(model, batch)
        assert not torch.equal(trained, before)
        with model.disable_adapter():
            assert torch.equal(adapted.output(model, batch), before)

        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(adapted.build("bert"), str(tmp_path)).eval()
        assert torch.equal(adapted.output(loaded, batch), trained)

        model.add_adapter("other", config(unified))
        rows = adapted.output(model, {**batch, "adapter_names": ["default", "other", "__base__"]})
        torch.testing.assert_close(rows, torch.cat([trained[:1], before[1:]]))
        with pytest.raises(UnsupportedError, match="has a scale at"):
            model.merge_adapter()
        with pytest.raises(UnsupportedError, match="a weighted sum of factors"):
            model.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
        assert torch.equal(adapted.output(model.unload(), batch), before)


def test_a_config_that_is_of_no_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="IA3Config is not a config of this package, which knows LNTuningConfig"):
        plan(adapted.build("bert"), IA3Config())


def test_a_class_that_extends_a_config_has_its_method() -> None:
    class Own(LNTuningConfig):
        pass

    assert method_of(Own()) is method_of(LNTuningConfig())
    assert method_of(LoraConfig()).name == "lora"


def test_each_kind_has_a_method() -> None:
    assert set(PART_KINDS.values()) <= METHODS.keys()
    assert part_kind(ScaleConfig) is ScaleConfig
    del PART_KINDS[ScaleConfig.__name__]
