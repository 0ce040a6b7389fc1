"""What a config would do to a model: which modules, which parameters, at what cost. Decided before anything changes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from peft_lntune.attention import AttentionFacts, find_attention
from peft_lntune.config import (
    BottleneckConfig,
    DeltaConfig,
    LNTuneConfig,
    LNTuningConfig,
    ModuleTuningConfig,
    PrefixConfig,
    UnifiedConfig,
)
from peft_lntune.core.delta import Block, delta_dtype
from peft_lntune.core.norms import Norm, base_modules, find_norms
from peft_lntune.core.prefix import Prefix
from peft_lntune.core.sublayers import Sublayer, find_sublayers
from peft_lntune.errors import ConfigError, NoMatchError, UnsupportedError
from peft_lntune.lora import find_lora_targets
from peft_lntune.modules import find_parameters

__all__ = ["Part", "Plan", "plan", "plan_parts"]


@dataclass(frozen=True)
class Part:
    """One module that is tuned, or that something is put beside.

    Attributes:
        name: the module's name in the model.
        module_class: the name of its class.
        place: what is known of it: as a norm, as the exit of a sub-layer, as attention; None of any other module.
        entries: for each tuned parameter, how many of its entries are tuned and how many it has.
        bytes: size of what is tuned, in memory as on disk.
        method: `"delta"`, `"bottleneck"`, `"prefix"` or `"lora"`.
        blocks: for each parameter of which only a part is meant, that part.
    """

    name: str
    module_class: str
    place: Norm | Sublayer | AttentionFacts | None
    entries: Mapping[str, tuple[int, int]]
    bytes: int
    method: str = "delta"
    blocks: Mapping[str, Block] = field(default_factory=dict)

    @property
    def roles(self) -> str:
        if isinstance(self.place, Norm):
            return "+".join(self.place.roles) or "unknown"
        return "-" if self.place is None else self.place.role

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
        selected: entries of the deltas that the config selects, whether or not a mask leaves them out; it tells a saved
            mask of another model, where all that it tunes happens to be in this one too.
    """

    parts: Mapping[str, Part]
    left_out: Mapping[str, str] = field(default_factory=dict)
    selected: int = 0

    @property
    def entries(self) -> int:
        """Number of trainable values."""
        return sum(tuned for part in self.parts.values() for tuned, _ in part.entries.values())

    @property
    def bytes(self) -> int:
        """Size of all deltas."""
        return sum(part.bytes for part in self.parts.values())

    def __str__(self) -> str:
        header: tuple[str, ...] = ("module", "class", "method", "role", "tuned entries", "bytes")
        rows: list[tuple[str, ...]] = [
            (part.name, part.module_class, part.method, part.roles, _entries(part.entries), f"{part.bytes:,}")
            for part in self.parts.values()
        ]
        rows.append((f"{len(self.parts)} modules", "", "", "", f"{self.entries:,}", f"{self.bytes:,}"))
        if all(part.method == "delta" for part in self.parts.values()):
            header, rows = header[:2] + header[3:], [row[:2] + row[3:] for row in rows]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)
        ]
        lines = [line.rstrip() for line in lines]
        if self.left_out:
            lines += ["", "not tuned:", *(f"  {name}: {reason}" for name, reason in self.left_out.items())]
        return "\n".join(lines)


def plan(model: nn.Module, config: PeftConfig, counts: Mapping[str, int | None] | None = None) -> Plan:
    """Say what `get_peft_model(model, config)` would tune, without changing the model or the config.

    Args:
        model: the model, plain or with adapters, on any device (meta too).
        config: any config of this package.
        counts: for each tuned parameter the number of tuned entries, None for all, as the manifest of a saved adapter
            has it; other parameters are then not tuned.

    Returns:
        The plan; `print` it for a table.

    Raises:
        NoMatchError: the config selects nothing; the message lists the norms there are.
        ConfigError: two parts want one place; the message names both.
        UnsupportedError: a module named in `target_modules` has no weight that a delta could be added to, or the
            model's attention takes no prefix.

    Example:
        >>> plan(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), LNTuningConfig()).entries
        8
    """
    plans = [planned for _, planned in plan_parts(model, config, counts)]
    left_out = {name: reason for planned in plans for name, reason in planned.left_out.items()}
    parts = {name: part for planned in plans for name, part in planned.parts.items()}
    return Plan(parts, left_out, sum(planned.selected for planned in plans))


def plan_parts(
    model: nn.Module, config: PeftConfig, counts: Mapping[str, int | None] | None = None
) -> list[tuple[PeftConfig, Plan]]:
    """The plan of each part of a config, with the part as it can be injected by itself; see `plan`."""
    parts = config.effective_parts() if isinstance(config, UnifiedConfig) else [config]
    planned = [_plan_part(model, part, counts) for part in parts]
    taken: dict[str, PeftConfig] = {}
    for part, its in planned:
        for name in its.parts:
            if name in taken:
                raise ConfigError(
                    f"two parts want one place: {type(taken[name]).__name__} and {type(part).__name__} both work on "
                    f"{name}. Narrow one of them (roles, layers_to_transform, target_modules, exclude_modules)."
                )
        taken.update(dict.fromkeys(its.parts, part))
    return planned


def _plan_part(
    model: nn.Module, config: PeftConfig, counts: Mapping[str, int | None] | None
) -> tuple[PeftConfig, Plan]:
    if isinstance(config, ModuleTuningConfig) and config.components is not None:
        return config, _plan_components(model, config, counts)
    if isinstance(config, DeltaConfig):
        return config, _plan_deltas(model, config, counts)
    if isinstance(config, BottleneckConfig):
        return config, _plan_bottlenecks(model, config)
    if isinstance(config, PrefixConfig):
        return config, _plan_prefixes(model, config)
    config, targets = find_lora_targets(model, config)
    modules = base_modules(model)
    sizes = {name: ({"lora": (size, size)}, 4 * size) for name, size in targets.items()}
    found = {n: Part(n, type(modules[n]).__name__, None, *size, "lora") for n, size in sizes.items()}
    return config, Plan(found)


def _plan_bottlenecks(model: nn.Module, config: BottleneckConfig) -> Plan:
    modules = base_modules(model)
    sublayers = find_sublayers(modules)
    parts = {}
    for sublayer in sublayers:
        name = sublayer.exit
        if sublayer.role not in config.roles or not _is_chosen(config, name):
            continue
        out = modules[name]
        width = _width(out, 1)
        read = width if config.position == "sequential" else _width(modules[sublayer.entry], 0)
        size = config.size_of(width)
        counts = {"down": size * (read + 1), "up": width * (size + 1)}
        counts |= {"scale": 1} if config.scale == "learned" else {}
        parts[name] = _beside(config, name, out, sublayer, counts, "bottleneck")
    if not parts:
        known = ", ".join(f"{s.exit} ({s.role})" for s in sublayers) or "none"
        raise NoMatchError(
            f"BottleneckConfig(roles={config.roles!r}) finds no place in this model. Sub-layers whose end is known: "
            f"{known}. Choose among their roles and layers, or use another part where there are none."
        )
    return Plan(parts)


def _plan_prefixes(model: nn.Module, config: PrefixConfig) -> Plan:
    modules = base_modules(model)
    found = find_attention(model)
    parts = {}
    for name, place in found.items():
        if (config.roles is None or place.role in config.roles) and _is_chosen(config, name):
            sizes = config.num_virtual_tokens, place.heads * place.head_dim, config.reparametrize
            prefix = Prefix(*sizes, device=torch.device("meta"))
            counts = {"prefix": sum(parameter.numel() for parameter in prefix.parameters())}
            parts[name] = _beside(config, name, modules[name], place, counts, "prefix")
    if not parts:
        known = ", ".join(f"{name} ({place.role})" for name, place in found.items())
        raise NoMatchError(f"this PrefixConfig selects none of the attention modules of this model: {known}.")
    return Plan(parts)


def _beside(config: Any, name: str, module: nn.Module, place: Any, counts: Mapping[str, int], method: str) -> Part:
    first = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    itemsize = delta_dtype(first, config.torch_delta_dtype).itemsize
    entries = {what: (count, count) for what, count in counts.items()}
    return Part(name, type(module).__name__, place, entries, sum(counts.values()) * itemsize, method)


def _is_chosen(config: Any, name: str) -> bool:
    """Whether a place found by structure is among the target modules, if any are named, and in the layers."""
    named = config.target_modules is None or _matches(config.target_modules, name)
    return named and not _matches(config.exclude_modules, name) and _in_layers(config, name)


def _width(leaf: nn.Module, side: int) -> int:
    """Inputs (side 0) or outputs (side 1) of a linear map, also of GPT-2's Conv1D, whose weight is `(in, out)`."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if isinstance(width := getattr(leaf, names[side], None), int):
            return width
    weight: Any = leaf.weight
    return int(weight.shape[1 - side])


def _plan_components(model: nn.Module, config: ModuleTuningConfig, counts: Mapping[str, int | None] | None) -> Plan:
    modules = base_modules(model)
    norms = find_norms(model)
    places = find_parameters(model, config.components or (), norms, config.parameters)
    places = {name: found for name, found in places.items() if _is_chosen(config, name) and not _is_saved(config, name)}

    def parts_with(counts: Mapping[str, int | None] | None) -> dict[str, Part]:
        every = {n: part_of(config, n, modules[n], norms.get(n), counts, found) for n, found in places.items()}
        return {name: part for name, part in every.items() if part.entries}

    parts, every = parts_with(counts), parts_with(None)
    if not parts:
        raise NoMatchError(
            f"this model has none of the components {config.components!r} in the chosen layers, with the parameters "
            f"that tune={config.tune!r} asks for. `parameter_change` names the components it has; or name modules in "
            "target_modules."
        )
    return Plan(parts, {}, sum(total for part in every.values() for _, total in part.entries.values()))


def _plan_deltas(model: nn.Module, config: DeltaConfig, counts: Mapping[str, int | None] | None) -> Plan:
    modules = base_modules(model)
    norms = find_norms(model, parameterless=True)
    reasons: dict[str, str] = {}
    parts: dict[str, Part] = {}
    selected = 0
    for name in norms if config.target_modules is None else modules:
        reason = _reason_to_leave(config, name, norms.get(name))
        if reason is None:
            selected += sum(total for _, total in part_of(config, name, modules[name]).entries.values())
            parts[name] = part_of(config, name, modules[name], norms.get(name), counts)
        reasons[name] = reason or ""
    parts = {name: part for name, part in parts.items() if part.entries}
    left_out = {name: reasons.get(name) or "its parameters are not among those tuned" for name in norms.keys() - parts}
    left_out = {name: left_out[name] for name in norms if name in left_out}
    if not parts:
        raise NoMatchError(_nothing(config, norms, left_out, modules))
    return Plan(parts, left_out, selected)


def _reason_to_leave(config: Any, name: str, norm: Norm | None) -> str | None:
    """Why this module is not tuned; None where it is."""
    if not name:
        return "it is the model itself"
    if config.target_modules is not None:
        matched = check_target_module_exists(config, name) and _in_layers(config, name)
        return None if matched else "not among the target modules, or excluded"
    if norm is None or norm.weight_shape is None:
        return "it has no parameters"
    if getattr(config, "roles", None) is not None and not set(config.roles) & set(norm.roles):
        return f"role {'+'.join(norm.roles) or 'unknown'}"
    if _matches(config.exclude_modules, name):
        return "excluded"
    if _is_saved(config, name):
        return "inside modules_to_save"
    if not _in_layers(config, name):
        return "not in layers_to_transform"
    return None


def _is_saved(config: LNTuneConfig, name: str) -> bool:
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ())


def part_of(
    config: DeltaConfig,
    name: str,
    module: nn.Module,
    norm: Norm | None = None,
    counts: Mapping[str, int | None] | None = None,
    only: Mapping[str, Block | None] | None = None,
) -> Part:
    """What `config` tunes of one module; `only`: which of its parameters may be, and which part of each.

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
    found = {p: getattr(module, p, None) for p in config.parameters if only is None or p in only}
    tuned = {p: t for p, t in found.items() if isinstance(t, torch.Tensor)}
    blocks = {p: block for p, block in (only or {}).items() if block is not None and p in tuned}
    sizes = {p: (blocks[p].shape_in(t.shape) if p in blocks else t.shape).numel() for p, t in tuned.items()}
    entries = {p: (_count(counts, name, p, size), size) for p, size in sizes.items()}
    entries = {p: count for p, count in entries.items() if count[0]}
    size = sum(n * delta_dtype(tuned[p].dtype, config.torch_delta_dtype).itemsize for p, (n, _) in entries.items())
    return Part(name, type(module).__name__, norm, entries, size, blocks=blocks)


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


def _in_layers(config: LNTuneConfig, name: str) -> bool:
    """Whether a module is in the layers that a config chooses, and in none that it leaves out."""
    chosen, excluded = config.layers_to_transform, getattr(config, "layers_to_exclude", None)
    if excluded is not None and _is_in(config, name, excluded):
        return False
    return chosen is None or chosen == [] or _is_in(config, name, chosen)


def _is_in(config: LNTuneConfig, name: str, layers: list[int] | int) -> bool:
    """PEFT's rule: the first number in the name is the layer, or the first one after `layers_pattern`."""
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
