"""The tables of `operations.py`, from its rows alone."""

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.claims import claim
from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.tables import markdown

# The bounds this project set itself before it counted.
A_NORM = 0  # operations more than the base model, a norm, in evaluation, where nothing can be trained
A_TRAINABLE = 1  # operations more than the base model, a tuned tensor, in evaluation between two training steps
A_TENSOR = 2  # operations more than plain `requires_grad` lines, a tuned tensor, in a training step
MIXED = 1.10  # of the base model's operations, for any number of adapters in the batch


def page(
    rows: Rows,
    models: Sequence[str],
    arms: Sequence[str],
    mixed_arms: Sequence[str],
    adapters: Sequence[int],
) -> str:
    """The page of all tables."""
    parts = ["# Dispatched operations"]
    for model in models:
        parts += [f"## {model}", "### Evaluation without gradients, one adapter", _evaluation(rows, model, arms)]
        parts += ["### Training step: forward and backward", _training(rows, model, arms)]
        parts += ["### Mixed batch of 64 rows, body without head", _mixed(rows, model, mixed_arms, adapters)]
        parts += ["\n".join(_wanted(rows, model, adapters))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(rows: Rows, **cell: Any) -> Row:
    return rows.get(cell) or {}


def _count(row: Row, key: str = "operations") -> str | None:
    """Return a count as text, or why there is none."""
    if row.get("status", "success") != "success":
        return row["status"]
    return f"{row[key]:,}" if row else None


def _more(row: Row, base: Row, parts: float | None) -> float | None:
    """Return the operations beyond the base's, for each of so many parts."""
    if "operations" not in row or "operations" not in base or not parts:
        return None
    return (row["operations"] - base["operations"]) / parts


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _evaluation(rows: Rows, model: str, arms: Sequence[str]) -> str:
    base = _row(rows, measure="evaluation", model=model, arm="base")
    lines: list[list[object]] = []
    for arm in ("base", *arms):
        row = _row(rows, measure="evaluation", model=model, arm=arm)
        more = _number(_more(row, base, base.get("norms")), "+.2f")
        trainable = _count(_row(rows, measure="trainable", model=model, arm=arm)) if arm != "base" else "-"
        lines.append([arm, _count(row, "operations_first"), _count(row), more or "-", trainable])
    title = ("arm", "first call", "later calls", "more than base, a norm", "while it can be trained")
    return markdown(title, lines)


def _training(rows: Rows, model: str, arms: Sequence[str]) -> str:
    plain = _row(rows, measure="training", model=model, arm="plain")
    lines: list[list[object]] = []
    for arm in arms:
        row = _row(rows, measure="training", model=model, arm=arm)
        more = _number(_more(row, plain, plain.get("tuned_tensors")), "+.2f")
        lines.append([arm, row.get("tuned_tensors"), _count(row), more or "-"])
    return markdown(("arm", "tuned tensors", "operations", "more than plain, a tensor that plain tunes"), lines)


def _mixed(rows: Rows, model: str, arms: Sequence[str], adapters: Sequence[int]) -> str:
    base = _row(rows, measure="evaluation", model=model, arm="base")
    lines: list[list[object]] = []
    for arm in arms:
        found = [_row(rows, measure="mixed", model=model, arm=arm, adapters=number) for number in adapters]
        ratios = [_ratio(row, base) for row in found]
        counts = [
            None if ratio is None else f"{_count(row)} ({ratio:.2f})" for row, ratio in zip(found, ratios, strict=True)
        ]
        lines.append([arm, *counts])
    title = f"operations (of the base's {base.get('operations', 0):,})"
    return markdown((f"arm: {title}", *(f"{number} adapters" for number in adapters)), lines)


def _ratio(row: Row, base: Row) -> float | None:
    return row["operations"] / base["operations"] if "operations" in row and "operations" in base else None


def _wanted(rows: Rows, model: str, adapters: Sequence[int]) -> list[str]:
    """Compare our counts with the bounds set beforehand."""
    base = _row(rows, measure="evaluation", model=model, arm="base")
    plain = _row(rows, measure="training", model=model, arm="plain")
    ours = _row(rows, measure="training", model=model, arm="ln")
    one = _row(rows, measure="evaluation", model=model, arm="ln")
    norm = _more(one, base, base.get("norms"))
    between = _row(rows, measure="trainable", model=model, arm="ln")
    trainable = _more(between, base, between.get("tuned_tensors"))
    tensor = _more(ours, plain, ours.get("tuned_tensors"))
    mixed = [_ratio(_row(rows, measure="mixed", model=model, arm="ln", adapters=number), base) for number in adapters]
    lines = []
    if norm is not None:
        first = one["operations_first"] - one["operations"]
        counted = f"{norm:+.2f}, and {first:,} once, in the first call after a change"
        lines.append(claim(f"{A_NORM} more a norm in evaluation", counted, norm <= A_NORM))
    if trainable is not None:
        wanted = f"at most {A_TRAINABLE} more a tuned tensor in evaluation while it can be trained"
        lines.append(claim(wanted, f"{trainable:+.2f}", trainable <= A_TRAINABLE))
    if tensor is not None:
        wanted = f"at most {A_TENSOR} more a tuned tensor in a training step than plain lines"
        lines.append(claim(wanted, f"{tensor:+.2f}", tensor <= A_TENSOR))
    known = [ratio for ratio in mixed if ratio is not None]
    if known:
        wanted = f"a mixed batch at most {MIXED:.2f} of the base, the same for any number of adapters"
        held = max(known) <= MIXED and max(known) == min(known)
        lines.append(claim(wanted, f"{min(known):.3f} to {max(known):.3f}", held))
    return lines
