"""Markdown tables of results; a cell without a row says so."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft_lntune.analysis import Table

NOT_RUN = "not run"
NONE = "-"  # a cell of which there is nothing to say


def markdown(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Return a markdown table; None becomes 'not run'.

    Example:
        >>> print(markdown(["arm", "score"], [["ln", None]]))
        | arm | score |
        |---|---|
        | ln | not run |
    """
    return Table(header, lines).to_markdown(missing=NOT_RUN)


def of_what_ran(header: Sequence[str], lines: Sequence[Sequence[object]], names: int = 1) -> str:
    """Return a markdown table without the lines and columns of which nothing was run.

    Args:
        header: of all columns.
        lines: None is what was not run; it becomes `-` where something else of its line and of its column was.
        names: how many columns at the left say what a line is.

    Example:
        >>> print(of_what_ran(["arm", "sst2", "stsb", "trec"], [["ln", 81, None, 94], ["mam", 82, None, None]]))
        | arm | sst2 | trec |
        |---|---|---|
        | ln | 81 | 94 |
        | mam | 82 | - |
        >>> of_what_ran(["arm", "sst2"], [["ln", None]])
        'Nothing was run.'
    """
    ran = [line for line in lines if any(cell is not None for cell in line[names:])]
    if not ran:
        return "Nothing was run."
    kept = [at for at in range(len(header)) if at < names or any(line[at] is not None for line in ran)]
    return Table([header[at] for at in kept], [[line[at] for at in kept] for line in ran]).to_markdown(missing=NONE)


def what_did_not_run(runs: Mapping[str, Mapping[str, int]], planned: int) -> Iterator[str]:
    """Yield what has no row or too few, tasks of which the same is missing together.

    Args:
        runs: task -> name of a method -> how many seeds were run.
        planned: seeds.

    Example:
        >>> list(what_did_not_run({"sst2": {"ln": 3, "mam": 0}, "trec": {"ln": 3, "mam": 0}, "stsb": {"ln": 0}}, 3))
        ['sst2, trec: mam.', 'stsb: all.']
        >>> list(what_did_not_run({"sst2": {"ln": 1, "mam": 0, "lora": 0, "full": 0}}, 3))
        ['sst2: all but ln (1 of 3 seeds).']
        >>> list(what_did_not_run({"sst2": {"ln": 1, "mam": 1}}, 3))
        ['sst2: all have 1 of 3 seeds.']
    """
    tasks: dict[str, list[str]] = {}
    for task, methods in runs.items():
        none = [method for method, count in methods.items() if not count]
        some = [f"{method} ({count} of {planned} seeds)" for method, count in methods.items() if 0 < count < planned]
        ran = [method for method, count in methods.items() if count >= planned]
        if none or some:
            few = len(ran) + len(some) < len(none)
            missing = f"all but {', '.join((*ran, *some))}" if few else ", ".join((*none, *some))
            if len(counts := {*methods.values()}) == 1 and len(methods) > 1:
                missing = f"all have {counts.pop()} of {planned} seeds" if some else "all"
            tasks.setdefault("all" if len(none) == len(methods) else missing, []).append(task)
    yield from (f"{', '.join(names)}: {missing}." for missing, names in tasks.items())


def mean_and_spread(values: Sequence[float], planned: int, digits: int = 1) -> str | None:
    """Return 'mean ± standard deviation', with the number of runs where some of the planned ones are missing.

    Example:
        >>> mean_and_spread([84.0, 86.0], planned=3)
        '85.0 ± 1.4 (2 of 3 runs)'
    """
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    text = f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"
    return text if len(values) == planned else f"{text} ({len(values)} of {planned} runs)"


def as_row(table: Table) -> dict[str, Any]:
    """Return a table as JSON values, with six digits of a float; `Table(**...)` reads it.

    Example:
        >>> as_row(Table(["score"], [[1 / 3], [None]]))
        {'columns': ['score'], 'rows': [[0.333333], [None]]}
    """
    rows = [[float(f"{value:.6g}") if isinstance(value, float) else value for value in row] for row in table.rows]
    return {"columns": list(table.columns), "rows": rows}


def mean_table(tables: Sequence[Table], measures: Sequence[str]) -> Table:
    """Return the mean of the measures over tables of the same rows, behind the columns named by none of `measures`.

    Example:
        >>> one, two = (Table(["norm", "score"], [["ln", score]]) for score in (1.0, 2.0))
        >>> print(mean_table([one, two], ["score"]))
        norm  score
        ln    1.5
    """
    places = [column for column in tables[0].columns if column not in measures]
    kept = zip(*(tables[0].column(place) for place in places), strict=True)
    each = [zip(*(table.column(measure) for table in tables), strict=True) for measure in measures]
    means = [[None if None in values else statistics.mean(values) for values in measured] for measured in each]
    return Table(
        (*places, *measures), [(*place, *row) for place, row in zip(kept, zip(*means, strict=True), strict=True)]
    )


def quartiles(values: Sequence[float], digits: int = 3) -> str:
    """Return 'median (first quartile to third quartile)'.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0], digits=1)
        '3.0 (2.0 to 4.0)'
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def cost_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of times and peaks of memory, each beside the first arm's.

    Args:
        arms: name -> `seconds` and `ratio`, each first quartile, median and third quartile, and
            `accelerator_memory_max` in bytes.
    """
    first = next(iter(arms.values()))["accelerator_memory_max"]
    lines: list[list[object]] = []
    for name, arm in arms.items():
        low, middle, high = arm["ratio"]
        peak = arm["accelerator_memory_max"]
        milliseconds = f"{1000 * arm['seconds'][1]:.1f}"
        memory = [f"{peak / 1e6:.2f}", f"{peak / first:.3f}"]
        lines.append([name, milliseconds, f"{middle:.3f} ({low:.3f} to {high:.3f})", *memory])
    return markdown(("arm", "milliseconds", "ratio: median (quartiles)", "peak, MB", "peak ratio"), lines)
