"""What was seen of each norm parameter, as numbers, and the faults that follow from it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from peft_lntune.doctor.faults import Finding

__all__ = ["ENOUGH_LOOKS", "FEW", "Record", "diagnose"]

FEW = 0.5
"""Fewer than this share of entries that can move, and that did, is a fault."""
ENOUGH_LOOKS = 3
"""Fewer looks prove nothing: the first gradients after a new head or an overflow may be zero or infinite."""

_COARSE = ("bfloat16", "float16")


@dataclass
class Record:
    """One norm parameter in a training run.

    Attributes:
        name: its name in the model.
        role: `"weight"` or `"bias"`.
        dtype: of its values, such as `"bfloat16"`.
        entries: number of entries.
        adapter: the adapter it belongs to, or None.
        trainable: whether it requires a gradient.
        active: whether the model computes with it.
        held: whether the optimizer holds it, or a float32 copy of it.
        stale: whether the optimizer holds tensors that the model does not, and not this one.
        wanted: whether it should be trained: the caller expects it, or it belongs to an adapter in training.
        hidden: whether the optimizer's tensors cannot be matched with the model's, as with flat shards.
        learning_rate: largest seen; None if unknown.
        peak: largest that the schedule starts from, or seen; None if unknown.
        weight_decay: coefficient of its group.
        neutral: value without effect, see `NormParameter`.
        looks: number of steps that were looked at.
        missing: looks at which it had no gradient.
        zero: looks at which every gradient was 0.
        nonfinite: looks at which a gradient was NaN or infinite.
        skipped: looks at which the optimizer skipped the step.
        gradient: largest absolute finite gradient.
        finite: whether its values are finite.
        moved_in_a_step: entries that moved in the step looked at, the most of any look.
        surprising: entries that moved in one step though the dtype would round such a step away, the most of any look.
        reset: looks at which it was back at its first value, after a step had moved it.
        can_move: entries that a step of the peak rate moves; None if the step is not known.
        can_move_outwards: entries that such a step moves away from zero; None if the step is not known.
        step: size of a step at the peak rate; None if not known.
        by_gradient: whether that size follows from the gradients seen, as with SGD.
        real_can_move: entries that a step moves with the gradients seen; None if not known.
        clip_can_move: entries that a step moves with the largest gradient that clipping leaves; None without clipping.
        spacing: the median gap between its values and the next of its dtype.
        moved: entries that differ from the first look.
        one_way: entries that moved in the more frequent direction.
        inwards: entries that moved towards zero.
        shrank: the common factor by which all entries shrank, or None.
        size_scale: what a step's rate is multiplied by because its values started near zero, with Adafactor; None where
            they did not, or have moved further than one step of the rate since.
    """

    name: str
    role: str
    dtype: str
    entries: int
    adapter: str | None = None
    trainable: bool = True
    active: bool = True
    held: bool = True
    stale: bool = False
    wanted: bool = False
    hidden: bool = False
    learning_rate: float | None = None
    peak: float | None = None
    weight_decay: float = 0.0
    neutral: float = 0.0
    looks: int = 0
    missing: int = 0
    zero: int = 0
    nonfinite: int = 0
    skipped: int = 0
    gradient: float = 0.0
    finite: bool = True
    moved_in_a_step: int = 0
    surprising: int = 0
    reset: int = 0
    can_move: int | None = None
    can_move_outwards: int | None = None
    step: float | None = None
    by_gradient: bool = False
    real_can_move: int | None = None
    clip_can_move: int | None = None
    spacing: float | None = None
    moved: int = 0
    one_way: int = 0
    inwards: int = 0
    shrank: float | None = None
    size_scale: float | None = None

    @property
    def is_tuned(self) -> bool:
        """Whether somebody means to train it."""
        return self.trainable or self.held


def diagnose(records: Iterable[Record], *, ended: bool = True) -> list[Finding]:
    """Find the faults of a training run.

    Each parameter has at most one fault that keeps it from learning, the first in the order of causes: a frozen
    parameter has no gradient either. Weight decay is reported beside these.

    Args:
        records: what was seen of each norm parameter.
        ended: whether the run is over. Before, a parameter whose optimizer cannot be seen is given time to move.

    Returns:
        One finding per kind of fault, in the order of `FAULTS`; empty for a sound run.

    Example:
        >>> stuck = Record("norm.weight", "weight", "bfloat16", 4, looks=5, step=1e-4, spacing=2**-8, can_move=0)
        >>> [finding.kind for finding in diagnose([stuck])]
        ['too_coarse']
    """
    causes: dict[str, list[Record]] = {}
    for record in records:
        kinds = [_first_cause(record, ended), "weight_decay" if _decays(record) else None]
        if record.shrank is not None and _decays(record):
            kinds.append("decay_drift")
        for kind in kinds:
            if kind is not None:
                causes.setdefault(kind, []).append(record)
    return [Finding(kind, [one.name for one in found], _EVIDENCE[kind](found)) for kind, found in causes.items()]


def _decays(record: Record) -> bool:
    return record.is_tuned and record.weight_decay > 0 and record.role == "weight" and record.neutral != 0


def _first_cause(one: Record, ended: bool) -> str | None:
    """The first reason why a parameter does not learn; None if it does, or nobody means to train it."""
    if not one.trainable and one.active and (one.held or one.wanted):
        return "frozen"
    if one.held and not one.active:
        return "inactive_adapter"
    if not one.trainable or not one.active:
        return None
    enough = one.looks >= ENOUGH_LOOKS
    if not one.held:
        waits = one.hidden and not ended
        return ("stale_parameter" if one.stale else "not_in_optimizer") if not one.moved and not waits else None
    if enough and one.missing == one.looks:
        return "no_gradient"
    if enough and one.skipped == one.looks:
        return "steps_skipped"
    taken = one.looks - one.skipped
    if one.nonfinite > one.skipped:
        return "nonfinite_gradient"
    if not one.finite:
        return "nonfinite_value"
    if enough and taken and one.zero + one.missing >= one.looks:
        return "zero_gradient"
    if enough and one.learning_rate == 0 and not one.moved:
        return "zero_learning_rate"
    if one.reset >= 2:
        return "overwritten"
    if enough and one.size_scale is not None:
        return "scaled_to_nothing"
    return _rounding(one) if enough else None


def _rounding(one: Record) -> str | None:
    """Whether steps round to nothing, and why."""
    if one.can_move is None or one.surprising > 0.01 * one.entries:
        return None  # it keeps what the dtype would round away: stochastic rounding, or a sum of the errors
    few = FEW * one.entries
    if one.can_move < few and (one.dtype in _COARSE or not one.by_gradient):
        return "too_coarse" if one.moved < few else None
    if one.real_can_move is not None and one.real_can_move < few:
        clipped = one.clip_can_move is not None and one.clip_can_move < few
        return ("clipped_away" if clipped else "vanishing_gradient") if one.moved < few else None
    outwards = one.can_move if one.can_move_outwards is None else one.can_move_outwards
    if outwards < few and one.moved >= max(2, 0.1 * one.entries) and one.inwards >= 0.95 * one.moved:
        return "one_way_rounding"
    return None


def _share(records: Sequence[Record], part: Callable[[Record], int | None]) -> str:
    total = sum(one.entries for one in records)
    return f"{100 * sum(part(one) or 0 for one in records) / max(total, 1):.3g} %"


def _some(values: Iterable[float | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return "unknown"
    return f"{known[0]:.3g}" if known[0] == known[-1] else f"{known[0]:.3g} to {known[-1]:.3g}"


def _looks(records: Sequence[Record]) -> str:
    return f"{max(one.looks for one in records)} steps looked at"


_EVIDENCE: dict[str, Callable[[Sequence[Record]], str]] = {
    "too_coarse": lambda found: (
        f"{_share(found, lambda one: one.can_move)} of {sum(one.entries for one in found):,} entries can move in "
        f"{'/'.join(sorted({one.dtype for one in found}))}: steps are at most {_some(one.step for one in found)}, and "
        f"the spacing below a value is {_some(one.spacing for one in found)}. "
        f"{_share(found, lambda one: one.moved)} moved."
    ),
    "one_way_rounding": lambda found: (
        f"{_share(found, lambda one: one.can_move)} of the entries can move towards zero with steps of at most "
        f"{_some(one.step for one in found)}, and {_share(found, lambda one: one.can_move_outwards)} away from it."
    ),
    "frozen": lambda found: (
        "The optimizer holds them, and requires_grad is False."
        if any(one.held for one in found)
        else "requires_grad is False, and the optimizer does not hold them."
    ),
    "not_in_optimizer": lambda found: f"None of them moved in the {_looks(found)}.",
    "stale_parameter": lambda found: f"None of them moved in the {_looks(found)}.",
    "inactive_adapter": lambda found: (
        f"They belong to {', '.join(sorted({str(one.adapter) for one in found}))}, which is not active or is disabled."
    ),
    "no_gradient": lambda found: f"grad is None in all {_looks(found)}.",
    "zero_gradient": lambda found: f"Every entry is 0 in all {_looks(found)}.",
    "nonfinite_gradient": lambda found: f"Seen in {max(one.nonfinite for one in found)} of {_looks(found)}.",
    "nonfinite_value": lambda found: f"Seen after the last of {_looks(found)}.",
    "vanishing_gradient": lambda found: f"The largest gradient is {_some(one.gradient for one in found)}.",
    "clipped_away": lambda found: f"The largest gradient after clipping is {_some(one.gradient for one in found)}.",
    "zero_learning_rate": lambda found: f"It was 0 in all {_looks(found)}.",
    "scaled_to_nothing": lambda found: (
        f"A step is at most {_some(one.size_scale for one in found)} times the learning rate of "
        f"{_some(one.peak for one in found)} until the values have grown."
    ),
    "weight_decay": lambda found: (
        f"weight_decay is {_some(one.weight_decay for one in found)}, so each step multiplies a gain by "
        f"1 - {_some((one.peak or 0.0) * one.weight_decay for one in found)}."
    ),
    "decay_drift": lambda found: f"The factor is {_some(one.shrank for one in found)}.",
    "overwritten": lambda found: f"Steps move them, and they were back at their first values in {_looks(found)}.",
    "steps_skipped": lambda found: f"No step was taken in all {_looks(found)}.",
}
