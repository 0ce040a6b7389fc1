"""What full fine-tuning changes: the part of `layernorm_key_component.py`'s page that its rows of `full` give."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import Row
from benchmarks.harness.tables import markdown, mean_table
from peft_lntune.analysis import Table, plot_change
from peft_lntune.analysis.change import MEASURES

OUTPUT_NORM = "FFN norm"  # the paper's output LayerNorm, as the analysis names it
TOP = 8  # components in a table
MEASURED = {
    "mean_change": "raw mean change",
    "relative_to_mean": "change relative to mean size",
    "relative_to_std": "change relative to standard deviation",
}
CHANGE_NOTES = (
    "Mean |change| of each component with its layers pooled, weight and bias apart; mean over seeds. Raw means favour "
    "the weights of norms, which sit near 1 where others sit near 0.05, so the same is given relative to the "
    "component's mean size and to its standard deviation. The classifier starts anew and has no rank."
)


def output_norm(rows: Sequence[Row]) -> str:
    """Return the sentence on the paper's claim that full fine-tuning changes the output norm most.

    Args:
        rows: of `full`, of all tasks.
    """
    if not rows:
        return "The output norm (post-FFN) changes most in full fine-tuning: not measured yet."
    times = "; ".join(f"{MEASURED[measure]}: in {_times(measure, rows)}" for measure in MEASURES)
    return f"The output norm (post-FFN), its weight or its bias, changes most in full fine-tuning, by {times}."


def write_change(rows: Sequence[Row], results: Path, stem: str) -> Iterator[str]:
    """Write a task's CSV and picture, and yield the paragraphs of its section.

    Args:
        rows: of `full`, one a seed.
        results: folder.
        stem: name of both files without its ending.
    """
    if not rows:
        yield "Not run."
        return
    layers = _mean_table([row["change"]["layers"] for row in rows])
    layers.to_csv(results / f"{stem}.csv")
    plot_change(layers, results / f"{stem}.png")
    together = _ranked(_mean_table([row["change"]["components"] for row in rows]))
    yield "\n".join(f"- {_on_top(measure, together[measure], rows)}" for measure in MEASURES)
    lines: list[list[object]] = []
    for component, parameter in list(together[MEASURES[0]])[:TOP]:
        line: list[object] = [f"{component} {parameter}"]
        for measure in MEASURES:
            rank, value = together[measure].get((component, parameter), (None, None))
            line.append("-" if rank is None else f"{value:.4f} ({_ordinal(rank)})")
        lines.append(line)
    yield markdown(("component", *(MEASURED[measure] for measure in MEASURES)), lines)
    yield f"Each layer: [{stem}.csv]({stem}.csv), and as a picture:\n\n![Mean change]({stem}.png)"


Ranked = dict[str, dict[tuple[str, str], tuple[int, float]]]


def _ranked(components: Table) -> Ranked:
    """Measure -> component and parameter -> rank and value, the most changed first."""
    found: Ranked = {}
    for measure in MEASURES:
        table = components.sorted_by(measure, largest=True)
        names = zip(table.column("component"), table.column("parameter"), strict=True)
        values = [
            (name, value)
            for name, value in zip(names, table.column(measure), strict=True)
            if value is not None and name[0] != "head"
        ]
        found[measure] = {name: (rank, value) for rank, (name, value) in enumerate(values, start=1)}
    return found


def _on_top(measure: str, ranks: Mapping[tuple[str, str], tuple[int, float]], rows: Sequence[Row]) -> str:
    """Say whether the output norm changes most, with its ranks and in how many seeds it is so."""
    first = next(iter(ranks), None)
    if first is None:
        return f"{MEASURED[measure]}: nothing to rank."
    own = [f"{p} {_ordinal(rank)}" for (component, p), (rank, _) in ranks.items() if component == OUTPUT_NORM]
    said = "changes most" if first[0] == OUTPUT_NORM else "does not change most"
    return (
        f"{MEASURED[measure]}: the output norm {said}. First is {' '.join(first)}; the output norm's "
        f"{', '.join(own) or 'ranks: none'}, of {len(ranks)}; it is first in {_times(measure, rows)}."
    )


def _times(measure: str, rows: Sequence[Row]) -> str:
    """Say in how many of the runs the output norm changes most."""
    ranked = [_ranked(_mean_table([row["change"]["components"]]))[measure] for row in rows]
    return f"{sum(next(iter(ranks), ('',))[0] == OUTPUT_NORM for ranks in ranked)} of {len(rows)} runs"


def _mean_table(tables: Sequence[Mapping[str, Any]]) -> Table:
    """The mean over seeds of tables of changes, without their ranks."""
    found = mean_table([Table(**table) for table in tables], MEASURES)
    kept = [number for number, column in enumerate(found.columns) if not column.startswith("rank_")]
    return Table([found.columns[n] for n in kept], [[row[n] for n in kept] for row in found.rows])


def _ordinal(rank: int) -> str:
    end = "th" if 10 <= rank % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{end}"
