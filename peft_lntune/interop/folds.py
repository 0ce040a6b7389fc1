"""Which norms of a model can be folded into the linear maps that read them, and why others cannot."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.utils.integrations import dequantize_module_weight
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lntune.core.module_tree import base_modules
from peft_lntune.interop.answers import answers
from peft_lntune.layers.offloaded import all_onloaded, is_offloaded, onloaded
from peft_lntune.norms.consumers import Consumers, find_consumers
from peft_lntune.norms.find import Norm, find_norms
from peft_lntune.norms.names import own_parameter

__all__ = ["Fold", "linear_maps", "plan_folds", "weight_of"]


@dataclass(frozen=True, eq=False)
class Fold:
    """The change of one norm, to be folded into the linear maps that read it.

    Attributes:
        norm: name of the norm.
        gain: `(d,)`, what the norm multiplies by without the adapter, its offset included; float32 or wider.
        delta: `(d,)`, the change of the gain; float32 or wider.
        shift: `(d,)`, what the change leaves to add to the norm's output: zero but for a norm with a bias.
        consumers: names of all linear maps that read the norm.
    """

    norm: str
    gain: Tensor
    delta: Tensor
    shift: Tensor
    consumers: tuple[str, ...]

    @property
    def entries(self) -> int:
        """The number of entries of the gain that are changed: the rank of the change."""
        return int(self.delta.count_nonzero())

    @property
    def factor(self) -> Tensor:
        """What the norm's output is multiplied by, `1 + delta / gain`, in float64."""
        tuned = self.delta != 0
        return 1 + torch.where(tuned, self.delta.double() / torch.where(tuned, self.gain, 1).double(), 0)


def plan_folds(
    model: nn.Module, deltas: Mapping[str, Mapping[str, Tensor]], inputs: Mapping[str, Any], heads: Iterable[str] = ()
) -> tuple[list[Fold], dict[str, str]]:
    """Plan how the changes of norms are folded into the linear maps that read them.

    The model runs once on the inputs, and every operation that reads the output of a norm is seen.

    Args:
        model: the base model, without adapters, in evaluation mode.
        deltas: for each changed module the change of its `"weight"` and `"bias"`, in the shapes of the parameters.
        inputs: inputs of the model.
        heads: names of linear maps that the adapter holds whole, so that they may change in any way.

    Returns:
        The folds in the order of `deltas`, and for each module that cannot be folded the reason.
    """
    modules = base_modules(model)
    norms, linears, heads = find_norms(model), linear_maps(model), set(heads)
    read = find_consumers(
        {name: modules[name] for name in deltas if name in norms}, linears, modules, lambda: answers(model, inputs)
    )
    folds, reasons, owners = [], {}, _owners(model)
    for name, own in deltas.items():
        reason = _reason(norms.get(name), type(modules[name]).__name__, read.get(name))
        fold = None
        if reason is None:
            fold = _fold(norms[name], modules[name], own, read[name])
            reason = _reason_of_values(fold) or _reason_of_linears(fold, linears, model, heads, owners)
        if fold is None or reason is not None:
            reasons[name] = reason or ""
        else:
            folds.append(fold)
    return folds, reasons


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a model that LoRA can be put on, quantized ones included.

    Args:
        model: a model without adapters.

    Returns:
        The modules by name.
    """
    return {name: module for name, module in base_modules(model).items() if _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    sizes = [getattr(module, size, None) for size in ("in_features", "out_features")]  # classes of quantizers
    return all(isinstance(size, int) for size in sizes) and not list(module.children())


@torch.no_grad()
def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear map, dequantized where it is quantized.

    Args:
        linear: one of `linear_maps`.

    Returns:
        The weight, `(out, in)`.

    Example:
        >>> weight_of(Conv1D(3, 2)).shape
        torch.Size([3, 2])
    """
    own: Any = linear
    with all_onloaded(own):
        if isinstance(own, Conv1D):
            return own.weight.detach().mT.clone()
        weight = dequantize_module_weight(own) if hasattr(own, "weight") or hasattr(own, "W_q") else None
        if (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and weight.shape == (own.out_features, own.in_features)
        ):
            return weight.detach().clone() if is_offloaded(own) else weight.detach()
        return _measured(own)


def _measured(linear: Any) -> Tensor:
    """The weight of a linear map of an unknown class, from its outputs for unit vectors."""
    tensors = [*linear.parameters(), *linear.buffers()]
    halves = [tensor.dtype for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]
    unit = torch.eye(linear.in_features, dtype=halves[0] if halves else torch.float32, device=tensors[0].device)
    return (linear(unit).double() - linear(torch.zeros_like(unit[:1])).double()).mT.float()


def _fold(norm: Norm, module: nn.Module, own: Mapping[str, Tensor], read: Consumers) -> Fold:
    with onloaded(module):
        weight, bias = own_parameter(module, "weight").detach(), own_parameter(module, "bias")
        delta = own.get("weight", torch.zeros_like(weight, dtype=torch.float32))
        wide = torch.promote_types(delta.dtype, torch.float32)
        fold = Fold(norm.name, weight.to(wide) + norm.offset, delta.to(wide), torch.zeros_like(delta), (*read.linears,))
        if bias is None:
            return fold
        # The norm's own bias is scaled together with its gain, which must be taken back.
        shift = own["bias"].double() if "bias" in own else torch.zeros_like(bias, dtype=torch.float64)
        return replace(fold, shift=shift - (fold.factor - 1) * bias.detach().double())


def _reason(norm: Norm | None, kind: str, read: Consumers | None) -> str | None:
    """Why the structure around a module forbids to fold it."""
    if norm is None:
        return f"{kind} is no norm, so its change is no scale of its output"
    if norm.by_sample:
        return "it does more than normalize (a gate, an activation, or several outputs)"
    if norm.axis != -1 or norm.weight_shape is None or len(norm.weight_shape) != 1:
        return f"its gain, of shape {norm.weight_shape}, does not scale the last dimension alone"
    if read is None:
        return "it did not run on these inputs; pass batches that reach it"
    if read.others:
        by = " and ".join(read.others[:2]) + (f" and {len(read.others) - 2} more" if len(read.others) > 2 else "")
        what = "it normalizes queries or keys: " if "qk" in norm.roles else ""
        return f"{what}its output is {'also ' if read.linears else ''}read by {by}"
    return None if read.linears else "no linear map reads its output"


def _reason_of_values(fold: Fold) -> str | None:
    """Why the values of a norm forbid to fold its change."""
    lost = ((fold.delta != 0) & (fold.gain == 0)).nonzero().reshape(-1).tolist()
    if lost:
        return f"its gain is 0 at {len(lost)} tuned entries, such as entry {lost[0]}, where nothing is left to scale"
    return None


def _owners(model: nn.Module) -> dict[nn.Parameter, dict[nn.Module, str]]:
    """The modules of each `weight`, with their names."""
    owners: dict[nn.Parameter, dict[nn.Module, str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(weight, {})[module] = name
    return owners


def _is_for_experts(name: str, model: nn.Module) -> bool:
    """Whether PEFT takes this target for one of the experts, which transformers 5 fuses into one parameter.

    It goes by the last name, so it takes a dense layer or a shared expert of such a model for one too
    (huggingface/peft#3711).
    """
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # gate_proj without up_proj
        return True
    return name not in (config.target_modules or ())


def _reason_of_linears(
    fold: Fold,
    linears: Mapping[str, nn.Module],
    model: nn.Module,
    heads: set[str],
    owners: Mapping[nn.Parameter, Mapping[nn.Module, str]],
) -> str | None:
    """Why the linear maps that read a norm cannot take its change."""
    shifted, lora = bool(fold.shift.any()), LoraConfig()
    for name in fold.consumers:
        if name in heads:
            if shifted and getattr(linears[name], "bias", None) is None:
                return f"it has a bias, and its change needs a bias on {name}, which has none"
            continue
        if shifted:
            return f"it has a bias, and its change needs a bias on {name} too, which servers of LoRA refuse"
        try:
            tuners_utils._check_lora_target_modules_mamba(lora, model, name.rpartition(".")[2])
        except ValueError:
            return f"{name}, which reads it, takes no LoRA in PEFT, because fused kernels of this model read its weight"
        if _is_for_experts(name, model):
            return (
                f"{name}, which reads it, takes no LoRA in PEFT, which puts targets of that name on the fused experts"
            )
        weight: Any = linears[name]._parameters.get("weight")
        tied = [owner for module, owner in owners.get(weight, {}).items() if module is not linears[name]]
        if tied:
            return f"{name}, which reads it, shares its weight with {tied[0]}, and servers take no LoRA on tied weights"
    return None
