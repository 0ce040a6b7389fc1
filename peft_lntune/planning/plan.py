"""What a config would do to a model: which modules, which parameters, at what cost. Decided before anything changes."""

from collections.abc import Mapping

from peft import PeftConfig
from torch import nn

from peft_lntune.config import LNTuneConfig, UnifiedConfig
from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.planning.facts import ModelFacts
from peft_lntune.planning.methods import method_of
from peft_lntune.planning.types import Plan

__all__ = ["check_selected", "plan", "plan_parts"]


def plan(model: nn.Module, config: PeftConfig, counts: Mapping[str, int | None] | None = None) -> Plan:
    """Say what `get_peft_model(model, config)` would tune, without changing the model or the config.

    Args:
        model: the model, plain or with adapters, on any device (meta too).
        config: any config of this package.
        counts: for each tuned parameter, `<module>.lntune_<parameter>`, the number of tuned entries, None for all.
            Parameters that are not named are then not tuned. The manifest of a saved adapter holds this as `"tuned"`.

    Returns:
        The plan; `print` it for a table.

    Raises:
        NoMatchError: the config selects nothing; the message lists the norms there are.
        ConfigError: two parts tune the same module; the message names both.
        UnsupportedError: a module named in `target_modules` has no weight that a delta could be added to, or is a norm
            and a supermask was asked for; the model's attention takes no prefix; or the width of a sub-layer is not
            known.

    Example:
        >>> from peft_lntune import LNTuningConfig
        >>> plan(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), LNTuningConfig()).entries
        8
    """
    plans = [planned for _, planned in plan_parts(ModelFacts(model), config, counts)]
    left_out = {name: reason for planned in plans for name, reason in planned.left_out.items()}
    missed = {name: one for planned in plans for name, one in planned.missed.items()}
    parts = {name: part for planned in plans for name, part in planned.parts.items()}
    return Plan(parts, left_out, sum(planned.selected for planned in plans), missed)


def plan_parts(
    facts: ModelFacts, config: PeftConfig, counts: Mapping[str, int | None] | None = None
) -> list[tuple[PeftConfig, Plan]]:
    """Plan each part of a config by itself.

    Args:
        facts: facts of the model.
        config: any config of this package.
        counts: for each tuned parameter, `<module>.lntune_<parameter>`, the number of tuned entries, None for all.

    Returns:
        Each part of the config, completed so that it can be injected by itself, with its plan.

    Raises:
        NoMatchError: a part selects nothing.
        ConfigError: two parts tune the same module.
        UnsupportedError: a part selects a module that its method does not work on.
    """
    parts = config.effective_parts() if isinstance(config, UnifiedConfig) else [config]
    planned = []
    for part in parts:
        method = method_of(part)
        resolved = method.resolve(facts, part)
        planned.append((resolved, method.plan(facts, resolved, counts)))
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


def check_selected(config: LNTuneConfig, selected: int) -> None:
    """Refuse a saved mask that was chosen from another number of entries than its config selects in this model.

    Args:
        config: config of the saved adapter.
        selected: how many entries the config selects in this model.

    Raises:
        AdapterFileError: the two numbers differ.
    """
    saved = (config.manifest or {}).get("selected", selected)
    if config.stored_counts and saved != selected:
        raise AdapterFileError(
            f"the masks of this adapter were chosen among {saved:,} entries, and its config selects {selected:,} in "
            "this model. It was trained on another model; load it into that one."
        )
