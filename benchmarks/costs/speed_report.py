"""The tables of `speed.py`, from its rows alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.claims import time_claim
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import NOT_RUN, cost_table

SLOWER = 1.02  # of plain lines in training, of the base model in generation: the bound this project set itself


def write_report(rows: Rows, results: Path, cells: Sequence[Cell], protocol: str) -> None:
    """Write `speed.md`, for another protocol than the CPU's with its name in it."""
    parts = [
        "# Time and peak memory",
        "Each group is timed in turns; ratios are taken within a round, to the first arm of the table. The arm named "
        "`again` is the first one a second time: how far its ratio is from 1 is noise.",
    ]
    for cell in cells:
        parts.append(f"## {cell['model']}, {cell['measure']}")
        row = rows.get(cell)
        parts += [NOT_RUN] if row is None else [cost_table(row["arms"]), _wanted(row)]
    results.mkdir(parents=True, exist_ok=True)
    stem = "speed" if protocol == "cpu" else f"speed_{protocol}"
    (results / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _wanted(row: Row) -> str:
    arms: dict[str, Any] = row["arms"]
    reference, again = list(arms)[:2]
    ours, noise = arms["ln"]["ratio"], arms[again]["ratio"]
    return time_claim(f"ln at most {SLOWER:.2f} of {reference}", ours, noise, SLOWER)
