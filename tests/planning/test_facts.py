"""A model is looked through once for each operation, whatever the parts of an adapter."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from peft_lntune import (
    BottleneckConfig,
    FisherLNConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    PrefixConfig,
    UnifiedConfig,
    fit_fisher_masks,
    plan,
)
from peft_lntune.core import module_tree
from peft_lntune.norms import find
from tests import adapted

EVERY = (
    LNTuningConfig(target_modules=["LayerNorm"], layers_to_transform=[0]),
    ModuleTuningConfig(components=["norm"], exclude_modules=["embeddings.LayerNorm"], layers_to_exclude=[0]),
    BottleneckConfig(roles=["attention"]),
    PrefixConfig(),
    LoraConfig(),
)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a whole model was walked, and its norms surveyed, since the last `clear`."""
    counted: Counter[str] = Counter()
    walk, roles = module_tree._walk, find.find_roles

    def walked(module: Any, name: str, seen: set[Any]) -> Any:
        counted["walks"] += not name
        return walk(module, name, seen)

    def surveyed(*args: Any) -> Any:
        counted["surveys"] += 1
        return roles(*args)

    monkeypatch.setattr(module_tree, "_walk", walked)
    monkeypatch.setattr(find, "find_roles", surveyed)
    return counted


def looked(looks: Counter[str], operation: Callable[[], Any]) -> tuple[int, int]:
    looks.clear()
    operation()
    return looks["walks"], looks["surveys"]


@pytest.mark.parametrize("parts", [EVERY[:1], EVERY], ids=["norms", "all methods"])
def test_a_plan_walks_once(looks: Counter[str], parts: tuple[Any, ...]) -> None:
    model = adapted.build("bert")
    assert looked(looks, lambda: plan(model, UnifiedConfig(parts=list(parts)))) == (1, 1)


@pytest.mark.parametrize("parts", [EVERY[:1], EVERY], ids=["norms", "all methods"])
def test_a_second_adapter_costs_what_the_first_did(looks: Counter[str], parts: tuple[Any, ...]) -> None:
    """One walk for what the modules are, and one for what stands in their places."""
    model = adapted.build("bert")
    configs = [UnifiedConfig(parts=list(parts)) for _ in range(2)]
    assert looked(looks, lambda: get_peft_model(model, configs[0], "a")) == (2, 1)
    tuned = get_peft_model(adapted.build("bert"), configs[0], "a")
    assert looked(looks, lambda: tuned.add_adapter("b", configs[1])) == (2, 1)


def test_fitting_masks(looks: Counter[str]) -> None:
    model = get_peft_model(adapted.build("bert-classifier"), FisherLNConfig(task_type="SEQ_CLS", num_samples=4))
    batch = adapted.inputs("bert-classifier", batch=4) | {"labels": adapted.torch.tensor([0, 1, 2, 0])}
    walks, surveys = looked(looks, lambda: fit_fisher_masks(model, [batch]))
    assert surveys <= 2
    assert walks <= 4
