"""LN adapters beside LoRA, LoHa and LoKr in one PeftMixedModel, in both orders, also on the same module."""

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftMixedModel, get_peft_model
from torch import Tensor, nn

from peft_lntune import LNTuningConfig
from peft_lntune.errors import ConfigError
from peft_lntune.layers import ReplacementLayer
from tests import adapted

OTHERS: dict[str, Any] = {
    "LoRA": lambda target: LoraConfig(target_modules=[target], init_lora_weights=False, r=2),
    "LoHa": lambda target: LoHaConfig(target_modules=[target], init_weights=False, r=2),
    "LoKr": lambda target: LoKrConfig(target_modules=[target], init_weights=False, r=2),
}
ORDERS = {"ours-first": ["ours", "other"], "ours-second": ["other", "ours"]}
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lin(x)))


def build() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def mix(other: str, order: str, place: str) -> PeftMixedModel:
    """Both adapters, both active; `place` says whether they tune the same module."""
    targets = ["lin"] if place == "same-module" else None
    configs: dict[str, PeftConfig] = {"ours": LNTuningConfig(target_modules=targets), "other": OTHERS[other]("lin")}
    first, second = ORDERS[order]
    torch.manual_seed(1)
    model = get_peft_model(build(), configs[first], first, mixed=True)
    model.add_adapter(second, configs[second])
    model.set_adapter([first, second])
    adapted.fill(model, "ours", seed=2)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():  # the same for both orders
        if ".other" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["other-module", "same-module"])
def place(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(other: str, order: str, place: str) -> PeftMixedModel:
    return mix(other, order, place)


def says(model: nn.Module, *active: str) -> Tensor:
    if active:
        model.set_adapter(list(active))
    with torch.no_grad():
        return model(X)


def add_deltas(net: Net, model: PeftMixedModel, name: str) -> None:
    """Add the deltas of one of our adapters; PEFT calls modules by longer names in every adapter but the first."""
    for label, delta in adapted.deltas(model, name).items():
        net.get_parameter(label.removeprefix("base_model.model.")).add_(delta.dense())


def expected(model: PeftMixedModel, *active: str) -> Tensor:
    """The slow way: a plain net whose parameters are base plus the deltas of the active adapters."""
    net = build()
    with torch.no_grad():
        if "ours" in active:
            add_deltas(net, model, "ours")
        if "other" in active:
            for module in model.modules():
                if not isinstance(module, ReplacementLayer) and hasattr(module, "get_delta_weight"):
                    net.lin.weight.add_(module.get_delta_weight("other"))
        return net(X)


@pytest.mark.parametrize("active", [("ours",), ("other",), ("ours", "other"), ("other", "ours")], ids="+".join)
def test_outputs_are_those_of_summed_deltas(model: PeftMixedModel, active: tuple[str, ...]) -> None:
    torch.testing.assert_close(says(model, *active), expected(model, *active))
    assert not torch.allclose(says(model), build()(X))


def test_disabled_it_is_the_base(model: PeftMixedModel) -> None:
    with model.disable_adapter():
        assert torch.equal(says(model), build()(X))
    torch.testing.assert_close(says(model), expected(model, "ours", "other"))


@pytest.mark.parametrize(("gone", "left"), [("ours", "other"), ("other", "ours")])
def test_delete(model: PeftMixedModel, gone: str, left: str) -> None:
    want = expected(model, left)
    model.delete_adapter(gone)
    torch.testing.assert_close(says(model, left), want)
    assert list(model.peft_config) == [left]
    assert not any(f".{gone}." in name for name in model.state_dict())


def test_merge_and_unload(model: PeftMixedModel) -> None:
    want = expected(model, "ours", "other")
    merged = model.merge_and_unload()
    assert type(merged) is Net
    assert merged.state_dict().keys() == build().state_dict().keys()
    torch.testing.assert_close(says(merged), want)


def test_unload(model: PeftMixedModel) -> None:
    base = model.unload()
    assert torch.equal(says(base), build()(X))
    assert base.state_dict().keys() == build().state_dict().keys()


def test_both_are_trained_and_nothing_else(model: PeftMixedModel) -> None:
    model.train()(X).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {part for name in trained for part in name.split(".") if part in ("ours", "other")} == {"ours", "other"}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_the_active_one_is_trained(model: PeftMixedModel) -> None:
    model.set_adapter(["ours"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".ours." in name for name in trainable)


def test_two_of_ours_add_up(order: str) -> None:
    model = mix("LoRA", order, "other-module")
    model.add_adapter("third", LNTuningConfig(tune="bias"))
    adapted.fill(model, "third", seed=9)
    net = build()
    with torch.no_grad():
        for name in ("ours", "third"):
            add_deltas(net, model, name)
    torch.testing.assert_close(says(model, "ours", "third"), net(X).detach())


@pytest.mark.parametrize("first", ["ours", "other"])
def test_saved_adapters_are_joined(first: str, tmp_path: Path) -> None:
    """PEFT cannot save a mixed model, but it loads into one what was saved apart."""
    for name, config in (("ours", LNTuningConfig()), ("other", OTHERS["LoRA"]("lin"))):
        apart = get_peft_model(build(), config)
        adapted.fill(apart, "default", seed=4)
        apart.save_pretrained(tmp_path / name)
    second = "other" if first == "ours" else "ours"
    model = PeftMixedModel.from_pretrained(build(), tmp_path / first, first)
    model.load_adapter(tmp_path / second, second)
    torch.testing.assert_close(says(model, "ours", "other"), expected(model, "ours", "other"))


def test_saving_is_peft_s_to_refuse(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="Saving is not supported for PeftMixedModel"):
        mix("LoRA", "ours-first", "other-module").save_pretrained(tmp_path)


def test_a_config_holds_nothing_of_the_model(other: str, place: str) -> None:
    """It can be copied and pickled, and the model is not kept alive by it."""
    targets = ["lin"] if place == "same-module" else None
    config = LNTuningConfig(target_modules=targets)
    fields = set(vars(config))
    model = get_peft_model(build(), config, "ours", mixed=True)
    model.add_adapter("other", OTHERS[other]("lin"))
    model.add_adapter("again", config)
    assert set(vars(config)) - fields <= {"selected"}
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    gone = weakref.ref(model)
    assert model.base_model._injection is None
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_of_a_masked_adapter_has_its_mask(tmp_path: Path) -> None:
    """Masks come into a mixed model from files."""
    plain = get_peft_model(build(), LNTuningConfig())
    plain.set_masks({"norm.weight": torch.arange(6) < 2})
    adapted.fill(plain, "default")
    plain.save_pretrained(tmp_path)
    model = PeftMixedModel.from_pretrained(build(), tmp_path, is_trainable=True).eval()
    before = says(model, "default")
    assert torch.equal(before, says(plain))
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    assert torch.equal(says(model, "ref"), before)
    with pytest.raises(ConfigError, match="mask is not known here"):
        get_peft_model(build(), model.peft_config["default"], mixed=True)
