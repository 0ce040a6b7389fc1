"""A plan: the modules to tune, as data and as a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft_lntune.analysis.tables import Table, fill
from peft_lntune.architectures.attention import AttentionFacts
from peft_lntune.architectures.sublayers import Sublayer
from peft_lntune.core.delta import ParameterSlice
from peft_lntune.norms.find import Missed, Norm

__all__ = ["Plan", "PlannedModule"]


@dataclass(frozen=True)
class PlannedModule:
    """One module that is tuned, or that gets a bottleneck or a prefix.

    Attributes:
        name: the module's name in the model.
        module_class: the name of its class.
        place: facts about the module as a norm, the exit of a sub-layer, or attention; None for any other module.
        entries: for each tuned parameter, the number of tuned entries and the number of all entries.
        bytes: size of the tuned values in bytes, in memory and on disk; for a supermask, the size of its bits.
        method: `"delta"`, `"supermask"`, `"bottleneck"`, `"prefix"` or `"lora"`.
        blocks: the slice to tune, for each parameter that is tuned only in part.
    """

    name: str
    module_class: str
    place: Norm | Sublayer | AttentionFacts | None
    entries: Mapping[str, tuple[int, int]]
    bytes: int
    method: str = "delta"
    blocks: Mapping[str, ParameterSlice] = field(default_factory=dict)

    @property
    def roles(self) -> str:
        """The roles of the module for the table: joined by `+`, `"unknown"`, or `"-"` for a module without roles."""
        if isinstance(self.place, Norm):
            return "+".join(self.place.roles) or "unknown"
        return "-" if self.place is None else self.place.role

    def own_name(self, parameter: str) -> str:
        """What the module itself calls its weight or bias."""
        return self.place.parameters[parameter] if isinstance(self.place, Norm) else parameter

    @property
    def tuned(self) -> "PlannedModule":
        """This module without the parameters that have no tuned entry."""
        return replace(self, entries={name: count for name, count in self.entries.items() if count[0]})

    @property
    def counts(self) -> dict[str, int | None]:
        """Number of tuned entries per parameter, None for all. A layer makes its deltas from this."""
        return {name: None if tuned == size else tuned for name, (tuned, size) in self.entries.items()}


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Printing it gives a table; `parts` holds the same as data.

    Attributes:
        parts: the modules to tune, by name.
        left_out: norms that the config does not tune, by name, with the reason.
        selected: number of entries that the config selects for deltas, before any mask. It reveals a saved mask of
            another model, even if all tuned parameters exist in this one too.
        missed: modules that look like norms and cannot be tuned as norms, by name, without those the config excludes.
    """

    parts: Mapping[str, PlannedModule]
    left_out: Mapping[str, str] = field(default_factory=dict)
    selected: int = 0
    missed: Mapping[str, Missed] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        """Number of trainable values."""
        return sum(tuned for part in self.parts.values() for tuned, _ in part.entries.values())

    @property
    def bytes(self) -> int:
        """Size of all tuned values in bytes."""
        return sum(part.bytes for part in self.parts.values())

    def to_data(self) -> dict[str, Any]:
        """The plan as plain data, for JSON.

        Returns:
            `modules`: for each module its class, method, roles, bytes, and tuned and total entries by parameter;
            `not_tuned` and `missed`: the reason for each other norm, or module that looks like one; `entries` and
            `bytes`: totals.
        """
        modules = [
            {
                "module": part.name,
                "class": part.module_class,
                "method": part.method,
                "role": part.roles,
                "entries": {name: {"tuned": tuned, "of": size} for name, (tuned, size) in part.entries.items()},
                "bytes": part.bytes,
            }
            for part in self.parts.values()
        ]
        missed = {name: str(one) for name, one in self.missed.items()}
        totals = {"entries": self.entries, "bytes": self.bytes}
        return {"modules": modules, "not_tuned": dict(self.left_out), "missed": missed, **totals}

    def to_text(self, width: int | None = None) -> str:
        """The plan as a table.

        Args:
            width: longest line; None: no limit. A line may be longer if one word is.

        Returns:
            The table, and below it the norms that are not tuned, with the reasons.
        """
        header: tuple[str, ...] = ("module", "class", "method", "role", "tuned entries", "bytes")
        rows: list[tuple[str, ...]] = [
            (part.name, part.module_class, part.method, part.roles, _entries(part.entries), f"{part.bytes:,}")
            for part in self.parts.values()
        ]
        rows.append((f"{len(self.parts)} modules", "", "", "", f"{self.entries:,}", f"{self.bytes:,}"))
        if all(part.method == "delta" for part in self.parts.values()):
            header, rows = header[:2] + header[3:], [row[:2] + row[3:] for row in rows]
        lines = [Table(header, rows).to_text(width)]
        reasons = [f"{name}: {reason}" for name, reason in self.left_out.items()]
        missed = [str(one) for one in self.missed.values()]
        for title, texts in (("not tuned", reasons), ("not tuned, though they look like norms", missed)):
            if texts:
                lines += ["", f"{title}:", *(fill(f"  {text}", width, "    ") for text in texts)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()


def _entries(entries: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(
        f"{name} {tuned:,}" + ("" if tuned == size else f" of {size:,}") for name, (tuned, size) in entries.items()
    )
