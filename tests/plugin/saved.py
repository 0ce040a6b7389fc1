"""Adapters in files, and what a model is at a moment: what the tests of loading compare."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lntune import LNTuningConfig, SupermaskConfig
from tests import adapted

FAMILY = "bert-classifier"
HEADS = ["classifier", "score"]  # what PEFT saves for the task SEQ_CLS


def build_base(folder: Path | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny classifier that says it was loaded from `folder`."""
    model = adapted.build(FAMILY, dtype)
    if folder is not None:
        model.name_or_path = model.config._name_or_path = str(folder)
    return model


def adapt(base: nn.Module, *names: str, seed: int = 0, masked: bool = False, **options: Any) -> PeftModel:
    """Adapters with random deltas and heads on `base`, in evaluation mode; the first is active."""
    first, *others = names or ("default",)
    model = get_peft_model(base, LNTuningConfig(task_type="SEQ_CLS", **options), adapter_name=first)
    for name in others:
        model.add_adapter(name, LNTuningConfig(task_type="SEQ_CLS", **options))
    for number, name in enumerate((first, *others)):
        if masked:
            mask_half(model, name, seed + number)
        adapted.fill(model, name, seed=seed + number)
    return model.eval()


def switch_off(base: nn.Module, **options: Any) -> PeftModel:
    """Supermasks that switch off half of the queries and keys of `base`, in evaluation mode."""
    config = SupermaskConfig(task_type="SEQ_CLS", components=["query", "key"], **options)
    model = get_peft_model(base, config).eval()
    adapted.fill(model, "default")
    return model


def mask_half(model: PeftModel, name: str, seed: int) -> None:
    """Tune about half of the entries of every delta of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {label: delta.shape for label, delta in adapted.deltas(model, name).items()}
    masks = {label: torch.rand(shape, generator=generator) < 0.5 for label, shape in shapes.items()}
    model.base_model.set_masks(masks, name)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """What the model says in evaluation mode; its modes are as before."""
    modes = {module: module.training for module in model.modules()}
    said = model.eval()(**adapted.inputs(FAMILY)).logits
    for module, mode in modes.items():
        module.training = mode
    return said


@dataclass
class State:
    """All that loading could change."""

    tensors: dict[str, Tensor]
    trainable: dict[str, bool]
    modes: dict[str, bool]
    adapters: list[str]
    active: list[str]
    logits: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> "State":
        adapters = list(getattr(model, "peft_config", {}))
        active = model.active_adapters if adapters else []
        return cls(
            tensors=adapted.snapshot(model),
            trainable={name: parameter.requires_grad for name, parameter in model.named_parameters()},
            modes={name: module.training for name, module in model.named_modules()},
            adapters=adapters,
            active=list(active() if callable(active) else active),
            logits=logits(model),
        )

    def assert_same(self, model: nn.Module) -> None:
        after = State.of(model)
        assert after.tensors.keys() == self.tensors.keys()
        assert [name for name, value in self.tensors.items() if not torch.equal(value, after.tensors[name])] == []
        for name in ("trainable", "modes", "adapters", "active"):
            assert getattr(after, name) == getattr(self, name), name
        assert torch.equal(after.logits, self.logits)
