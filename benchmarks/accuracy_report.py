"""The table and the plot of `accuracy.py`, from its rows alone."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness.arms import find_arm
from benchmarks.harness.classification import Kind, Protocol, best_rates, final_cells
from benchmarks.harness.plots import plot_against_size
from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.tables import markdown, mean_and_spread

# The bounds this project set itself before it measured, in points of accuracy.
NEAR_FULL = 2.0
ABOVE_HEAD = 10.0
NEAR_FLOAT32 = 1.0
DTYPES = ("float32", "bfloat16")
HEADER = ("arm", "tuned entries", "float32", "bf16 base", "rate", "rate, bf16", "moved", "moved, bf16")


def write_report(
    rows: Rows, results: Path, protocol: Protocol, tasks: Sequence[str], arms: Sequence[str], seeds: Sequence[int]
) -> None:
    """Write `accuracy.md` and `accuracy.png`, for another protocol than the CPU's with its name in them."""
    stem = "accuracy" if protocol.name == "cpu" else f"accuracy_{protocol.name}"
    parts = [
        f"# Accuracy in per cent: mean ± standard deviation over {len(seeds)} seeds",
        f"Protocol `{protocol.name}`: {protocol.steps} steps of {protocol.batch_size} rows for every arm.",
    ]
    found = _Finals(rows, protocol, seeds)
    for task in tasks:
        parts += [f"## {task}", markdown(HEADER, [_line(found, task, arm) for arm in arms])]
        parts += ["\n".join(f"- {line}" for line in _wanted(found, task))]
    parts += [_notes()]
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{stem}.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    sizes = found.sizes(tasks, arms)
    if sizes:
        panels = {task: {dtype: found.panel(task, arms, dtype) for dtype in DTYPES} for task in tasks}
        title = "Accuracy at equal steps: mean, worst and best seed"
        plot_against_size(results / f"{stem}.png", panels, sizes, title)


class _Finals:
    """The reported rows, by task, arm and dtype."""

    def __init__(self, rows: Rows, protocol: Protocol, seeds: Sequence[int]) -> None:
        self.rows, self.protocol, self.seeds = rows, protocol, seeds

    def of(self, task: str, arm: str, dtype: str) -> list[Row]:
        cells = final_cells(self.protocol, task, arm, dtype, self.seeds)
        return [row for row in map(self.rows.get, cells) if row is not None]

    def scores(self, task: str, arm: str, dtype: str) -> list[float]:
        return [100 * row["metrics"]["accuracy"] for row in self.of(task, arm, dtype)]

    def differences(self, ours: Kind, theirs: Kind) -> list[float]:
        """Return ours minus theirs for every seed that both have."""
        scores = [
            {row["cell"]["seed"]: 100 * row["metrics"]["accuracy"] for row in self.of(*k)} for k in (ours, theirs)
        ]
        return [scores[0][seed] - scores[1][seed] for seed in self.seeds if all(seed in known for known in scores)]

    def panel(self, task: str, arms: Iterable[str], dtype: str) -> dict[str, list[float]]:
        return {arm: self.scores(task, arm, dtype) for arm in arms}

    def sizes(self, tasks: Iterable[str], arms: Sequence[str]) -> dict[str, int]:
        places = [(task, arm, dtype) for task in tasks for arm in arms for dtype in DTYPES]
        return {arm: row["num_method_params"] for task, arm, dtype in places for row in self.of(task, arm, dtype)}

    def rate(self, task: str, arm: str, dtype: str) -> str | None:
        chosen = best_rates(self.rows, self.protocol, [(task, arm, dtype)]).get((task, arm, dtype))
        if chosen is None:
            return None
        rates = find_arm(arm).rates
        return f"{chosen:g}" + (" (edge)" if chosen in (min(rates), max(rates)) else "")

    def moved(self, task: str, arm: str, dtype: str) -> str | None:
        shares = [row["metrics"]["moved"] for row in self.of(task, arm, dtype)]
        if not shares:
            return None
        return "no own entries" if shares[0] is None else f"{100 * statistics.mean(shares):.1f} %"


def _line(found: _Finals, task: str, arm: str) -> list[object]:
    rows = [row for dtype in DTYPES for row in found.of(task, arm, dtype)]
    return [
        arm,
        f"{rows[0]['num_method_params']:,}" if rows else None,
        *(mean_and_spread(found.scores(task, arm, dtype), len(found.seeds)) for dtype in DTYPES),
        *(found.rate(task, arm, dtype) for dtype in DTYPES),
        *(found.moved(task, arm, dtype) for dtype in DTYPES),
    ]


def _wanted(found: _Finals, task: str) -> list[str]:
    """Compare ours with the bounds set beforehand, seed by seed."""
    ours = (task, "ln", "float32")
    near_full = found.differences(ours, (task, "full", "float32"))
    above_head = found.differences(ours, (task, "head", "float32"))
    wide = found.differences((task, "ln", "bfloat16"), ours)
    planned = len(found.seeds)
    lines = []
    if near_full:
        held = statistics.mean(near_full) >= -NEAR_FULL
        lines.append(_verdict(f"ln within {NEAR_FULL:g} points of full", near_full, planned, held))
    if above_head:
        held = statistics.mean(above_head) >= ABOVE_HEAD
        lines.append(_verdict(f"ln at least {ABOVE_HEAD:g} points above head", above_head, planned, held))
    if wide:
        held = abs(statistics.mean(wide)) <= NEAR_FLOAT32
        lines.append(_verdict(f"ln over a bf16 base within {NEAR_FLOAT32:g} point of float32", wide, planned, held))
    return lines


def _verdict(wanted: str, differences: Sequence[float], planned: int, held: bool) -> str:
    measured = mean_and_spread(differences, planned)
    return f"Wanted: {wanted}. Measured, seed by seed: {measured}: {'held' if held else 'did not hold'}."


def _notes() -> str:
    return (
        "`rate` is the learning rate chosen on held-out training rows; `(edge)` marks the smallest or largest tried. "
        "`tuned entries` leaves the head out, which every arm trains, in float32 also over a bf16 base. "
        "`moved` is the share of the tuned entries that differ from their start after training."
    )
