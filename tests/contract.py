"""The contract table: what every kind of adapter promises on every kind of model; `test_contract_table.py` holds it.

A row is a kind of adapter with how it keeps each promise. A kind that cannot keep one says so, and the test then holds
that it is refused. To add a kind, add its row. `make test` runs every kind on one of `cases.QUICK`, each in turn, and
two kinds on two; `make test-full` runs every kind on all of them and on the families of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_lntune import (
    BottleneckConfig,
    FisherLNConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    PrefixConfig,
    SupermaskConfig,
    UnifiedConfig,
)
from tests import adapted, cases

ALL_PARTS = "prefix+mha-adapter+lora+ln"

_OTHERS = tuple(family for family in cases.FAMILIES if family not in cases.QUICK)


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        config: makes its config.
        starts_as_base: a new one changes no bit of what the model says.
        merges: whether, merged, it says what it said: to the `"bit"`, to `"roundings"`, or `"never"`.
        others: families besides `cases.QUICK`.
    """

    config: Callable[[], PeftConfig]
    starts_as_base: bool = True
    merges: str = "bit"
    others: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "ln": Kind(
        LNTuningConfig,
        others=("bert-classifier", "roberta-classifier", "gemma2", "gemma3", "qwen3", "bart", "mamba", "cohere"),
    ),
    "fisher-ln": Kind(FisherLNConfig, others=("gemma3", "bart")),
    "modules": Kind(lambda: ModuleTuningConfig(components=["query", "value"]), others=("phi3", "bart")),
    "supermask": Kind(SupermaskConfig, others=("roberta", "distilbert")),
    "bottleneck": Kind(
        lambda: BottleneckConfig(bottleneck_size=3),
        merges="never",
        others=tuple(family for family in _OTHERS if not family.startswith("mamba")),
    ),
    "parallel-bottleneck": Kind(
        lambda: BottleneckConfig(bottleneck_size=3, position="parallel", scale="learned"),
        merges="never",
        others=("opt", "whisper", "modernbert", "gpt-neox"),
    ),
    "prefix": Kind(
        lambda: PrefixConfig(num_virtual_tokens=3),
        starts_as_base=False,
        merges="never",
        others=tuple(family for family in _OTHERS if not family.startswith(("mamba", "deberta"))),
    ),
    "lora+ln": Kind(lambda: UnifiedConfig(preset="lora+ln"), merges="roundings", others=("distilbert", "bart")),
    ALL_PARTS: Kind(
        lambda: UnifiedConfig(preset=ALL_PARTS),
        starts_as_base=False,
        merges="never",
        others=("roberta", "distilbert", "electra", "qwen3", "gemma", "bart", "whisper"),
    ),
}


def is_quick(kind: str, family: str) -> bool:
    """Whether `make test` runs this kind on this family."""
    own = cases.QUICK[list(KINDS).index(kind) % len(cases.QUICK)]
    return family == own or (family in ("bert", "llama") and kind in ("ln", ALL_PARTS))


def neighbour(family: str) -> PeftConfig:
    """An adapter of another kind to stand beside: of norms, where they have parameters and see rows."""
    return BottleneckConfig() if family in ("olmo", "deberta-v2") else LNTuningConfig()


def start(kind: str, model: nn.Module, *names: str) -> PeftModel:
    """A model in evaluation with new adapters of a kind; the first is active."""
    first, *others = names or ("default",)
    model = get_peft_model(model, KINDS[kind].config(), adapter_name=first)
    for name in others:
        model.add_adapter(name, KINDS[kind].config())
    return model.eval()


@torch.no_grad()
def fill(model: PeftModel, name: str = "default", seed: int = 0) -> None:
    """Random values in every tensor that an adapter trains; in a tenth of the entries where it trains chosen ones."""
    if isinstance(model.peft_config[name], FisherLNConfig):
        shapes = {label: delta.shape for label, delta in adapted.deltas(model, name).items()}
        model.base_model.set_masks({n: torch.arange(s.numel()).view(s) % 10 == 0 for n, s in shapes.items()}, name)
    adapted.fill(model, name, 0.2, seed)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if ".lora_" in key and f".{name}." in key:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def filled(kind: str, family: str, *names: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The tiny model of a family with filled adapters of a kind; the first is active."""
    model = start(kind, adapted.build(family, dtype), *names)
    for seed, name in enumerate(names or ("default",)):
        fill(model, name, seed)
    return model
