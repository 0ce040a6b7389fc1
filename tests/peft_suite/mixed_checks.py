"""Our class beside LoRA, LoHa and LoKr in a PeftMixedModel: the checks of PEFT's test_mixed.py, started by `run`."""

from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_tests import test_mixed  # the module: a TestCase imported by name would be collected here
from torch import Tensor, nn

from .rows import Tuner

OTHERS = {
    "LoRA": lambda target: LoraConfig(target_modules=[target], init_lora_weights=False),
    "LoHa": lambda target: LoHaConfig(target_modules=[target], init_weights=False),
    "LoKr": lambda target: LoKrConfig(target_modules=[target], init_weights=False),
}
INPUTS = torch.arange(90).reshape(9, 10)
peft_checks = test_mixed.TestMixedAdapterTypes()


class NormNet(nn.Module):
    """PEFT's SimpleNet with a norm in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.norm = nn.LayerNorm(20)
        self.lin1 = nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.norm(self.lin0(x.float())))


def check_pair(model_cls: type[nn.Module], pair: list[Any], is_commutative: bool) -> None:
    """All that PEFT asks of a pair; each check also goes through both orders itself, but not all of it."""
    first, second = pair
    peft_checks._check_mixed_outputs(model_cls, first, second, INPUTS, is_commutative=is_commutative)
    peft_checks._check_merging(model_cls, first, second, INPUTS)
    peft_checks._check_unload(model_cls, first, second, INPUTS)
    peft_checks._check_disable(model_cls, second, first, INPUTS)
    peft_checks._check_loading(model_cls, first, second, INPUTS, is_commutative=is_commutative)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(
    ("ours_on", "other_on", "is_commutative"),
    [
        pytest.param("lin0", "lin0", False, id="same layer"),
        pytest.param("lin1", "lin1", True, id="same last layer"),  # nothing after it, so the changes add up
        pytest.param("lin0", "lin1", False, id="ours below"),
        pytest.param("lin1", "lin0", False, id="ours above"),
    ],
)
def test_linear(tuner: Tuner, other: str, ours_first: bool, ours_on: str, other_on: str, is_commutative: bool) -> None:
    pair = [tuner.strong(target_modules=[ours_on]), OTHERS[other](other_on)]
    check_pair(test_mixed.SimpleNet, pair if ours_first else pair[::-1], is_commutative)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("other_on", ["lin0", "lin1"])
def test_norm(tuner: Tuner, other: str, ours_first: bool, other_on: str) -> None:
    pair = [tuner.strong(target_modules=["norm"]), OTHERS[other](other_on)]
    check_pair(NormNet, pair if ours_first else pair[::-1], is_commutative=False)


def mixed_model(tuner: Tuner, other: str, ours_first: bool, target: str) -> Any:
    """`ours` and `other` on the module `target` of a NormNet, both active."""
    pair = [("ours", tuner.strong(target_modules=[target])), ("other", OTHERS[other](target))]
    (name, config), (next_name, next_config) = pair if ours_first else pair[::-1]
    model = get_peft_model(NormNet(), config, name, mixed=True)
    model.add_adapter(next_name, next_config)
    model.set_adapter([name, next_name])
    return model


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_both_are_trained(tuner: Tuner, other: str, ours_first: bool) -> None:
    model = mixed_model(tuner, other, ours_first, "lin0")
    model(INPUTS).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    adapters = {next(part for part in name.split(".") if part in ("ours", "other")) for name in with_gradient}
    assert adapters == {"ours", "other"}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_delete_leaves_the_other(tuner: Tuner, other: str, ours_first: bool) -> None:
    model = mixed_model(tuner, other, ours_first, "lin0").eval()
    model.set_adapter("other")
    expected = model(INPUTS)
    model.set_adapter(["other", "ours"])
    assert not torch.allclose(model(INPUTS), expected)
    model.delete_adapter("ours")
    assert torch.equal(model(INPUTS), expected)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert all("ours" not in layer._all_available_adapter_names() for layer in layers)
