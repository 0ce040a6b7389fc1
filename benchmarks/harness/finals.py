"""The reported rows of an experiment."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness.arms import find_arm
from benchmarks.harness.classification import SEEDS, Protocol, best_rates, final_cells, grown_cells, with_groups
from benchmarks.harness.metrics import ACCURACY, metric_of
from benchmarks.harness.rows import Cell, Row, Rows


class Finals:
    """The rows of one protocol, by task, arm, dtype and an arm's further coordinates."""

    def __init__(self, rows: Rows, protocol: Protocol, seeds: Sequence[int]) -> None:
        """Look into `rows`; `seeds` are the planned ones."""
        self.rows, self.protocol, self.seeds = rows, protocol, seeds

    def of(self, task: str, arm: str, dtype: str = "float32", **at: Any) -> list[Row]:
        """Return the rows there are, in the order of the seeds."""
        cells = final_cells(self.protocol, task, arm, dtype, self.seeds, **at)
        return [row for row in map(self.rows.get, cells) if row is not None]

    def rate(self, task: str, arm: str, dtype: str = "float32") -> str | None:
        """Return the learning rates that were chosen, and which was the smallest or largest tried.

        Rates of groups of parameters stand behind that of the rest, with their names.
        """
        said = [
            f"{name} {rate:g}".strip() + (" (edge)" if edge else "")
            for name, rate, edge in self._chosen(task, arm, dtype)
        ]
        return ", ".join(said) if said else None

    def at_edge(self, task: str, arm: str, dtype: str = "float32") -> bool:
        """Tell whether a learning rate that was chosen was the smallest or largest tried."""
        return any(edge for _, _, edge in self._chosen(task, arm, dtype))

    def _chosen(self, task: str, arm: str, dtype: str) -> list[tuple[str, float, bool]]:
        """Return the group, its rate and whether that is at the edge of its grid; nothing without a search."""
        searched = find_arm(arm).rate_of or arm
        kinds = with_groups(self.protocol, (task, searched, dtype))
        chosen = best_rates(self.rows, self.protocol, kinds)
        grids = {
            each: [cell["learning_rate"] for cell in grown_cells(self.rows, self.protocol, each)] for each in chosen
        }
        return [
            ("".join(each[3:]), rate, rate in (min(grids[each]), max(grids[each]))) for each, rate in chosen.items()
        ]


def edge_note(edges: Mapping[str, Iterable[str]]) -> str:
    """Return the sentence of a claim that says whose learning rates were at the edge of their grids.

    Args:
        edges: method -> tasks.

    Example:
        >>> edge_note({"ln": ["trec"], "full": [], "head": ["sst2", "trec"]})
        'At the edge of the learning rates tried: ln on trec; head on sst2, trec.'
        >>> edge_note({"ln": []})
        ''
    """
    found = {method: list(tasks) for method, tasks in edges.items()}
    said = "; ".join(f"{method} on {', '.join(tasks)}" for method, tasks in found.items() if tasks)
    return f"At the edge of the learning rates tried: {said}." if said else ""


def reported(rows: Rows, protocol: Protocol, dtype: str = "float32", every: bool = False) -> list[Cell]:
    """Return what is reported of a protocol: what this experiment has run, or with `every` what others have run too."""
    cells = [row["cell"] for row in (rows if every else rows.own()) if row["cell"]["phase"] == "final"]
    return [cell for cell in cells if cell["protocol"] == protocol.name and cell["dtype"] == dtype]


def seeds_of(cells: Iterable[Cell]) -> tuple[int, ...]:
    """Return the seeds that every arm is to have, and those of these cells beside them."""
    return tuple(sorted({*SEEDS, *(cell["seed"] for cell in cells)}))


def figures(rows: Sequence[Row]) -> list[float]:
    """Return the score of each row by its task's metric, as tables show it: accuracy in per cent and the like."""
    return [metric_of(row["cell"]["task"]).shown(row["metrics"]) for row in rows]


def by_seed(rows: Sequence[Row]) -> dict[int, float]:
    """Return seed -> score."""
    return {row["cell"]["seed"]: score for row, score in zip(rows, figures(rows), strict=True)}


def differences(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[int, float]:
    """Return seed -> by how many points ours are better than theirs, for every seed that both have.

    Example:
        >>> row = lambda seed, score: {"cell": {"task": "sst2", "seed": seed}, "metrics": {"accuracy": score}}
        >>> differences([row(0, 0.75), row(1, 0.5)], [row(0, 0.5)])
        {0: 25.0}
    """
    first, second = by_seed(ours), by_seed(theirs)
    shared = [seed for seed in first if seed in second]
    metric = metric_of(ours[0]["cell"]["task"]) if shared else ACCURACY
    return {seed: metric.gain(first[seed] - second[seed]) for seed in shared}
