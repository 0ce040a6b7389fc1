"""Warnings about what a config asks for and does not find: sub-layers, norms of a role, what only looks like a norm."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from peft_lntune.architectures.role_names import ATTENTION, MIXER
from peft_lntune.architectures.role_rules import Tree
from peft_lntune.norms.find import Missed
from peft_lntune.planning.targets import is_chosen
from peft_lntune.planning.types import Plan

__all__ = ["NO_ROLE", "find_gaps", "warn_of_gaps", "warn_of_missed", "warn_of_unknown_roles"]

NO_ROLE = "role unknown"
"""The reason given for a norm that is left out because the config chooses by role and its role is unknown."""

_SHOWN = 3
_NAMED = 20  # how many modules of one kind `warn_of_missed` names


def find_gaps(
    modules: Iterable[str], roles: Iterable[str], places: Iterable[tuple[str, str]], reason: str
) -> dict[str, str]:
    """Find the sub-layers that have one of the roles by their names, but have no place.

    Args:
        modules: names of all modules of the base model.
        roles: the roles asked for.
        places: for each place that was found, its role and the name of a module in it.
        reason: the reason to give for sub-layers without a place.

    Returns:
        The reason, by the name of the sub-layer's module. If attention is asked for and other blocks of the same list
        have a place at their attention, token mixers other than attention are listed too.

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
    """Warn about sub-layers that a config asks for and its plan leaves out.

    Args:
        config: config of one part of the adapter.
        plan: the plan of that part.
    """
    if plan.left_out:
        _warn(
            f"{type(config).__name__} finds a place at {len(plan.parts)} sub-layers and none at {len(plan.left_out)}",
            [f"{name} ({reason})" for name, reason in plan.left_out.items()],
            "`plan(model, config)` lists all. Tune these layers by another part, such as LNTuningConfig or LoRA; or "
            "leave them out with exclude_modules or layers_to_transform, which ends this warning.",
        )


def warn_of_unknown_roles(config: Any, plan: Plan) -> None:
    """Warn about norms that are left out because the config chooses by role and their role is not known.

    Args:
        config: config of one part of the adapter.
        plan: the plan of that part.
    """
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


def warn_of_missed(missed: Mapping[str, Missed]) -> None:
    """Warn about modules that look like norms and are not tuned. Modules of one class and reason are grouped.

    Args:
        missed: the modules by name; if empty, no warning is given.
    """
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, its in missed.items():
        alike[its.module_class, its.reason].append(name)
    groups = []
    for (module_class, reason), names in alike.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        groups.append(f"{', '.join(names[:_NAMED])}{more} ({module_class}): {reason}")
    if groups:
        one = len(missed) == 1
        which = "1 module looks like a norm and is" if one else f"{len(missed)} modules look like norms and are"
        warnings.warn(
            f"{which} not tuned. {'; '.join(groups)}. print(plan(model, config)) lists each. Name it in target_modules "
            "to tune it as any other module, or in exclude_modules to leave it out without this warning.",
            stacklevel=3,
        )


def _warn(what: str, names: list[str], instead: str) -> None:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    warnings.warn(f"{what}: {', '.join(names[:_SHOWN])}{more}. {instead}", stacklevel=3)
