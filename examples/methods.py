"""What each tuning method trains in addition to the head, and the head that all of them train."""

from collections.abc import Callable
from typing import Any, NamedTuple

import peft
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from peft_lntune import LNTuningConfig, UnifiedConfig, find_norms
from peft_lntune.architectures.table import lora_targets

HEAD_LR = 1e-3
"""The learning rate of a fresh head, whatever is tuned beside it."""


def find_head(model: PreTrainedModel) -> list[str]:
    """Modules that turn the body's output into logits: what lies outside the body, and the pooler's Linear inside it.

    A BERT's pooler counts as head because the classifier sees the body through it. Its Linear is named, not the
    pooler itself: as a plain layer PEFT can mix it by row when several adapters are served in one batch.
    """
    pooler = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "pooler" in name.split(".")[:-1]
    ]
    outside = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    return pooler + outside


def count_head(model: PreTrainedModel) -> int:
    """Parameters of the head."""
    return sum(p.numel() for name in find_head(model) for p in model.get_submodule(name).parameters())


def is_head(model: Any) -> Callable[[str], bool]:
    """Whether a parameter of a prepared model, by its name, is one of the head."""
    if isinstance(model, peft.PeftModel):
        return lambda name: ".modules_to_save." in name
    head = tuple(f"{name}." for name in find_head(model))
    return lambda name: name.startswith(head)


def tune_only(model: PreTrainedModel, chosen: Callable[[str], bool]) -> nn.Module:
    """Train the head and the chosen parameters, freeze the rest: what one writes without PEFT."""
    of_head = is_head(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(of_head(name) or chosen(name))
    return model


def attach(model: PreTrainedModel, task: str, make_config: Callable[..., peft.PeftConfig], **fields: Any) -> nn.Module:
    """Attach a PEFT adapter that trains and saves the head with it."""
    config = make_config(task_type=task, modules_to_save=find_head(model), **fields)
    return peft.get_peft_model(model, config)


def attach_lora(model: PreTrainedModel, task: str) -> nn.Module:
    """Attach PEFT's LoRA, at queries and values also where PEFT has no list of them for the model."""
    known = model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = None if known else lora_targets(name for name, _ in model.named_modules())
    return attach(model, task, peft.LoraConfig, r=8, lora_alpha=16, target_modules=targets and list(targets))


def preset(name: str) -> Callable[[PreTrainedModel, str], nn.Module]:
    """Attach several methods as one adapter, by a preset of `UnifiedConfig`."""
    return lambda model, task: attach(model, task, UnifiedConfig, preset=name)


class Method(NamedTuple):
    """A learning rate to start from, for all but the head, and what turns the loaded model into the one to train.

    `prepare(model, task)` is also told PEFT's `task_type`, such as `SEQ_CLS`.
    """

    lr: float
    prepare: Callable[[PreTrainedModel, str], nn.Module]


METHODS = {
    "head": Method(1e-3, lambda model, task: tune_only(model, lambda name: False)),
    "ln": Method(1e-3, lambda model, task: attach(model, task, LNTuningConfig)),
    # PEFT's own class of the same name; it has no default targets for most models
    "stock-ln": Method(
        1e-3, lambda model, task: attach(model, task, peft.LNTuningConfig, target_modules=list(find_norms(model)))
    ),
    "bitfit": Method(1e-3, lambda model, task: tune_only(model, lambda name: name.endswith("bias"))),
    "lora": Method(5e-4, attach_lora),
    "prefix": Method(1e-3, preset("prefix")),
    "mha-adapter": Method(1e-3, preset("mha-adapter")),
    "prefix+mha-adapter+ln": Method(1e-3, preset("prefix+mha-adapter+ln")),
    "full": Method(5e-5, lambda model, task: tune_only(model, lambda name: True)),
}
