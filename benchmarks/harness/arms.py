"""Arms: ways to choose what is trained. One small function each, model -> the same model, ready to train."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from benchmarks.harness.models import head_modules

Tune = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Arm:
    """One way to choose what is trained.

    Attributes:
        name: as in cells and tables.
        tune: what it does to a model.
        rates: learning rates that are tried for it.
        searched_at: further coordinates of the runs that try them.
        rate_of: the arm whose rate it takes, where none is searched for it.
    """

    name: str
    tune: Tune
    rates: tuple[float, ...]
    searched_at: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str | None = None


ARMS: dict[str, Arm] = {}


def arm(name: str, rates: tuple[float, ...] = (), **further: Any) -> Callable[[Tune], Tune]:
    """Register a function as the arm `name`; `further` are fields of `Arm`."""

    def add(tune: Tune) -> Tune:
        if name in ARMS:
            raise ValueError(f"There is an arm {name} already; the arms are {sorted(ARMS)}.")
        ARMS[name] = Arm(name, tune, rates, **further)
        return tune

    return add


def find_arm(name: str) -> Arm:
    """Return an arm by name.

    Raises:
        ValueError: there is no such arm.
    """
    if name not in ARMS:
        raise ValueError(f"There is no arm {name!r}; the arms are {sorted(ARMS)}.")
    return ARMS[name]


def norm_names(model: nn.Module) -> list[str]:
    """Return the names of the norms, by class name: what a user of plain lines would write."""
    return [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return what the arm trains beside the head."""
    heads = tuple(head_modules(model))
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(f"{head}." in name for head in heads)
    }


def _train_only(model: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    """Freeze everything but the head and the parameters whose names are chosen."""
    heads = tuple(f"{name}." for name in head_modules(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(heads) or chosen(name))
    return model


def _peft(model: nn.Module, config: Any) -> nn.Module:
    """Wrap a model by PEFT; the head is trained and saved with the adapter."""
    import peft

    heads = [name.split(".")[-1] for name in head_modules(model)]
    if heads:
        config.modules_to_save, config.task_type = heads, "SEQ_CLS"
    elif hasattr(model, "lm_head"):
        config.task_type = "CAUSAL_LM"
    return peft.get_peft_model(model, config)


@arm("head", rates=(1e-3, 3e-3, 1e-2))
def head(model: nn.Module) -> nn.Module:
    """Train the head on a frozen body: the control."""
    return _train_only(model, lambda name: False)


@arm("full", rates=(2e-5, 5e-5, 1.5e-4, 5e-4))
def full(model: nn.Module) -> nn.Module:
    """Train everything."""
    return _train_only(model, lambda name: True)


@arm("plain", rates=(3e-3, 7e-3, 2e-2))
def plain(model: nn.Module) -> nn.Module:
    """Train the norms by plain `requires_grad` lines, without PEFT."""
    norms = tuple(f"{name}." for name in norm_names(model))
    return _train_only(model, lambda name: name.startswith(norms))


@arm("bitfit", rates=(1e-3, 3e-3, 1e-2))
def bitfit(model: nn.Module) -> nn.Module:
    """Train every bias (BitFit)."""
    return _train_only(model, lambda name: name.endswith("bias"))


@arm("stock-ln", rates=(3e-3, 7e-3, 2e-2))
def stock_ln(model: nn.Module) -> nn.Module:
    """Train copies of the norms by PEFT's own LNTuningConfig."""
    import peft

    return _peft(model, peft.LNTuningConfig(target_modules=norm_names(model)))


@arm("lora", rates=(5e-4, 1.5e-3, 5e-3))
def lora(model: nn.Module) -> nn.Module:
    """Train LoRA of rank 8 on PEFT's default targets (query and value)."""
    import peft

    return _peft(model, peft.LoraConfig(r=8, lora_alpha=16))


@arm("road")
def road(model: Any) -> nn.Module:
    """Train RoAd on PEFT's default targets."""
    import peft

    return _peft(model, peft.RoadConfig(group_size=math.gcd(64, model.config.hidden_size)))


def _ln(model: nn.Module, **fields: Any) -> nn.Module:
    from peft_lntune import LNTuningConfig

    return _peft(model, LNTuningConfig(**fields))


@arm("ln", rates=(3e-3, 7e-3, 2e-2))
def ln(model: nn.Module) -> nn.Module:
    """Train deltas on the weight and bias of every norm by this package."""
    return _ln(model)


@arm("ln-weight", rates=(3e-3, 7e-3, 2e-2))
def ln_weight(model: nn.Module) -> nn.Module:
    """Train deltas on the weight of every norm."""
    return _ln(model, tune="weight")


@arm("ln-bias", rates=(3e-3, 7e-3, 2e-2))
def ln_bias(model: nn.Module) -> nn.Module:
    """Train deltas on the bias of every norm."""
    return _ln(model, tune="bias")


@arm("ln-ffn", rates=(3e-3, 7e-3, 2e-2))
def ln_ffn(model: nn.Module) -> nn.Module:
    """Train deltas on the norms of feed-forward layers: BERT's `output.LayerNorm`."""
    return _ln(model, roles=["ffn"])


@arm("ln-attention", rates=(3e-3, 7e-3, 2e-2))
def ln_attention(model: nn.Module) -> nn.Module:
    """Train deltas on the norms of attention layers: BERT's `attention.output.LayerNorm`."""
    return _ln(model, roles=["attention"])
