"""What a config would do to a model: which modules, which parameters, at what cost. Decided before anything changes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from peft_lntune.config.ln_tuning import LNTuningConfig
from peft_lntune.core.delta import delta_dtype
from peft_lntune.core.norms import Norm, base_modules, find_norms
from peft_lntune.errors import NoMatchError, UnsupportedError

__all__ = ["Part", "Plan", "plan"]


@dataclass(frozen=True)
class Part:
    """One module that is tuned.

    Attributes:
        name: the module's name in the model.
        module_class: the name of its class.
        norm: what is known of it as a norm; None where it is another module.
        entries: for each tuned parameter, how many of its entries are tuned and how many it has.
        bytes: size of the deltas, in memory as on disk.
    """

    name: str
    module_class: str
    norm: Norm | None
    entries: Mapping[str, tuple[int, int]]
    bytes: int

    @property
    def roles(self) -> str:
        return "-" if self.norm is None else "+".join(self.norm.roles) or "unknown"

    @property
    def counts(self) -> dict[str, int | None]:
        """Tuned entries of each parameter, None for all: what a layer needs to make its deltas."""
        return {name: None if tuned == size else tuned for name, (tuned, size) in self.entries.items()}


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Printing it gives a table; `parts` holds the same as data.

    Attributes:
        parts: the modules to tune, by name.
        left_out: norms that the config does not tune, by name, with the reason.
    """

    parts: Mapping[str, Part]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        """Number of trainable values."""
        return sum(tuned for part in self.parts.values() for tuned, _ in part.entries.values())

    @property
    def bytes(self) -> int:
        """Size of all deltas."""
        return sum(part.bytes for part in self.parts.values())

    def __str__(self) -> str:
        header = ("module", "class", "role", "tuned entries", "bytes")
        rows = [
            (part.name, part.module_class, part.roles, _entries(part.entries), f"{part.bytes:,}")
            for part in self.parts.values()
        ]
        rows.append((f"{len(self.parts)} modules", "", "", f"{self.entries:,}", f"{self.bytes:,}"))
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)
        ]
        lines = [line.rstrip() for line in lines]
        if self.left_out:
            lines += ["", "not tuned:", *(f"  {name}: {reason}" for name, reason in self.left_out.items())]
        return "\n".join(lines)


def plan(model: nn.Module, config: LNTuningConfig, counts: Mapping[str, int | None] | None = None) -> Plan:
    """Say what `get_peft_model(model, config)` would tune, without changing the model or the config.

    Args:
        model: the model, plain or with adapters, on any device (meta too).
        config: which norms or modules.
        counts: for each tuned parameter the number of tuned entries, None for all, as the manifest of a saved adapter
            has it; other parameters are then not tuned.

    Returns:
        The plan; `print` it for a table.

    Raises:
        NoMatchError: the config selects nothing; the message lists the norms there are.
        UnsupportedError: a module named in `target_modules` has no weight that a delta could be added to.

    Example:
        >>> plan(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), LNTuningConfig()).entries
        8
    """
    modules = base_modules(model)
    norms = find_norms(model, parameterless=True)
    reasons: dict[str, str] = {}
    parts: dict[str, Part] = {}
    for name in norms if config.target_modules is None else modules:
        reason = _reason_to_leave(config, name, norms.get(name))
        if reason is None:
            parts[name] = part_of(config, name, modules[name], norms.get(name), counts)
        reasons[name] = reason or ""
    parts = {name: part for name, part in parts.items() if part.entries}
    left_out = {name: reasons.get(name) or "its parameters are not among those tuned" for name in norms.keys() - parts}
    left_out = {name: left_out[name] for name in norms if name in left_out}
    if not parts:
        raise NoMatchError(_nothing(config, norms, left_out, modules))
    return Plan(parts, left_out)


def _reason_to_leave(config: LNTuningConfig, name: str, norm: Norm | None) -> str | None:
    """Why this module is not tuned; None where it is."""
    if not name:
        return "it is the model itself"
    if config.target_modules is not None:
        matched = check_target_module_exists(config, name)
        return None if matched else "not among the target modules, or excluded"
    if norm is None or norm.weight_shape is None:
        return "it has no parameters"
    if config.roles is not None and not set(config.roles) & set(norm.roles):
        return f"role {'+'.join(norm.roles) or 'unknown'}"
    if _matches(config.exclude_modules, name):
        return "excluded"
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ()):
        return "inside modules_to_save"
    if not _in_layers(config, name):
        return "not in layers_to_transform"
    return None


def part_of(
    config: LNTuningConfig,
    name: str,
    module: nn.Module,
    norm: Norm | None = None,
    counts: Mapping[str, int | None] | None = None,
) -> Part:
    """What `config` tunes of one module.

    Raises:
        UnsupportedError: the module has no floating weight.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not _takes_delta(weight):
        kind: Any = getattr(weight, "data", weight)
        plain = type(kind) is torch.Tensor
        has = "none" if weight is None else f"one of {kind.dtype if plain else type(kind).__name__}"
        raise UnsupportedError(
            f"{name} ({type(module).__name__}) is named in target_modules, but a delta needs a floating `weight`, and "
            f"it has {has}. Name its submodules instead, or leave it out."
        )
    found = {p: getattr(module, p, None) for p in config.parameters}
    tuned = {p: t for p, t in found.items() if isinstance(t, torch.Tensor)}
    entries = {p: (_count(counts, name, p, t.numel()), t.numel()) for p, t in tuned.items()}
    entries = {p: count for p, count in entries.items() if count[0]}
    size = sum(n * delta_dtype(tuned[p].dtype, config.torch_delta_dtype).itemsize for p, (n, _) in entries.items())
    return Part(name, type(module).__name__, norm, entries, size)


def _takes_delta(weight: torch.Tensor) -> bool:
    """Whether a delta can be added. Quantized tensors may call themselves floating, so a tensor class is tried."""
    if type(weight.data) is torch.Tensor or not weight.is_floating_point():
        return weight.is_floating_point()
    try:
        _ = weight.detach() + 0.0
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _count(counts: Mapping[str, int | None] | None, name: str, parameter: str, size: int) -> int:
    """Tuned entries of one parameter. Where some are listed, one that is not is not tuned."""
    count = counts.get(f"{name}.lntune_{parameter}", 0) if counts else None
    return size if count is None else count


def _matches(pattern: Iterable[str] | str | None, name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or endings of names."""
    if not pattern:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern)


def _in_layers(config: LNTuningConfig, name: str) -> bool:
    """PEFT's rule: the first number in the name is the layer, or the first one after `layers_pattern`."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", name)
        if found:
            return int(found["index"]) in wanted
    return False


def _entries(entries: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(
        f"{name} {tuned:,}" + ("" if tuned == size else f" of {size:,}") for name, (tuned, size) in entries.items()
    )


def _nothing(config: LNTuningConfig, norms: Mapping[str, Norm], left_out: Mapping[str, str], modules: Mapping) -> str:
    if config.target_modules is not None:
        known = ", ".join(norms) or "none"
        return (
            f"Target modules {config.target_modules} not found in the base model, or excluded, or without the "
            f"parameters that tune={config.tune!r} asks for. Please check the target modules and try again. "
            f"Norms of this model: {known}."
        )
    if not norms:
        return (
            f"no norm was found among the {len(modules)} modules of this model. If it has one that is written into "
            "another module's forward, give that a module of its own; or name other modules in target_modules."
        )
    listed = "\n".join(f"  {name}: {reason}" for name, reason in left_out.items())
    return f"this config selects none of the {len(norms)} norms of this model:\n{listed}\nWiden the config."
