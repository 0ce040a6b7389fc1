"""Parameter groups of an optimizer by what the parameters are: norms, other parts of an adapter, heads."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from numbers import Real
from typing import Any

from peft import PeftConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.optim import Optimizer

from peft_lntune.config import FisherLNConfig, LNTuningConfig, ModuleTuningConfig, parts_of
from peft_lntune.config.deltas import DeltaConfig
from peft_lntune.core.delta import PARAMETERS
from peft_lntune.core.groups import HEAD, Member, group_members
from peft_lntune.core.module_tree import base_modules
from peft_lntune.errors import ConfigError
from peft_lntune.layers import ReplacementLayer
from peft_lntune.layers.bottleneck import BottleneckLayer
from peft_lntune.layers.prefix import PrefixLayer
from peft_lntune.norms.find import find_norms
from peft_lntune.norms.names import role_of
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.plan import plan_parts
from peft_lntune.tuner.model import LNTuneModel

__all__ = ["grouped_optimizer", "parameter_groups"]

_BODY = "body"
_DELTA_PARTS: dict[type[PeftConfig], str] = {
    FisherLNConfig: "fisher-ln",
    LNTuningConfig: "ln",
    ModuleTuningConfig: "modules",
}
_ADAPTERS = {"attention": "mha-adapter", "cross_attention": "cross-adapter", "ffn": "ffn-adapter"}
_LORA_PLUS = ("lora.A", "lora.embedding", "lora.B", "lora.B")  # the groups of PEFT's LoRA+, in its order

Rates = Mapping[str, float]


def parameter_groups(
    model: nn.Module,
    lr: float,
    head_lr: float | None = None,
    parts: Rates | None = None,
    *,
    heads: Sequence[str] = (),
    weight_decay: float | Rates = 0.0,
    loraplus_lr_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters of a model by what they are, each group with its learning rate.

    Every parameter that requires a gradient is in exactly one group. Call it after `fit_fisher_masks` and `set_masks`,
    which replace parameters.

    Groups by name:

    - `ln.weight`, `ln.bias`: gains and biases of norms: deltas, PEFT's own LN tuning, or the norms themselves
    - `fisher-ln.weight`, `fisher-ln.bias`: the same of a `FisherLNConfig`, masked or not
    - `modules.weight`, `modules.bias`: deltas of a `ModuleTuningConfig`
    - `prefix`, `supermask`: of a `PrefixConfig` and a `SupermaskConfig`
    - `mha-adapter`, `cross-adapter`, `ffn-adapter`: bottlenecks, by sub-layer
    - `lora`: LoRA; with `loraplus_lr_ratio`, `lora.A`, `lora.B` and `lora.embedding`
    - `body`: other trainable parameters of the model, as in full fine-tuning
    - `head`: modules in `modules_to_save`, and those named in `heads`

    Other PEFT methods are named by their type, such as `ia3`. Parameters of several active adapters share the groups.

    Args:
        model: a `PeftModel`, or any module with trainable parameters, also wrapped by DDP, FSDP or `torch.compile`.
        lr: learning rate of all groups without their own.
        head_lr: learning rate of the heads; None: `lr`.
        parts: learning rates by these names, with (`"ln.bias"`) or without (`"ln"`) what follows the dot;
            the longer name wins.
        heads: names of modules of the model that are heads, for models without `modules_to_save`; the end of a name is
            enough.
        weight_decay: weight decay of the parameters that Trainer would decay: not gains, biases, deltas and masks. Or
            weight decays by name, which apply to all parameters of these groups, heads as `"head"`; the others have 0.
        loraplus_lr_ratio: LoRA+: ratio of the learning rates of LoRA's B and A, by PEFT's
            `create_loraplus_optimizer`, which also chooses the rate of LoRA on embeddings. None: one rate.

    Returns:
        Groups with `params`, `name`, `lr` and `weight_decay`, heads last. Where some parameters of a name decay and
        some do not, the latter are in `<name> (no decay)`.

    Raises:
        ConfigError: a rate is negative or no number; `parts`, `weight_decay` or `heads` name what the model does not
            have; `head_lr` is given, and no head is known; nothing is trainable; LoRA+ without LoRA; or one parameter
            is at two places that are in groups with different settings.

    Source:
        LoRA+: Hayou et al. 2024 (arXiv 2402.12354).

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from peft_lntune import UnifiedConfig
        >>> sizes = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> peft_model = get_peft_model(model, UnifiedConfig(preset="prefix+ln", task_type="SEQ_CLS"))
        >>> groups = parameter_groups(peft_model, lr=1e-3, head_lr=5e-3, parts={"prefix": 1e-2})
        >>> {group["name"]: group["lr"] for group in groups}
        {'ln.weight': 0.001, 'ln.bias': 0.001, 'prefix': 0.01, 'head': 0.005}
        >>> optimizer = torch.optim.AdamW(groups)
    """
    given = {} if parts is None else dict(parts)
    decay_of = weight_decay if isinstance(weight_decay, Mapping) else {}
    numbers = {
        "lr": lr,
        **({} if head_lr is None else {"head_lr": head_lr}),
        **{f"parts[{name!r}]": rate for name, rate in given.items()},
        **({f"weight_decay[{name!r}]": value for name, value in decay_of.items()} or {}),
        **({} if isinstance(weight_decay, Mapping) else {"weight_decay": weight_decay}),
        **({} if loraplus_lr_ratio is None else {"loraplus_lr_ratio": loraplus_lr_ratio}),
    }
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
            raise ConfigError(f"{name} should be a number of at least 0, but got {value!r}.")
    _warn_of_missing_masks(model)
    kinds = _kinds(model, heads)
    if not kinds:
        raise ConfigError("no parameter of this model requires a gradient. Make an adapter active, or unfreeze one.")
    found = dict.fromkeys(kinds.values())
    names = [*(name for name in found if name != HEAD), *([HEAD] if HEAD in found else [])]
    known = list(dict.fromkeys(each for name in names if name != HEAD for each in (name.partition(".")[0], name)))
    if head_lr is not None and HEAD not in names:
        raise ConfigError(
            f"head_lr={head_lr!r}, but no head of this model is trained: it has {', '.join(names)}. Name the head in "
            "modules_to_save of the config, or in heads."
        )
    for argument, asked in {"parts": given, "weight_decay": decay_of}.items():
        allowed = known if argument == "parts" else [*known, *names[-1:]]
        unknown = [name for name in asked if name not in allowed]
        if unknown:
            hint = " The rate of heads is head_lr." if unknown[0] == HEAD else ""
            raise ConfigError(f"{argument} names {unknown[0]!r}; this model trains {', '.join(allowed)}.{hint}")
    rates = {name: _most_specific(given, name, lr) for name in names}
    if head_lr is not None:
        rates[HEAD] = head_lr
    if loraplus_lr_ratio is not None:
        kinds, rates = _with_lora_plus(model, kinds, rates, loraplus_lr_ratio)
    if isinstance(weight_decay, Mapping):
        decays = {name: _most_specific(decay_of, name, 0.0) for name in rates}
        decayed = {place for place, kind in kinds.items() if decays[kind]}
    else:
        decays = dict.fromkeys(rates, weight_decay)
        decayed = _decayed_by_trainer(model) if weight_decay else set()
    tensors = dict(model.named_parameters(remove_duplicate=False))
    members = [Member(place, tensors[place], kind, place in decayed) for place, kind in kinds.items()]
    return group_members(members, rates, decays)


def grouped_optimizer(args: Any, head_lr: float | None = None, parts: Rates | None = None, **options: Any) -> Any:
    """Let Trainer make the optimizer that `args.optim` names, over `parameter_groups` of its model.

    The groups are made when Trainer makes its optimizer, from the model as Trainer has wrapped it, with
    `args.learning_rate` and `args.weight_decay`. Trainer's schedule, `args.optim_args` and checkpoints work as usual.
    For 8-bit optimizers, Trainer by itself keeps the states of embeddings in 32 bits; with groups they are 8-bit too.

    Args:
        args: the `TrainingArguments`, or those of a TRL trainer.
        head_lr: learning rate of the heads; None: `args.learning_rate`.
        parts: learning rates by part, see `parameter_groups`.
        **options: further arguments of `parameter_groups`: `heads`, `weight_decay`, `loraplus_lr_ratio`.

    Returns:
        The argument `optimizer_cls_and_kwargs` of Trainer and of TRL's trainers.

    Raises:
        ConfigError: an option is unknown. When the optimizer is made: what `parameter_groups` raises, or the optimizer
            that `args.optim` names chooses its parameters by itself.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> args = TrainingArguments("out", learning_rate=1e-3)
        >>> chosen = grouped_optimizer(args, head_lr=5e-3)
        >>> make = lambda model: Trainer(model, args, optimizer_cls_and_kwargs=chosen)
    """
    takes = inspect.signature(parameter_groups).parameters
    unknown = sorted(options.keys() - takes.keys() | options.keys() & {"model", "lr"})
    if unknown:
        raise ConfigError(f"grouped_optimizer has no option {unknown[0]!r}; the rate of all parts is in args.")
    chosen = {"head_lr": head_lr, "parts": parts, "weight_decay": args.weight_decay, **options}
    return partial(_Grouped, args, chosen), {}


class _Grouped:
    """What Trainer calls a factory: it is called with the model when the optimizer is made."""

    def __init__(self, args: Any, chosen: Mapping[str, Any]) -> None:
        self._args, self._chosen = args, chosen

    def __call__(self, model: nn.Module) -> Optimizer:
        from transformers import Trainer  # slow to import

        made, options = Trainer.get_optimizer_cls_and_kwargs(self._args, model)
        own = {"params", "model", "optimizer_dict"} & options.keys()
        if own or not (isinstance(made, type) and issubclass(made, Optimizer)):
            raise ConfigError(
                f"optim={str(self._args.optim)!r} chooses its parameters by itself, so it takes no groups. Use another "
                "optim, such as 'adamw_torch', or leave out optimizer_cls_and_kwargs."
            )
        return made(parameter_groups(model, self._args.learning_rate, **self._chosen), **options)


def _most_specific(given: Rates, name: str, default: float) -> float:
    return given.get(name, given.get(name.partition(".")[0], default))


def _warn_of_missing_masks(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LNTuneModel):
            module.warn_of_missing_masks(module.active_adapters)


def _decayed_by_trainer(model: nn.Module) -> set[str]:
    """The parameters that transformers' Trainer decays, by name."""
    from transformers import Trainer  # slow to import

    return set(Trainer.get_decay_parameter_names(None, model))


def _with_lora_plus(
    model: nn.Module, kinds: Mapping[str, str], rates: Rates, ratio: float
) -> tuple[dict[str, str], dict[str, float]]:
    """Split the group of LoRA as PEFT's LoRA+ does, with its rates."""
    if "lora" not in rates:
        raise ConfigError(f"loraplus_lr_ratio={ratio!r}, but no LoRA is trained: this model trains {', '.join(rates)}.")
    made: Any = create_loraplus_optimizer(model, _keep, lr=rates["lora"], loraplus_lr_ratio=ratio)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    own: dict[int, str] = {}
    plus: dict[str, float] = {}
    for name, group in zip(_LORA_PLUS, made, strict=True):
        own |= {id(tensor): name for tensor in group["params"]}
        plus[name] = group["lr"]
    split = {place: own[id(tensors[place])] if kind == "lora" else kind for place, kind in kinds.items()}
    used = {name: rate for name, rate in plus.items() if name in split.values()}
    return split, {
        name: rate for kind, each in rates.items() for name, rate in (used if kind == "lora" else {kind: each}).items()
    }


def _keep(groups: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Stands in for an optimizer class: gives the groups back."""
    return groups


def _kinds(model: nn.Module, heads: Sequence[str]) -> dict[str, str]:
    """The group of each trainable parameter, by every name it has in the model."""
    reader = _Reader(model, heads)
    trained = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    missing = [head for head in heads if not any(_ends(name, head) for name in reader.modules)]
    if missing:
        raise ConfigError(f"heads names {missing[0]!r}, and no module of this model has a name that ends with it.")
    return {name: reader.kind(name) for name in trained}


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


class _Reader:
    """Tells what a parameter is from the modules that it is in.

    Args:
        model: the model.
        heads: ends of the names of modules that are heads.
    """

    def __init__(self, model: nn.Module, heads: Sequence[str]) -> None:
        self.model, self.heads = model, heads
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._delta_parts: dict[str, dict[str, str] | str] = {}

    def kind(self, name: str) -> str:
        """The group of a parameter."""
        around = list(self._around(name))
        for module, rest in around:
            found = self._of_peft(module, rest)
            if found is not None:
                return found
        places = [name.removesuffix("." + ".".join(rest)) for _, rest in around]
        if any(_ends(place, head) for place in places for head in self.heads):
            return HEAD
        owner, (own,) = around[-1]
        return f"ln.{role_of(owner, own)}" if id(owner) in self._norms else _BODY

    def _around(self, name: str) -> Iterator[tuple[nn.Module, list[str]]]:
        """The modules around a parameter, from the model inwards, with the rest of its name there."""
        path = name.split(".")
        for cut in range(len(path)):
            module = self.modules.get(".".join(path[:cut]))
            if module is not None and not isinstance(module, nn.ParameterDict):
                yield module, path[cut:]

    def _of_peft(self, module: nn.Module, rest: list[str]) -> str | None:
        """The group of a parameter that PEFT or this package has put at a module; None for those of the model."""
        if isinstance(module, ModulesToSaveWrapper):
            return HEAD
        if isinstance(module, AuxiliaryTrainingWrapper):
            return "tokens" if rest[0] != "original_module" else None
        if isinstance(module, PeftModel) and rest[0] == "prompt_encoder":
            return str(self._configs[rest[1]].peft_type.value).lower()
        if not isinstance(module, BaseTunerLayer):
            return None
        if rest[0] not in {*module.adapter_layer_names, *module.other_param_names} - {"base_layer"}:
            return None
        if isinstance(module, BottleneckLayer):
            return _ADAPTERS[module.role]
        if isinstance(module, PrefixLayer):
            return "prefix"
        if isinstance(module, LoraLayer):
            return "lora"
        if isinstance(module, ReplacementLayer):
            parameter = rest[0].removeprefix(LNTuneModel.prefix)
            return f"{self._delta_part(rest[1], module.label)}.{parameter}" if parameter in PARAMETERS else parameter
        if rest[0] == "ln_tuning_layers":
            return f"ln.{role_of(module.get_submodule('.'.join(rest[:-1])), rest[-1])}"
        return str(self._configs[rest[1]].peft_type.value).lower()

    @cached_property
    def _configs(self) -> Mapping[str, PeftConfig]:
        """The configs by adapter name, of the outermost module that has some."""
        found = (getattr(module, "peft_config", None) for module in self.model.modules())
        return next((each for each in found if isinstance(each, dict) and each), {})

    def _delta_part(self, adapter_name: str, label: str) -> str:
        """The name of the part that tunes a module by deltas."""
        if adapter_name not in self._delta_parts:
            self._delta_parts[adapter_name] = self._read_delta_parts(adapter_name)
        found = self._delta_parts[adapter_name]
        return found if isinstance(found, str) else found[label]

    def _read_delta_parts(self, adapter_name: str) -> dict[str, str] | str:
        """The part's name for all modules, or by module where the adapter has several parts with deltas."""
        config = self._configs[adapter_name]
        own = [part for part in parts_of(config) if isinstance(part, DeltaConfig)]
        if len({_delta_name(part) for part in own}) == 1:
            return _delta_name(own[0])
        base = next(module.model for module in self.model.modules() if isinstance(module, LNTuneModel))
        planned = plan_parts(ModelFacts(base), config)
        return {place: _delta_name(p) for p, plan in planned if isinstance(p, DeltaConfig) for place in plan.parts}

    @cached_property
    def _norms(self) -> set[int]:
        modules = base_modules(self.model)
        return {id(modules[name]) for name in find_norms(self.model)}


def _delta_name(part: PeftConfig) -> str:
    return next(_DELTA_PARTS[kind] for kind in type(part).__mro__ if kind in _DELTA_PARTS)
