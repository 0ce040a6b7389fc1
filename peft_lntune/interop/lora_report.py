"""The result of exporting an adapter as LoRA, and the choice of a rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peft_lntune.analysis.tables import Table

__all__ = ["RANKS", "LoraExport", "Spectrum", "norm_table", "rank_for", "rank_table"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks that vLLM can be started with (`--max-lora-rank`), from 8 on. LoRAX takes 8 to 128."""


@dataclass(frozen=True)
class Spectrum:
    """What a change of one linear map would lose by truncation.

    Attributes:
        place: the norm that the linear map reads; the linear map itself where it reads no changed norm.
        rank: the rank at which the change is exact.
        sides: inputs plus outputs of the linear map.
        energy: the energy of each direction of the change, largest first.
    """

    place: str
    rank: int
    sides: int
    energy: tuple[float, ...] = ()

    def lost(self, rank: int) -> float:
        """The energy that truncation at a rank leaves out."""
        return 0.0 if self.rank <= rank else math.fsum(self.energy[rank:])


@dataclass(frozen=True)
class LoraExport:
    """What `to_lora` has written. Printing it says how near the LoRA is to the adapter.

    Attributes:
        directory: the folder.
        rank: rank of the LoRA on each linear map.
        exact: whether the LoRA computes what the adapter computes, up to rounding.
        norms: a row per folded norm: the number of tuned entries, the number of linear maps that read it, and the error
            of their change, relative to the change (root mean square; 0 where it is exact).
        ranks: a row per rank that servers offer: size of the file in MB, error of the changes (the same, over all
            linear maps), and error of the logits, relative to the adapter's effect; None where it was not measured.
        effect: root mean square change of the logits by the adapter.
        error: root mean square difference of the logits of the LoRA and those of the adapter, without what was dropped.
        rounding: how far the logits of the adapter move by rounding alone.
        dropped: the modules that were left out, with the reasons.
        dropped_effect: root mean square change of the logits by leaving them out.
        zeros: number of linear maps with LoRA of zeros, because their counterpart in another layer is tuned.
    """

    directory: Path
    rank: int
    exact: bool
    norms: Table
    ranks: Table
    effect: float
    error: float
    rounding: float
    dropped: Mapping[str, str] = field(default_factory=dict)
    dropped_effect: float = 0.0
    zeros: int = 0

    def __str__(self) -> str:
        how = "exact: no norm has more tuned entries than the rank" if self.exact else "truncated"
        lines = [
            f"LoRA of rank {self.rank} in {self.directory}, {how}.",
            f"Error of the logits: {self.error:.2g}, {_share(self.error, self.effect)} of the adapter's effect of "
            f"{self.effect:.2g} (rounding alone: {self.rounding:.2g}).",
        ]
        if self.dropped:
            lines.append(
                f"Left out: {len(self.dropped)} modules, which changes the logits by {self.dropped_effect:.2g}, "
                f"{_share(self.dropped_effect, self.effect)} of the effect:"
            )
            lines += [f"  {name}: {reason}" for name, reason in self.dropped.items()]
        if self.zeros:
            lines.append(
                f"{self.zeros} linear maps have LoRA of zeros, because LoRAX drops a type of linear map that not every "
                "layer has LoRA on. With every_layer=False (--tuned-layers) they have none, and the file is smaller."
            )
        if not self.exact:
            lines += ["", str(self.norms), "", str(self.ranks)]
        return "\n".join(lines)


def rank_for(needed: int) -> int | None:
    """The smallest rank of `RANKS` that holds a change of this rank; None where none does.

    Args:
        needed: the rank of the change.

    Returns:
        The rank.

    Example:
        >>> rank_for(3), rank_for(64), rank_for(513)
        (8, 64, None)
    """
    return next((rank for rank in RANKS if rank >= needed), None)


def rank_table(spectra: list[Spectrum], measured: Mapping[int, float | None], more: int = 0) -> Table:
    """The ranks to choose from.

    Args:
        spectra: one per linear map.
        measured: the error of the logits at some ranks, relative to the adapter's effect.
        more: inputs plus outputs of linear maps with LoRA of zeros.

    Returns:
        Columns `rank`, `MB` (of the weights in float32), `changes` (relative error of the changes) and `logits`.
    """
    needed = max(spectrum.rank for spectrum in spectra)
    sides = more + sum(spectrum.sides for spectrum in spectra)
    whole = math.fsum(math.fsum(spectrum.energy) for spectrum in spectra)
    last = rank_for(needed) or RANKS[-1]
    rows = [
        (rank, 4 * rank * sides / 1e6, _root(spectra, rank, whole), measured.get(rank))
        for rank in sorted({*(rank for rank in RANKS if rank <= last), *measured})
    ]
    return Table(("rank", "MB", "changes", "logits"), rows)


def norm_table(spectra: list[Spectrum], entries: Mapping[str, int], rank: int) -> Table:
    """The error of each norm at a rank.

    Args:
        spectra: one per linear map.
        entries: the number of tuned entries of each norm.
        rank: the rank.

    Returns:
        Columns `norm`, `entries`, `linears` and `error`.
    """
    rows = []
    for place, count in entries.items():
        own = [spectrum for spectrum in spectra if spectrum.place == place]
        rows.append((place, count, len(own), _root(own, rank, math.fsum(math.fsum(each.energy) for each in own))))
    return Table(("norm", "entries", "linears", "error"), rows)


def _root(spectra: list[Spectrum], rank: int, whole: float) -> float:
    lost = math.fsum(spectrum.lost(rank) for spectrum in spectra)
    return math.sqrt(lost / whole) if lost else 0.0


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1e}" if whole else "none"
