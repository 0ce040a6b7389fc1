"""Whether the norms of a model learned, from its checkpoints before and after."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from peft_lntune.analysis.checkpoints import Checkpoint, facts_of, pair_names
from peft_lntune.architectures.role_names import is_called_norm
from peft_lntune.core.delta import PARAMETERS
from peft_lntune.doctor.faults import Finding
from peft_lntune.doctor.movement import can_move, movement_between, shrinks_alike, spacing
from peft_lntune.doctor.records import FEW, Record
from peft_lntune.doctor.report import Report
from peft_lntune.errors import ConfigError
from peft_lntune.norms.names import is_usual, spellings

__all__ = ["compare_norms", "is_norm_parameter"]

Source = Mapping[str, Tensor] | str | PathLike[str]
_DELTAS = {f"lntune_{parameter}": parameter for parameter in PARAMETERS}
_ROUNDED = 4.0  # moves of up to this many spacings are a coarse dtype's; a mask moves its entries by many


def is_norm_parameter(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a checkpoint is the weight or bias of a norm, or a delta of one, by its name and shape.

    Args:
        name: such as `h.0.ln_1.weight`.
        shape: its shape; gains and biases have one dimension longer than 1, or a second one of a few heads.

    Returns:
        True where it is.

    Example:
        >>> is_norm_parameter("h.0.ln_1.weight", (8,)), is_norm_parameter("bn.running_mean", (8,))
        (True, False)
    """
    owner, _, key = name.rpartition(".")
    above, _, container = owner.rpartition(".")
    if container in _DELTAS:
        owner = above
    return is_usual(key) and is_called_norm(owner) and 1 <= len(shape) <= 2


def compare_norms(
    before: Source, after: Source, *, learning_rate: float | None = None, adapter: bool = False
) -> Report:
    """Look at the norms of two checkpoints of one training run, with this package or without.

    Norms are recognized by their names. Tensors are read one at a time. Names may differ by one prefix (`bert.`).

    Without a learning rate, a norm that did not move is a fault only if something speaks against a norm that was frozen
    on purpose: all its gains are exactly 1, as nothing but an untrained norm has them (stored as 0 where the model adds
    1, as Gemma does), or in half precision other norms of the run moved. Otherwise it is a note. Norms that only one of
    the checkpoints has are in a note too.

    Args:
        before: tensors by name, or the path of a safetensors file, of the index of a sharded one, or of a folder. For a
            run with an adapter, the base model or an earlier adapter.
        after: the same; for an adapter, the tensors of its file by their names in the base model. Deltas of this
            package that `before` does not have start at 0.
        learning_rate: the largest of the run. A step of Adam and its kin is at most about as large, so it decides which
            entries could move. None: unknown.
        adapter: whether `after` is an adapter's file, in which norms that it lacks were not tuned.

    Returns:
        The report. Its `looks` are 0, and `can_move` is None without a learning rate.

    Raises:
        ConfigError: no norm is in both, or shapes differ.
        AdapterFileError: a path is not a safetensors checkpoint, or the checkpoint is damaged.

    Example:
        >>> before = {"ln.weight": torch.ones(4).bfloat16(), "fc.weight": torch.zeros(2, 2).bfloat16()}
        >>> after = {"ln.weight": torch.ones(4).bfloat16(), "fc.weight": torch.ones(2, 2).bfloat16()}
        >>> [finding.kind for finding in compare_norms(before, after, learning_rate=1e-4).findings]
        ['too_coarse']
    """
    old, new = (Checkpoint(given) if isinstance(given, (str, Path, PathLike)) else given for given in (before, after))
    facts, others = facts_of(old), facts_of(new)
    floating = {name for name, fact in others.items() if fact.floating and not fact.meta}
    pairs = {n: o for n, o in pair_names(list(facts), list(others)).items() if o in floating and facts[n].floating}
    norms = {name: other for name, other in pairs.items() if is_norm_parameter(name, facts[name].shape)}
    deltas = {
        name
        for name in floating - set(pairs.values())
        if name.split(".")[-2:-1] and name.split(".")[-2] in _DELTAS and is_norm_parameter(name, others[name].shape)
    }
    for name, other in norms.items():
        if facts[name].shape != others[other].shape:
            raise ConfigError(
                f"{name} is {facts[name].shape} before and {others[other].shape} after. Give two checkpoints of "
                "one model."
            )
    if not norms and not deltas and not adapter:
        raise ConfigError(
            f"no norm is in both: {len(facts)} tensors before, {len(others)} after, and none with the name of a norm "
            "in both. Give two checkpoints of one model, or for an adapter the model that it was trained on."
        )
    records, pooled = [], []
    for name, other in norms.items():
        records.append(_record(name, old[name], new[other], learning_rate))
        if records[-1].role == "weight" and records[-1].finite:
            pooled.append((old[name].reshape(-1), new[other].reshape(-1)))
    for name in sorted(deltas):
        delta = new[name]
        records.append(_record(name, torch.zeros_like(delta), delta, learning_rate))
    elsewhere = adapter or _moves_elsewhere(old, new, {n: o for n, o in pairs.items() if n not in norms})
    findings, notes = _judge(records, pooled, elsewhere, {name: old[name] for name in norms}, new, norms)
    notes += _alone(
        [] if adapter else [name for name in facts if name not in pairs and is_norm_parameter(name, facts[name].shape)],
        [n for n in floating - set(pairs.values()) - deltas if is_norm_parameter(n, others[n].shape)],
    )
    if learning_rate is None:
        notes.append("can_move needs the learning rate of the run.")
    return Report(tuple(records), tuple(findings), notes=tuple(notes))


def _record(name: str, before: Tensor, after: Tensor, rate: float | None) -> Record:
    owner, _, key = name.rpartition(".")
    container = owner.rpartition(".")[2]
    role = _DELTAS.get(container) or ("bias" if key in spellings("bias") else "weight")
    seen = movement_between(before, after)
    narrow = max(before.dtype, after.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    values = before.to(narrow)
    record = Record(
        name,
        role,
        str(narrow).removeprefix("torch."),
        seen.entries,
        finite=bool(after.isfinite().all()),
        moved=seen.moved,
        one_way=seen.one_way,
        inwards=seen.inwards,
        spacing=float(spacing(values).median()),
        peak=rate,
        step=rate,
    )
    if rate is not None:
        inwards, outwards = can_move(values, rate)
        record.can_move, record.can_move_outwards = int((inwards | outwards).sum()), int(outwards.sum())
    return record


def _moves_elsewhere(old: Mapping[str, Tensor], new: Mapping[str, Tensor], pairs: Mapping[str, str]) -> bool:
    """Whether any other tensor differs; stops at the first that does."""
    shapes, others = facts_of(old), facts_of(new)
    return any(
        movement_between(old[name], new[other]).moved
        for name, other in pairs.items()
        if shapes[name].shape == others[other].shape
    )


def _judge(
    records: list[Record],
    pooled: list[tuple[Tensor, Tensor]],
    elsewhere: bool,
    starts: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    names: Mapping[str, str],
) -> tuple[list[Finding], list[str]]:
    found: dict[str, list[Record]] = {}
    some_moved = any(one.moved for one in records)
    still = []
    for one in records:
        kind = None
        if not one.finite:
            kind = "nonfinite_value"
        elif one.can_move is not None and one.can_move < FEW * one.entries and one.moved < FEW * one.entries:
            kind = "too_coarse" if some_moved or elsewhere else None
        elif not one.moved:
            still.append(one)
            never = one.role == "weight" and one.name in starts and _is_untrained(starts[one.name])
            half = one.dtype in ("bfloat16", "float16")
            kind = "did_not_move" if (elsewhere or some_moved) and (never or (half and some_moved)) else None
        elif one.moved < FEW * one.entries and one.name in starts:
            kind = "few_moved" if _is_rounded(starts[one.name], new[names[one.name]]) else None
        if kind is not None:
            found.setdefault(kind, []).append(one)
    if pooled:
        factor = shrinks_alike(torch.cat([a for a, _ in pooled]), torch.cat([b for _, b in pooled]))
        if factor is not None:
            gains = [one for one in records if one.role == "weight" and one.name in starts]
            for one in gains:
                one.shrank = factor
            found.setdefault("decay_drift", []).extend(gains)
    notes = []
    if not elsewhere and not some_moved:
        notes.append("No tensor differs between the two, so they are one checkpoint, or nothing was trained.")
    elif unexplained := [one for one in still if one not in found.get("did_not_move", ())]:
        notes.append(
            f"{len(unexplained)} of {len(records)} norm parameters did not move, such as {unexplained[0].name}: not "
            "tuned, or frozen on purpose. If they should learn, run the training with NormDoctor for a few steps."
        )
    return [Finding(kind, [one.name for one in its], _evidence(kind, its)) for kind, its in found.items()], notes


def _is_untrained(gains: Tensor) -> bool:
    """Whether gains are those of a new norm: all 1, or all 0 where the model adds 1 to what it stores."""
    return bool((gains == 1).all() or (gains == 0).all())


def _alone(before: list[str], after: list[str]) -> list[str]:
    """A note on norms that only one of the checkpoints has."""
    sides = {"earlier": before, "later": after}
    said = [f"{len(names)} only in the {side} one, such as {min(names)}" for side, names in sides.items() if names]
    which = "; ".join(said)
    return (
        [f"Norm parameters that were not compared: {which}. Two checkpoints of one body have the same."] if said else []
    )


def _is_rounded(before: Tensor, after: Tensor) -> bool:
    """Whether the entries that moved did so by a few spacings of a half-precision dtype."""
    narrow = max(before.dtype, after.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if narrow.itemsize > 2:
        return False
    old, new = before.to(narrow), after.to(narrow)
    moved = old != new
    return bool(((new.double() - old.double()).abs() / spacing(old))[moved].median() <= _ROUNDED)


def _evidence(kind: str, found: list[Record]) -> str:
    entries, moved = sum(one.entries for one in found), sum(one.moved for one in found)
    share = f"{moved:,} of {entries:,} entries moved"
    if kind == "too_coarse":
        able = sum(one.can_move or 0 for one in found)
        return f"Steps of at most {found[0].step:.3g} can move {able:,} of {entries:,} entries, and {share}."
    if kind == "decay_drift":
        return f"The factor is {found[0].shrank:.6g}."
    if kind == "nonfinite_value":
        return "Seen in the later checkpoint."
    return f"{share[0].upper()}{share[1:]}."
