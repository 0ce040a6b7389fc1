"""What a plan is: the places that something is done to, as data and as a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from peft_lntune.analysis.tables import Table
from peft_lntune.architectures.attention import AttentionFacts
from peft_lntune.architectures.sublayers import Sublayer
from peft_lntune.core.delta import ParameterSlice
from peft_lntune.norms.find import Missed, Norm

__all__ = ["Plan", "PlannedModule"]


@dataclass(frozen=True)
class PlannedModule:
    """One module that is tuned, or that something is put beside.

    Attributes:
        name: the module's name in the model.
        module_class: the name of its class.
        place: what is known of it: as a norm, as the exit of a sub-layer, as attention; None of any other module.
        entries: for each tuned parameter, how many of its entries are tuned and how many it has.
        bytes: size of what is tuned, in memory as on disk; of a supermask, that of its bits.
        method: `"delta"`, `"supermask"`, `"bottleneck"`, `"prefix"` or `"lora"`.
        blocks: for each parameter of which only a part is meant, that part.
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
        if isinstance(self.place, Norm):
            return "+".join(self.place.roles) or "unknown"
        return "-" if self.place is None else self.place.role

    def own_name(self, parameter: str) -> str:
        """What the module itself calls its weight or bias."""
        return self.place.parameters[parameter] if isinstance(self.place, Norm) else parameter

    @property
    def tuned(self) -> "PlannedModule":
        """The same without the parameters of which no entry is tuned."""
        return replace(self, entries={name: count for name, count in self.entries.items() if count[0]})

    @property
    def counts(self) -> dict[str, int | None]:
        """Tuned entries of each parameter, None for all: what a layer needs to make its deltas."""
        return {name: None if tuned == size else tuned for name, (tuned, size) in self.entries.items()}


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Printing it gives a table; `parts` holds the same as data.

    Attributes:
        parts: the modules to tune, by name.
        left_out: norms that the config does not tune, by name, with the reason.
        selected: entries of the deltas that the config selects, whether or not a mask leaves them out; it tells a saved
            mask of another model, where all that it tunes happens to be in this one too.
        missed: modules that look like norms and cannot be tuned as such, by name, but for what the config leaves out.
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
        """Size of all deltas."""
        return sum(part.bytes for part in self.parts.values())

    def __str__(self) -> str:
        header: tuple[str, ...] = ("module", "class", "method", "role", "tuned entries", "bytes")
        rows: list[tuple[str, ...]] = [
            (part.name, part.module_class, part.method, part.roles, _entries(part.entries), f"{part.bytes:,}")
            for part in self.parts.values()
        ]
        rows.append((f"{len(self.parts)} modules", "", "", "", f"{self.entries:,}", f"{self.bytes:,}"))
        if all(part.method == "delta" for part in self.parts.values()):
            header, rows = header[:2] + header[3:], [row[:2] + row[3:] for row in rows]
        lines = [str(Table(header, rows))]
        if self.left_out:
            lines += ["", "not tuned:", *(f"  {name}: {reason}" for name, reason in self.left_out.items())]
        if self.missed:
            lines += ["", "not tuned, though they look like norms:", *(f"  {one}" for one in self.missed.values())]
        return "\n".join(lines)


def _entries(entries: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(
        f"{name} {tuned:,}" + ("" if tuned == size else f" of {size:,}") for name, (tuned, size) in entries.items()
    )
