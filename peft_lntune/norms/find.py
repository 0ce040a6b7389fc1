"""Find the norms of a model by what they compute, and list modules that look like norms but are not.

Lists of names and classes go out of date (transformers alone has over two hundred RMSNorm classes). So a module is a
norm when a run shows that its output is affine in its weight and bias and independent of its input's scale; see
`peft_lntune.norms.probe`. Names only decide which of the other modules are listed as missed, with the reason.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from peft_lntune.architectures.roles import find_roles
from peft_lntune.core.delta import PARAMETERS
from peft_lntune.core.module_tree import base_modules
from peft_lntune.norms import probe
from peft_lntune.norms.names import is_usual, own_name, own_parameter, role_of

__all__ = [
    "Missed",
    "Norm",
    "find_missed",
    "find_norms",
    "looks_like_norm",
    "survey",
]

_MAX_ENTRIES = 2**20  # no norm has a larger weight, and a probe of this size takes milliseconds
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_NEVER = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Norm:
    """One norm of a model: `y = xhat * (weight + offset) + bias`.

    Attributes:
        name: the module's name in the model.
        module_class: the name of its class.
        roles: the sub-layers it serves, see `peft_lntune.architectures.roles`; empty where the structure is unknown.
        weight_shape: `(d,)`, or `(heads, d)` with one row per head, or another shape that broadcasts over the input;
            None for a norm without parameters.
        bias_shape: shape of the bias, that of the weight; None without a bias.
        offset: 1.0 for zero-centred norms (Gemma multiplies by 1 + weight), 0.0 for others.
        axis: -1 where the parameters match the input's last dimensions, 1 where they match its channels (GroupNorm).
        parameters: the module's own names for its weight and bias, such as `gamma` and `beta`.
        by_sample: whether the module does more: an activation after the norm, a gate that also multiplies the bias, or
            outputs in a tuple. Then its own forward runs once per sample of a mixed batch.
    """

    name: str
    module_class: str
    roles: tuple[str, ...]
    weight_shape: tuple[int, ...] | None
    bias_shape: tuple[int, ...] | None
    offset: float
    axis: int = -1
    parameters: Mapping[str, str] = field(default_factory=lambda: {name: name for name in PARAMETERS}, hash=False)
    by_sample: bool = False


@dataclass(frozen=True)
class Missed:
    """A module that looks like a norm but cannot be tuned as one.

    Attributes:
        name: the module's name in the model.
        module_class: the name of its class.
        roles: the sub-layers it serves; empty where the structure is unknown.
        reason: why it cannot be tuned as a norm.
    """

    name: str
    module_class: str
    roles: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.module_class}): {self.reason}"


def find_norms(model: nn.Module, *, parameterless: bool = False) -> dict[str, Norm]:
    """Find the norms of a model, in the order of `named_modules`.

    The model itself is not run or changed. Leaves of a suitable size are run as small copies, identical ones only once.
    So the model may be on meta, quantized or already adapted; a wrapped norm is found under its wrapper's name.

    Args:
        model: any module.
        parameterless: also list norms without a weight. They cannot be tuned.

    Returns:
        The norms by module name.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
        >>> {name: norm.weight_shape for name, norm in find_norms(model).items()}
        {'1': (4,)}
    """
    return survey(base_modules(model), parameterless=parameterless)[0]


def find_missed(model: nn.Module) -> dict[str, Missed]:
    """Find the modules that look like norms but cannot be tuned as norms.

    Args:
        model: any module; it is not run or changed.

    Returns:
        The modules by name, each with the reason.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
        >>> print(find_missed(model)["2"].reason)
        BatchNorm normalizes by a statistic of the batch
    """
    return survey(base_modules(model))[1]


def survey(
    modules: Mapping[str, nn.Module], *, parameterless: bool = False
) -> tuple[dict[str, Norm], dict[str, Missed]]:
    """Find the norms of a model, and the modules that look like norms but cannot be tuned as norms.

    Args:
        modules: the `base_modules` of the model.
        parameterless: also list norms without a weight.

    Returns:
        The norms by name, and the other modules by name with the reason.
    """
    seen: dict[tuple[object, ...], probe.NormFacts | str] = {}
    found: dict[str, tuple[nn.Module, probe.NormFacts]] = {}
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        reason = _reason_not_to_run(module)
        if reason is None and (parameterless or _own(module)):
            key = (probe.signature(module), _device(module))
            if key not in seen:
                seen[key] = probe.examine(module)
            facts = seen[key]
            if isinstance(facts, probe.NormFacts):
                found[name] = module, facts
                continue
            reason = facts
        if reason and looks_like_norm(module, reason):
            reasons[name] = reason
    roles = find_roles(modules, [*found, *reasons])
    norms = {
        name: Norm(
            name=name,
            module_class=type(module).__name__,
            roles=roles[name],
            weight_shape=_shape(module, "weight"),
            bias_shape=_shape(module, "bias"),
            offset=facts.offset,
            axis=facts.axis,
            parameters={parameter: own_name(module, parameter) for parameter in PARAMETERS},
            by_sample=facts.by_sample,
        )
        for name, (module, facts) in found.items()
    }
    missed = {name: Missed(name, _class_name(modules[name]), roles[name], reason) for name, reason in reasons.items()}
    return norms, missed


_CALLED_NORM = re.compile(r"norm(?!al(?!i[sz]))", re.IGNORECASE)
_IS_NORM = re.compile(r"(norm|normali[sz]ation)\d*d?(gated|act)?$", re.IGNORECASE)


def looks_like_norm(module: nn.Module, reason: str = "raised") -> bool:
    """Whether a module with its own parameters looks like a norm to a reader.

    The name of its class decides, or of a class that it inherits from. A module that could not be run also looks like a
    norm if its only parameters are one or two small vectors with the usual names. A module that ran and proved to be
    something else does not.

    Args:
        module: any module.
        reason: the reason that `peft_lntune.norms.probe.examine` gave for it.

    Returns:
        True where it looks like a norm.

    Example:
        >>> looks_like_norm(nn.BatchNorm1d(4)), looks_like_norm(nn.PReLU(4), "its output is computed entry by entry")
        (True, False)
    """
    own = _own(module)
    if not (own or parametrize.is_parametrized(module)) or isinstance(module, _NEVER):
        return False
    name = _class_name(module)
    lazy = any(isinstance(value, UninitializedParameter) for value in own.values())
    if _has_parts(module):  # a block may be called after its norms, and have a scale of its own
        return _IS_NORM.search(name) is not None
    if any(_CALLED_NORM.search(kind) for kind in (name, *_inherited(module))):
        # The class of a linear layer with normalized weights may also have "norm" in its name.
        return lazy or not (
            reason == probe.SHAPE and any(max(p.dim(), 1) > 1 and min(p.shape) > 1 for p in own.values())
        )
    if lazy or not reason.startswith("raised") or "weight" not in {role_of(module, key) for key in own}:
        return False
    return len(own) <= 2 and all(
        is_usual(key) and value.is_floating_point() and 2 <= value.numel() == max(value.shape, default=0)
        for key, value in own.items()
    )


def _reason_not_to_run(module: nn.Module) -> str | None:
    """Why a module cannot be tuned as a norm, as far as known without a run; empty where it does not look like one.

    A norm is a leaf whose only parameters are a small floating-point weight and possibly a bias of the same shape.
    """
    if isinstance(module, _NEVER):
        return ""
    own = _own(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a scripted module (torch.jit) runs with its own parameters alone" if own else ""
    if parametrize.is_parametrized(module):
        return "it is parametrized: make that permanent with torch.nn.utils.parametrize.remove_parametrizations"
    if not own:
        # A norm without parameters has no children; containers do.
        return "" if module._modules or type(module).forward is nn.Module.forward else None
    if any(isinstance(value, UninitializedParameter) for value in own.values()):
        return "its parameters are not initialized yet; run the model once first"
    if isinstance(module, _BATCH_NORM):
        return "BatchNorm normalizes by a statistic of the batch"
    if getattr(module, "track_running_stats", False):
        return "it normalizes by a running statistic (track_running_stats)"
    if _has_parts(module):
        return "it has parameters of its own beside submodules with parameters"
    names = {own_name(module, parameter): parameter for parameter in PARAMETERS}
    weight, bias = own_parameter(module, "weight"), own_parameter(module, "bias")
    if not own.keys() <= names.keys():
        return f"its parameters are named {', '.join(own)}, and a norm has a weight and perhaps a bias"
    if weight is None:
        return f"its parameters are named {', '.join(own)}, and none is a weight"
    if not weight.is_floating_point():
        return f"its weight is of dtype {weight.dtype}"
    if weight.numel() > _MAX_ENTRIES:
        return f"its weight has {weight.numel():,} entries, more than the {_MAX_ENTRIES:,} of any norm"
    if bias is not None and bias.shape != weight.shape:
        return f"its bias is of shape {tuple(bias.shape)}, and its weight of {tuple(weight.shape)}"
    return None


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in module._parameters.items() if value is not None}


def _has_parts(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters())


def _class_name(module: nn.Module) -> str:
    return str(getattr(module, "original_name", type(module).__name__))  # a scripted module names its original class


def _inherited(module: nn.Module) -> list[str]:
    """The names of the classes that a module's class inherits from, up to torch's `Module`."""
    return [kind.__name__ for kind in type(module).__mro__[1:] if issubclass(kind, nn.Module)]


def _device(module: nn.Module) -> torch.device | None:
    return next((value.device for value in _own(module).values()), None)


def _shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    parameter = module._parameters.get(own_name(module, name))
    return None if parameter is None else tuple(parameter.shape)
