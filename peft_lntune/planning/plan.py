"""What a config would do to a model: which modules, which parameters, at what cost. Decided before anything changes."""

from collections.abc import Iterable, Iterator, Mapping

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
        counts: for each tuned parameter the number of tuned entries, None for all, as the manifest of a saved adapter
            has it; other parameters are then not tuned.

    Returns:
        The plan; `print` it for a table.

    Raises:
        NoMatchError: the config selects nothing; the message lists the norms there are.
        ConfigError: two parts want one place; the message names both.
        UnsupportedError: a module named in `target_modules` has no weight that a delta could be added to, or is a norm
            where a mask is wanted; the model's attention takes no prefix; or a leaf that a bottleneck works on does not
            say how wide it is.

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
    """The plan of each part of a config, with the part as it can be injected by itself.

    Args:
        facts: of the model.
        config: any config of this package.
        counts: for each tuned parameter the number of tuned entries, None for all.

    Returns:
        Each part of the config, resolved, with its plan.

    Raises:
        The same as `plan`.
    """
    parts = config.effective_parts() if isinstance(config, UnifiedConfig) else [config]
    planned = [(part, method_of(part).plan(facts, part, counts)) for part in _resolved(facts, parts)]
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
    """Raise where a saved mask was chosen among another number of entries than its config selects in this model.

    Args:
        config: of the saved adapter.
        selected: how many entries it selects in this model.

    Raises:
        AdapterFileError: it was.
    """
    saved = (config.manifest or {}).get("selected", selected)
    if config.stored_counts and saved != selected:
        raise AdapterFileError(
            f"the masks of this adapter were chosen among {saved:,} entries, and its config selects {selected:,} in "
            "this model. It was trained on another model; load it into that one."
        )


def _resolved(facts: ModelFacts, parts: Iterable[PeftConfig]) -> Iterator[PeftConfig]:
    return (method_of(part).resolve(facts, part) for part in parts)
