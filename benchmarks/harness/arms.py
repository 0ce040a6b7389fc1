"""Arms: ways to choose what is trained. One small function each, model -> the same model, ready to train."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.harness.models import head_modules

Tune = Callable[..., nn.Module]
# Ends of transformers' class names, and PEFT's names for what the models do.
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
}
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16}
SPARSITY = 0.2  # where arms with zeros have their rates searched; their other sparsities take those
SHARE = 0.0033  # of the model's entries: what arXiv 2211.08682 gives a prefix and an adapter each


@dataclass(frozen=True)
class Arm:
    """One way to choose what is trained.

    Attributes:
        name: as in cells and tables.
        tune: what it does to a model, and to those coordinates of a cell that it takes.
        rates: learning rates that are tried for it.
        searched_at: further coordinates of the runs that try them.
        rate_of: the arm whose rate it takes, where none is searched for it.
        head_rate_of: the arm whose rate its head takes, where one rate cannot serve both.
        takes: coordinates of a cell that `tune` is told by name.
        parts: what it joins, by the names of `parameter_groups`; each may have a rate of its own, beside the rest.
    """

    name: str
    tune: Tune
    rates: tuple[float, ...]
    searched_at: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str | None = None
    head_rate_of: str | None = None
    takes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


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
    """Return what the arm trains in addition to the head."""
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
        config.modules_to_save = heads
    config.task_type = next((kind for end, kind in TASK_TYPES.items() if type(model).__name__.endswith(end)), None)
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


def _rounded(model: nn.Module) -> nn.Module:
    """Round a model to bfloat16 and keep its norms in it; all other weights, and arithmetic, stay in float32.

    What moves depends on how the tuned tensors are stored, and few processors multiply bfloat16 matrices quickly.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    for name in norm_names(model):
        model.get_submodule(name).bfloat16()
    return model


@arm("stock-ln-bf16", rates=(3e-3, 7e-3, 2e-2))
def stock_ln_bf16(model: nn.Module) -> nn.Module:
    """Train copies of the norms in bfloat16 by PEFT's own LNTuningConfig."""
    return stock_ln(_rounded(model))


@arm("ln-bf16", rates=(3e-3, 7e-3, 2e-2))
def ln_bf16(model: nn.Module) -> nn.Module:
    """Train float32 deltas on every norm by this package, over norms in bfloat16."""
    return ln(_rounded(model))


@arm("lora", rates=(5e-4, 1.5e-3, 5e-3))
def lora(model: nn.Module) -> nn.Module:
    """Train LoRA of rank 8 on query and value: PEFT's default targets, or this package's for models without."""
    import peft
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    from peft_lntune.architectures.table import lora_targets

    config: Any = model.config
    own = None if config.model_type in DEFAULTS else lora_targets(name for name, _ in model.named_modules())
    return _peft(model, peft.LoraConfig(**LORA, target_modules=own and list(own)))


@arm("road")
def road(model: Any) -> nn.Module:
    """Train RoAd on PEFT's default targets."""
    import peft

    return _peft(model, peft.RoadConfig(group_size=math.gcd(64, model.config.hidden_size)))


@arm("ia3")
def ia3(model: nn.Module) -> nn.Module:
    """Train factors of keys, values and of the FFN's input to its last projection, by PEFT's IA3 and its defaults."""
    import peft

    return _peft(model, peft.IA3Config())


@arm("beft")
def beft(model: nn.Module) -> nn.Module:
    """Train a bias of every value projection, by PEFT's BEFT and its defaults."""
    import peft

    return _peft(model, peft.BeftConfig())


def _ln(model: nn.Module, **fields: Any) -> nn.Module:
    from peft_lntune import LNTuningConfig

    return _peft(model, LNTuningConfig(**fields))


@arm("ln", rates=(3e-3, 7e-3, 2e-2), parts=("ln.bias",))
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


@arm("ln-lower", rates=(3e-3, 7e-3, 2e-2))
def ln_lower(model: nn.Module) -> nn.Module:
    """Train deltas on the norms of the lower half of the layers."""
    return _ln(model, layers_to_transform=_layers(model)[: len(_layers(model)) // 2])


@arm("ln-upper", rates=(3e-3, 7e-3, 2e-2))
def ln_upper(model: nn.Module) -> nn.Module:
    """Train deltas on the norms of the upper half of the layers."""
    return _ln(model, layers_to_transform=_layers(model)[len(_layers(model)) // 2 :])


def _layers(model: Any) -> list[int]:
    return list(range(model.config.num_hidden_layers))


@arm("ln-64")
def ln_64(model: nn.Module) -> nn.Module:
    """Train deltas on the norms that read into linear maps; `fit_fisher_masks` is to choose at most 64 entries of each.

    The final norm is left out: its head may be tied to the embeddings. So the adapter exports exactly as LoRA.
    """
    from peft_lntune import FisherLNConfig

    return _peft(model, FisherLNConfig(roles=["attention", "ffn"], density=1.0, max_per_norm=64))


@arm("ln-layer", rate_of="ln", takes=("layer",))
def ln_layer(model: nn.Module, layer: int) -> nn.Module:
    """Train deltas on the norms of one layer."""
    return _ln(model, layers_to_transform=[layer])


def _third(model: Any) -> int:
    return max(1, len(_layers(model)) // 3)


def tune_modules(model: nn.Module, **fields: Any) -> nn.Module:
    """Train deltas on what a `ModuleTuningConfig` of these fields chooses."""
    from peft_lntune import ModuleTuningConfig

    return _peft(model, ModuleTuningConfig(**fields))


def _all_but(*components: str) -> list[str]:
    from peft_lntune.architectures.table import Component

    return [component.value for component in Component if component not in components]


@arm("l0-close", rate_of="full")
def l0_close(model: nn.Module) -> nn.Module:
    """Train all modules but key projections and embeddings."""
    return tune_modules(model, preset="l0-close")


@arm("l0-no-key", rate_of="full")
def l0_no_key(model: nn.Module) -> nn.Module:
    """Train all modules but key projections."""
    return tune_modules(model, components=_all_but("key"))


@arm("l0-no-embedding", rate_of="full")
def l0_no_embedding(model: nn.Module) -> nn.Module:
    """Train all modules but embeddings of words, positions and types."""
    return tune_modules(model, components=_all_but("embedding"))


@arm("l0-no-deepest", rate_of="full")
def l0_no_deepest(model: nn.Module) -> nn.Module:
    """Train all modules but those of the deepest third of the layers, next to the head."""
    return tune_modules(model, components=_all_but(), layers_to_exclude=_layers(model)[-_third(model) :])


@arm("l0-close-no-deepest", rate_of="full")
def l0_close_no_deepest(model: nn.Module) -> nn.Module:
    """Leave out key projections, embeddings and the deepest third of the layers."""
    return tune_modules(model, preset="l0-close", layers_to_exclude=_layers(model)[-_third(model) :])


@arm("l0-no-value", rate_of="full")
def l0_no_value(model: nn.Module) -> nn.Module:
    """Train all modules but value projections: the control of `l0-no-key`, which leaves out as much."""
    return tune_modules(model, components=_all_but("value"))


@arm("l0-no-lowest", rate_of="full")
def l0_no_lowest(model: nn.Module) -> nn.Module:
    """Train all modules but those of the lowest third of the layers: the control of `l0-no-deepest`."""
    return tune_modules(model, components=_all_but(), layers_to_exclude=_layers(model)[: _third(model)])


# One kind of module in all layers (arXiv 2302.00378); norms are the arm `ln`, and the pooler is trained by every arm.
ALONE = ("query", "key", "value", "attention_output", "ffn_up", "ffn_gate", "ffn_down", "embedding")
ALONE_RATES = (5e-5, 1.5e-4, 5e-4, 1.5e-3)

for _component in ALONE:
    arm(_component, ALONE_RATES)(partial(tune_modules, components=[_component]))


# One rate cannot serve both: steps that move a score from 5 to 0 in time make a head diverge.
@arm("supermask", rates=(1e-2, 3e-2, 1e-1, 3e-1), searched_at={"sparsity": SPARSITY}, head_rate_of="head")
def supermask(model: nn.Module, sparsity: float = SPARSITY) -> nn.Module:
    """Train scores of every matrix in the layers; `sparsity` of each starts at zero, the smallest weights first."""
    from peft_lntune import SupermaskConfig

    return _peft(model, SupermaskConfig(initial_sparsity=sparsity))


# The parts of arXiv 2211.08682 and what they are joined to, by the names of UnifiedConfig's presets.
COMBINED = {
    "mha-adapter": (1e-3, 3e-3, 1e-2),
    "ffn-adapter": (1e-3, 3e-3, 1e-2),
    "prefix": (3e-3, 1e-2, 3e-2),
    "mha-adapter+ln": (1e-3, 3e-3, 1e-2),
    "ffn-adapter+ln": (1e-3, 3e-3, 1e-2),
    "prefix+ln": (3e-3, 7e-3, 2e-2),
    "prefix+mha-adapter+ln": (1e-3, 3e-3, 1e-2),
    "mam": (1e-3, 3e-3, 1e-2),
    "mam+ln": (1e-3, 3e-3, 1e-2),
    "lora+ln": (1e-3, 3e-3, 1e-2),
}


def part_size(model: Any) -> int:
    """Return the bottleneck size and the prefix length at which each has about `SHARE` of a model's entries.

    A prefix of P tokens has 2 P d entries per layer; an adapter of size P at one sub-layer also has its biases.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    return max(1, round(SHARE * total / (2 * model.config.hidden_size * model.config.num_hidden_layers)))


def _combined(model: nn.Module, preset: str) -> nn.Module:
    """Train the parts of a preset, adapters and prefixes of `part_size`, LoRA of the rank of its own arm."""
    from peft_lntune import UnifiedConfig

    sizes: dict[str, dict[str, Any]] = {
        "BottleneckConfig": {"bottleneck_size": part_size(model)},
        "PrefixConfig": {"num_virtual_tokens": part_size(model)},
        "LoraConfig": LORA,
    }
    parts = UnifiedConfig(preset=preset).parts or []
    sized = [replace(part, **sizes.get(type(part).__name__, {})) for part in parts]
    with warnings.catch_warnings():  # of an adapter at the FFN with LN: whether it hurts is what is asked here
        warnings.filterwarnings("ignore", message="an adapter at the FFN together with LN-tuning")
        return _peft(model, sized[0] if len(sized) == 1 else UnifiedConfig(parts=sized))


def _parts(preset: str) -> tuple[str, ...]:
    """Return the parts of a preset, where there are several."""
    names = preset.replace("mam", "prefix+ffn-adapter").split("+")
    return tuple(names) if len(names) > 1 else ()


for _preset, _rates in COMBINED.items():
    arm(_preset, _rates, parts=_parts(_preset))(partial(_combined, preset=_preset))
