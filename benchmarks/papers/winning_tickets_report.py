"""The tables and plots of `winning_tickets.py`, from its rows and those it shares with other benchmarks."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.harness.comparison import ABOUT_DIFFERENCES, ABOUT_HEAD, ABOUT_RATES, Comparison, Side
from benchmarks.harness.finals import Finals, figures
from benchmarks.harness.magnitude import COUNT, LARGEST, OTHER_LARGEST
from benchmarks.harness.plots import Curves, plot_along, plot_curves
from benchmarks.harness.rows import Rows
from benchmarks.harness.tables import NOT_RUN, markdown, mean_and_spread
from benchmarks.papers.winning_tickets_claims import (
    FULL,
    HEAD,
    NORM_WAYS,
    NORMS,
    OTHERS_SAID,
    PER,
    SAID,
    WAYS,
    Scope,
    claims,
    few_pairs,
    points_per_entry,
)

NAME = "winning_tickets"
EVERY = {"weight": "ln-weight", "bias": "ln-bias"}  # the arms that tune every gain, every bias
NONE = "-"
PLOT_TITLE = "Accuracy at equal steps: mean, worst and best seed"


def write_report(rows: Rows, results: Path, scope: Scope) -> None:
    """Write the page and its plots."""
    compared = Comparison(Finals(rows, scope.protocol, scope.seeds), scope.tasks, scope.tasks)
    results.mkdir(parents=True, exist_ok=True)
    parts = [*_title(scope), *_held(compared, scope)]
    for section in (_components, _layers, _few):
        parts += section(compared, scope, results)
    parts += _left_out(compared, scope)
    (results / f"{scope.protocol.stem(NAME)}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _title(scope: Scope) -> Iterator[str]:
    protocol = scope.protocol
    yield "# Which module is a winning ticket, and is it its magnitude?"
    yield (
        f"Protocol `{protocol.name}`: {protocol.steps} steps of {protocol.batch_size} rows for every arm; accuracy in "
        f"per cent, mean ± standard deviation over {len(scope.seeds)} seeds. Questions are those of arXiv 2302.00378; "
        "models, steps and rates are our own, so nothing here reproduces its tables."
    )


def _held(compared: Comparison, scope: Scope) -> Iterator[str]:
    yield "## What held"
    yield "\n".join(claims(compared, scope))
    yield (
        "Differences are taken within a seed; `open` says that their spread covers the bound. Which component or layer "
        "is the best or the worst is told from the same figures, which is kind to the best and hard on the worst."
    )


# Tables.


def _components(compared: Comparison, scope: Scope, results: Path) -> Iterator[str]:
    yield "## One component in all layers"
    others = scope.others_alone()
    lines = []
    for side in (NORMS, *others, FULL, HEAD):
        per_entry = mean_and_spread(compared.average(points_per_entry(compared, side)), compared.planned, digits=3)
        entries, rates = compared.entries(side.arm), compared.rates(side.arm)
        lines.append([side.said, entries, *_scores(compared, side), NONE if side is HEAD else per_entry, rates])
    *_, rate = compared.header()
    header = ("component", "tuned entries", *_columns(compared), f"above head per {PER:,} entries", rate)
    yield markdown(header, lines)
    yield f"{ABOUT_HEAD} {ABOUT_RATES} Norms are the arm `ln`: every norm of the model, the embeddings' included."
    yield from _beside(compared, scope, results, [NORMS, *others])
    yield ABOUT_DIFFERENCES.format(also="", tasks="the tasks")
    against_full = [(side, FULL) for side in (NORMS, *others)]
    yield compared.difference_table([*against_full, *((NORMS, side) for side in others)])


def _layers(compared: Comparison, scope: Scope, results: Path) -> Iterator[str]:
    yield "## The norms of one layer"
    sides = [*scope.layers_alone(), NORMS]
    lines = [[side.said, compared.entries(side.arm, **side.at), *_scores(compared, side)] for side in sides]
    yield markdown(("norms of", "tuned entries", *_columns(compared)), lines)
    yield (
        "Both norms of the layer; layer 0 is the first, and `norms` are all norms of the model, whose rate the others "
        "take: none was searched for them, and fewer entries may want a larger one."
    )
    yield from _in_a_row(compared, scope, results, sides[:-1])


def _few(compared: Comparison, scope: Scope, results: Path) -> Iterator[str]:
    yield "## Few entries: is it magnitude, or is it the norm?"
    lines: list[list[object]] = []
    for side in scope.few():
        of = SAID.get(side.at.get("parameter", ""), OTHERS_SAID)
        size = _mean_size(compared, side)
        lines.append([of, WAYS[side.arm], f"{side.at['count']:,}", size, *_scores(compared, side)])
    for parameter, count in scope.shape.norms.items():
        scores = _scores(compared, Side(SAID[parameter], EVERY[parameter]))
        lines.append([SAID[parameter], "every one", f"{count:,}", NONE, *scores])
    yield markdown(("entries of", "chosen", "entries", "mean size", *_columns(compared)), lines)
    yield _about_few(compared)
    for parameter in scope.shape.norms:
        yield from _curves(compared, scope, results, parameter)
    yield compared.difference_table(few_pairs(scope))


def _about_few(compared: Comparison) -> str:
    norms, others = (compared.rates(arm) or NOT_RUN for arm in (LARGEST, OTHER_LARGEST))
    return (
        "`mean size` is the mean |w| of the chosen entries before training. Entries are ranked over all gains, or over "
        "all biases, together. The median is that of an entry's own vector, since each norm has a level of its own. "
        "Chance is drawn anew for each task and seed. Other modules are query to FFN down, their weights without "
        "biases.\n\n"
        f"Two rates a task ({'; '.join(compared.tasks)}) serve all of these: norms take that of the {COUNT} largest "
        f"gains ({norms}), other modules that of their {COUNT} largest weights ({others}). A rate suits what it was "
        "searched for, so a lead of the largest gains may in part be the rate's, and other counts and biases may want "
        "another. `every one` has a rate of its own."
    )


def _columns(compared: Comparison) -> tuple[str, ...]:
    return (*compared.tasks, "on average", "minus full", "minus head")


def _scores(compared: Comparison, side: Side) -> list[object]:
    """Return scores by task and on average, and how far that is from full and from head."""
    cells = compared.scores(side.arm, **side.at)
    for control in (FULL, HEAD):
        values = compared.average(compared.differences(side, control))
        cells.append(NONE if side is control else mean_and_spread(values, compared.planned))
    return cells


def _mean_size(compared: Comparison, side: Side) -> str | None:
    rows = [row for task in compared.tasks for row in side.rows(compared.found, task)]
    return f"{statistics.mean(row['mean_magnitude'] for row in rows):.3g}" if rows else None


# Pictures; each yields the line that shows it, where there is anything to draw.


def _beside(compared: Comparison, scope: Scope, results: Path, sides: Sequence[Side]) -> Iterator[str]:
    """Draw each arm by itself, beside the others."""
    curves = {side.said: {place: side} for place, side in enumerate(sides)}
    name, said = scope.protocol.stem(f"{NAME}_components"), "component, alone in all layers"
    yield from _along(compared, results / f"{name}.png", curves, [FULL, HEAD], said, [*curves])


def _in_a_row(compared: Comparison, scope: Scope, results: Path, sides: Sequence[Side]) -> Iterator[str]:
    """Draw arms that follow each other as one line."""
    name, said = scope.protocol.stem(f"{NAME}_layers"), "layer of which the norms are tuned"
    curves = {"norms of one layer": dict(enumerate(sides))}
    yield from _along(compared, results / f"{name}.png", curves, [FULL, HEAD, NORMS], said)


def _along(
    compared: Comparison,
    path: Path,
    curves: Mapping[str, Mapping[int, Side]],
    across: Sequence[Side],
    said: str,
    ticks: Sequence[str] = (),
) -> Iterator[str]:
    """Draw curves of arms at their places, with the arms that they are compared with across the panel."""
    panels: dict[str, Curves] = {}
    for task in compared.tasks:
        points = {name: _points(compared, task, places) for name, places in curves.items()}
        bands = {side.said: _points(compared, task, {0: side}) for side in across}
        if any(points.values()):
            panels[task] = {name: found for name, found in {**points, **bands}.items() if found}
    if panels:
        names = [side.said for side in across]
        plot_along(path, panels, PLOT_TITLE, said, bands=names, ticks=ticks)
        yield f"![Accuracy: {said}]({path.name})"


def _points(compared: Comparison, task: str, places: Mapping[int, Side]) -> list[tuple[int, list[float]]]:
    scores = {place: figures(side.rows(compared.found, task)) for place, side in places.items()}
    return [(place, values) for place, values in scores.items() if values]


def _curves(compared: Comparison, scope: Scope, results: Path, parameter: str) -> Iterator[str]:
    """Draw accuracy against the number of entries, a line a way; a norm's ends in every one of its entries."""
    sides = [side for side in scope.few() if side.at.get("parameter", "weight") == parameter]
    panels: dict[str, Curves] = {}
    for task in compared.tasks:
        curves: dict[str, list[tuple[int, list[float]]]] = {}
        for side in sides:
            point = compared.point(task, side.arm, **side.at)
            if point:
                way = WAYS[side.arm] if side.arm in NORM_WAYS else f"{WAYS[side.arm]} {OTHERS_SAID}"
                curves.setdefault(way, []).append(point)
        if not curves:
            continue
        every = compared.point(task, EVERY[parameter])
        for way in NORM_WAYS.values():
            if way in curves and every:
                curves[way].append(every)
        controls = {side.said: compared.point(task, side.arm) for side in (FULL, HEAD)}
        panels[task] = curves | {said: [point] for said, point in controls.items() if point}
    if panels:
        name = f"{scope.protocol.stem(f'{NAME}_{SAID[parameter]}')}.png"
        title = f"{SAID[parameter].capitalize()} of norms. {PLOT_TITLE}"
        plot_curves(results / name, panels, title, bands=[FULL.said, HEAD.said])
        yield f"![Accuracy against the number of {SAID[parameter]}]({name})"


def _left_out(compared: Comparison, scope: Scope) -> Iterator[str]:
    """Name every arm without rows, and what there is no arm for."""
    yield "## Not run here"
    groups = {
        "components": [NORMS, *scope.others_alone(), FULL, HEAD],
        "layers": scope.layers_alone(),
        "few entries": scope.few(),
    }
    lines = [f"- {name}, {said}" for name, sides in groups.items() for said in _missing(compared, sides)]
    lines += [
        f"- {count:,} {SAID[parameter]}: the norms of this model have {size:,}."
        for parameter, size in scope.shape.norms.items()
        for count in scope.counts
        if count > size
    ]
    lines.append("- The pooler alone: every arm trains it with the classifier, so it is the arm `head`.")
    yield "\n".join(lines)


def _missing(compared: Comparison, sides: Sequence[Side]) -> Iterator[str]:
    """Yield for each task what has no row, and what has too few."""
    for task in compared.tasks:
        runs = {side.said: len(side.rows(compared.found, task)) for side in sides}
        none = [said for said, count in runs.items() if not count]
        some = [f"{said} (some seeds)" for said, count in runs.items() if 0 < count < compared.planned]
        if len(none) == len(sides):
            yield f"{task}: all of them."
        elif none or some:
            yield f"{task}: {', '.join((*none, *some))}."
