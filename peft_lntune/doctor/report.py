"""What the doctor says: a summary, findings with advice, and a table of norm parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_lntune.analysis.tables import Table, fill
from peft_lntune.doctor.faults import Finding
from peft_lntune.doctor.records import Record

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """The result of a look at the norms of a training run, or at two checkpoints.

    Attributes:
        records: one per norm parameter.
        findings: one per kind of fault; empty for a sound run.
        looks: number of steps that were looked at; 0 for checkpoints.
        notes: what was left out, and why.
    """

    records: Sequence[Record]
    findings: Sequence[Finding]
    looks: int = 0
    notes: Sequence[str] = ()

    @property
    def tuned(self) -> list[Record]:
        """The parameters that are trained, or that the optimizer holds."""
        return [record for record in self.records if record.is_tuned]

    @property
    def table(self) -> Table:
        """One row per norm parameter that is tuned.

        Columns `parameter`, `dtype`, `entries`, and the shares of entries that `can_move` (None if the step is not
        known), that `moved`, and, of those, that moved `one_way`, the more frequent direction (None if none moved).
        """
        rows = [
            (
                one.name,
                one.dtype,
                one.entries,
                _ratio(one.can_move, one.entries),
                _ratio(one.moved, one.entries),
                _ratio(one.one_way, one.moved),
            )
            for one in self.tuned
        ]
        return Table(("parameter", "dtype", "entries", "can_move", "moved", "one_way"), tuple(rows))

    @property
    def summary(self) -> Table:
        """The shares of `table`, pooled over weights and biases of each dtype."""
        pooled: dict[tuple[str, str], list[Record]] = {}
        for one in self.tuned:
            pooled.setdefault((one.role, one.dtype), []).append(one)
        rows = []
        for (role, dtype), found in pooled.items():
            entries, moved = sum(one.entries for one in found), sum(one.moved for one in found)
            known = [one for one in found if one.can_move is not None]
            able = _ratio(sum(one.can_move or 0 for one in known), sum(one.entries for one in known))
            one_way = _ratio(sum(one.one_way for one in found), moved)
            rows.append((role, dtype, len(found), entries, able, _ratio(moved, entries), one_way))
        return Table(("role", "dtype", "parameters", "entries", "can_move", "moved", "one_way"), tuple(rows))

    def to_text(self, width: int | None = None) -> str:
        """The report for people.

        Args:
            width: longest line; None: no limit.

        Returns:
            The summary, then each finding with its advice, then notes.
        """
        still = len(self.records) - len(self.tuned)
        parts = [self.summary.to_text(width)] if self.tuned else []
        if not self.records:
            parts.append("No norm was found.")
        elif still:
            what = "No norm is tuned" if not self.tuned else f"{still} of {len(self.records)} parameters are not tuned"
            parts.append(f"{what}: frozen, or of an adapter that is not in training.")
        parts += [fill(str(finding), width, "  ") for finding in self.findings]
        if self.tuned and not self.findings:
            parts.append("No fault was found.")
        parts += [fill(note, width, "  ") for note in self.notes]
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.to_text()

    def to_data(self) -> Mapping[str, Any]:
        """The report as JSON has it: `findings`, `summary`, `table`, `looks` and `notes`."""
        return {
            "findings": [finding.to_data() for finding in self.findings],
            "summary": self.summary,
            "table": self.table,
            "looks": self.looks,
            "notes": list(self.notes),
        }


def _ratio(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else part / whole
