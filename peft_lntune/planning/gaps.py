"""What a config asks for and does not find: sub-layers without a place, and norms without a role."""

import warnings
from collections.abc import Iterable
from typing import Any

from peft_lntune.architectures.role_names import ATTENTION, MIXER
from peft_lntune.architectures.role_rules import Tree
from peft_lntune.planning.targets import is_chosen
from peft_lntune.planning.types import Plan

__all__ = ["NO_ROLE", "find_gaps", "warn_of_gaps"]

NO_ROLE = "role unknown"
"""Why a norm is left out that has no role, where a config chooses by role."""

_SHOWN = 3


def find_gaps(
    modules: Iterable[str], roles: Iterable[str], places: Iterable[tuple[str, str]], reason: str
) -> dict[str, str]:
    """The sub-layers that names tell of, of some roles, for which no place was found.

    Args:
        modules: the names of all modules of the base model.
        roles: those that are asked for.
        places: the role of each place that was found, and the name of a module in it.
        reason: why the others have none.

    Returns:
        The reason by the name of the sub-layer's module. A mixer that is no attention is one of them where attention
        is asked for, and other blocks of the same list have attention with a place.

    Example:
        >>> names = ["h", "h.0", "h.0.attn", "h.0.mlp", "h.0.mlp.experts"]
        >>> find_gaps(names, ["attention", "ffn"], [("attention", "h.0.attn.c_proj")], "unknown")
        {'h.0.mlp': 'unknown'}
    """
    tree, wanted = Tree.of(modules), set(roles)
    within = {(role, above) for role, name in places for above in _above(name)}
    gaps: dict[str, str] = {}
    for block in tree.blocks:
        kinds = {name: tree.sublayer(name) for child in tree.children[block] for name in [f"{block}.{child}"]}
        beside = (ATTENTION, block.rpartition(".")[0]) in within and ATTENTION not in kinds.values()
        for name, kind in kinds.items():
            if kind in wanted and (kind, block) not in within:
                gaps[name] = reason
            elif kind == MIXER and ATTENTION in wanted and beside:
                gaps[name] = "it mixes tokens without attention"
    return gaps


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def warn_of_gaps(config: Any, plan: Plan) -> None:
    """Say once what a config asks for and the plan has no place for.

    Args:
        config: one part of what is injected.
        plan: its plan.
    """
    if any(part.method in ("bottleneck", "prefix") for part in plan.parts.values()) and plan.left_out:
        _warn(
            f"{type(config).__name__} finds a place at {len(plan.parts)} sub-layers and none at {len(plan.left_out)}",
            [f"{name} ({reason})" for name, reason in plan.left_out.items()],
            "`plan(model, config)` lists all. Tune these layers by another part, such as LNTuningConfig or LoRA; or "
            "leave them out with exclude_modules or layers_to_transform, which ends this warning.",
        )
    if getattr(config, "roles", None) is None:
        return
    unknown = [name for name, reason in plan.left_out.items() if reason == NO_ROLE and is_chosen(config, name)]
    if unknown:
        _warn(
            f"{type(config).__name__}(roles={config.roles!r}) leaves out {len(unknown)} norms whose role is not known",
            unknown,
            "`plan(model, config)` lists all. Name norms in target_modules, in place of roles, to tune these too; or "
            "leave them out with exclude_modules, which ends this warning.",
        )


def _warn(what: str, names: list[str], instead: str) -> None:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    warnings.warn(f"{what}: {', '.join(names[:_SHOWN])}{more}. {instead}", stacklevel=3)
