"""What a config asks for and does not find: sub-layers without a place, norms without a role, and what is no norm."""

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
"""Why a norm is left out that has no role, where a config chooses by role."""

_SHOWN = 3
_NAMED = 20  # modules of one kind that the warning of modules which look like norms names


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
    """Name sub-layers that a config asks for and its plan has no place at.

    Args:
        config: one part of what is injected.
        plan: its plan.
    """
    if plan.left_out:
        _warn(
            f"{type(config).__name__} finds a place at {len(plan.parts)} sub-layers and none at {len(plan.left_out)}",
            [f"{name} ({reason})" for name, reason in plan.left_out.items()],
            "`plan(model, config)` lists all. Tune these layers by another part, such as LNTuningConfig or LoRA; or "
            "leave them out with exclude_modules or layers_to_transform, which ends this warning.",
        )


def warn_of_unknown_roles(config: Any, plan: Plan) -> None:
    """Name norms that a config leaves out because it chooses by role, and theirs is not known.

    Args:
        config: one part of what is injected.
        plan: its plan.
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
    """Name modules that a config would tune if they could be tuned as norms, those that are alike with one reason.

    Args:
        missed: by name; nothing is said where there are none.
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
