"""Adapters on the models of `tests.cases`: put them on, give them values, run them, look inside.

What is compared with what is in the tests; what is slow and obviously right is in `tests.oracles`.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lntune import LNTuningConfig
from peft_lntune.layers import PARAMETERS, ReplacementLayer
from tests import cases

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": cases.VOCAB,
}
# Models with a head that PEFT saves beside the adapter.
HEADED = {
    "bert-classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SIZES, num_labels=3)),
    "roberta-classifier": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_SIZES, num_labels=3)),
    "electra-classifier": lambda: hf.ElectraForSequenceClassification(
        hf.ElectraConfig(**_SIZES, embedding_size=8, num_labels=3)
    ),
    "llama-classifier": lambda: hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**_SIZES, num_key_value_heads=1, num_labels=3, pad_token_id=0)
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model of a family in a dtype, with norms as a trained model has them: not all ones and zeros.

    It is frozen, as PEFT freezes it: torch computes some products another way where a weight requires a gradient.
    """
    cases.seed_cpu(0)
    model = (HEADED[family]() if family in HEADED else cases.build(family)).eval()
    with torch.no_grad():
        for name in norm_names(model):
            for parameter in model.get_submodule(name).parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).requires_grad_(False)


def norm_names(model: nn.Module) -> list[str]:
    """Names of the modules whose class is called a norm: enough for tiny models, and no code of ours is asked."""
    return [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]


def inputs(family: str, dtype: torch.dtype = torch.float32, batch: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """Inputs for `build(family, dtype)`."""
    found = cases.inputs("bert" if family in HEADED else family, batch, seed)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}


def adapt(model: nn.Module, *adapters: str, std: float = 0.3, **options: Any) -> PeftModel:
    """Put adapters with random deltas (std 0: none yet) on a model; the first is active."""
    first, *others = adapters or ("default",)
    peft_model = get_peft_model(model, LNTuningConfig(**options), adapter_name=first)
    for name in others:
        peft_model.add_adapter(name, LNTuningConfig(**options))
    for seed, name in enumerate((first, *others)):
        fill(peft_model, name, std, seed)
    return peft_model.eval()


@torch.no_grad()
def fill(model: nn.Module, adapter: str, std: float = 0.3, seed: int = 0) -> None:
    """Random deltas for an adapter, and random entries for its own copies of heads."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = std * torch.randn(parameter.shape, generator=generator)
        if f".modules_to_save.{adapter}." in name:
            parameter.add_(noise)
        elif re.search(rf"\.lntune_\w+\.{adapter}\.", name):
            parameter.copy_(noise)


def output(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """What the model says, without gradients."""
    with torch.no_grad():
        return said(model, batch, **options)


def said(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """What the model says: the first tensor of its output."""
    return next(iter(model(**batch, **options).values()))


def layers(model: nn.Module) -> Iterator[ReplacementLayer]:
    """The tuner layers in a model."""
    return (module for module in model.modules() if isinstance(module, ReplacementLayer))


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, nn.Module]:
    """The deltas of an adapter by the name of their base parameter."""
    return {
        f"{layer.label}.{parameter}": layer.deltas(parameter)[adapter]
        for layer in layers(model)
        for parameter in PARAMETERS
        if adapter in layer.deltas(parameter)
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of a model by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every tensor is bit for bit as in the snapshot, and none has come or gone."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert not changed
