"""Where the parameters of norms are in a model that is trained: its own, an adapter's copies, or deltas."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peft_lntune.core.delta_module import Delta
from peft_lntune.core.module_tree import is_tuner_layer
from peft_lntune.norms.find import survey
from peft_lntune.norms.names import role_of

__all__ = ["NormParameter", "local", "norm_parameters"]

_ORIGINALS = ("base_layer", "original_module")
_ROLES = {"lntune_weight": "weight", "lntune_bias": "bias"}


@dataclass(frozen=True, eq=False)
class NormParameter:
    """One parameter of a norm.

    Attributes:
        name: its name in the model.
        owner: the module that holds it now.
        key: the attribute of the owner.
        role: `"weight"` or `"bias"`.
        neutral: the value without effect that weight decay should not pull it from: 1 for a gain, 0 for a bias, a gain
            that is stored minus 1, and a delta.
        adapter: the adapter that the parameter belongs to; None for the model's own.
        layer: the tuner's layer around it; None without an adapter.
    """

    name: str
    owner: nn.Module
    key: str
    role: str
    neutral: float
    adapter: str | None = None
    layer: Any = None

    @property
    def tensor(self) -> Tensor:
        """The parameter."""
        found = self.owner._parameters[self.key]
        assert found is not None
        return found

    @property
    def is_active(self) -> bool:
        """Whether the model computes with it now."""
        if self.layer is None:
            return True
        return not self.layer.disable_adapters and self.adapter in self.layer.active_adapters


def local(tensor: Tensor) -> Tensor:
    """The values of a tensor, without a graph; of a sharded one, those of this process.

    Args:
        tensor: a parameter or a gradient.

    Returns:
        A tensor that shares its memory.
    """
    plain = tensor.detach()
    shard = getattr(plain, "to_local", None)
    return plain if shard is None else shard()


def norm_parameters(model: nn.Module) -> list[NormParameter]:
    """Find the parameters of all norms of a model, BatchNorm included, and of their adapters.

    Copies of PEFT (`modules_to_save`, its own `LN_TUNING`) and deltas of this package are listed by adapter; the
    originals behind them are left out, as nobody trains those.

    Args:
        model: a plain model or a `PeftModel`; it is not run or changed.

    Returns:
        The parameters, in the order of the model's modules.

    Example:
        >>> [found.name for found in norm_parameters(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))]
        ['1.weight', '1.bias']
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if is_tuner_layer(module)}
    norms, missed = survey({name: module for name, module in modules.items() if name not in layers})
    offsets = {name: norm.offset for name, norm in norms.items()} | dict.fromkeys(missed, 0.0)
    wrapped = {modules[name] for name in offsets}
    found: list[NormParameter] = []
    for name, module in modules.items():
        if name in layers:
            continue
        if isinstance(module, Delta):
            above, container, adapter = _place(name, layers)
            if above in layers and _inner(layers[above]) in wrapped and container in _ROLES:
                found += _own(name, module, 0.0, adapter, layers[above], _ROLES[container])
        elif name in offsets:
            above, container, adapter = _place(name, layers)
            if above not in layers:
                found += _own(name, module, offsets[name])
            elif container not in _ORIGINALS:
                found += _own(name, module, offsets[name], adapter, layers[above])
            elif not _is_copied(layers[above]):
                found += _own(name, module, offsets[name])
    return found


def _own(
    name: str,
    module: nn.Module,
    offset: float,
    adapter: str | None = None,
    layer: Any = None,
    role: str | None = None,
) -> Iterator[NormParameter]:
    for key, value in module._parameters.items():
        if value is None or not value.is_floating_point():
            continue
        its = role or role_of(module, key)
        neutral = 1 - offset if its == "weight" and role is None else 0.0
        yield NormParameter(f"{name}.{key}" if name else key, module, key, its, neutral, adapter, layer)


def _place(name: str, layers: dict[str, nn.Module]) -> tuple[str | None, str, str]:
    """The innermost tuner layer above a module, and the container and the adapter's name below that layer."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        above = ".".join(parts[:end])
        if above in layers:
            return above, parts[end], parts[end + 1] if end + 1 < len(parts) else ""
    return None, "", ""


def _inner(layer: Any) -> nn.Module:
    while is_tuner_layer(layer):
        layer = next(layer._modules[key] for key in _ORIGINALS if layer._modules.get(key) is not None)
    return layer


def _is_copied(layer: nn.Module) -> bool:
    """Whether an adapter trains a copy or a delta in place of the original; LoRA on a sub-layer does not."""
    kinds = [key for key in layer._modules if key not in _ORIGINALS]
    return any(len(getattr(layer, key)) > 0 for key in kinds if isinstance(getattr(layer, key), nn.ModuleDict))
