"""How far full fine-tuning moves: the part of `how_fine.py`'s page that its rows of `full` give."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.harness.rows import Row
from benchmarks.harness.tables import markdown, mean_and_spread, mean_table
from peft_lntune.analysis import Table, plot_closeness
from peft_lntune.analysis.distances import CONTROLS, DISTANCES

CLOSER = 10.0  # times closer than two random models are to each other: the bound set before measuring
UNEVEN = 1.5  # times the layer that moves least: likewise
SAID = {"angle": "angle", "mean_l1": "mean L1"}  # the paper's two distances
MEASURES = [*DISTANCES, *(f"{control}_{name}" for control in CONTROLS for name in DISTANCES)]
ABOUT_CLOSENESS = (
    "Mean L1 is ||w1 - w0||_1 / n, the angle is arccos(cosine) / pi: 0 for one direction, 0.5 at right angles. "
    "`random`: two random initialisations of the model from its config. `noise`: the start, and the start plus "
    "Gaussian noise of the norm that the step has in each tensor. The head is left out. Layers are pooled over their "
    "matrices alone, since gains and biases of two random models are equal; a `-` stands for what is outside the "
    "layers, here the embeddings."
)


def distance_bounds(rows: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yield the lines that say whether the paper's two claims on distances held.

    Args:
        rows: task -> rows of `full`, one a seed.
    """
    layers = [_table(row, "layers") for each in rows.values() for row in each]
    close = (
        f"matrices of every layer and the embeddings at least {CLOSER:g} times closer to the pretrained ones than "
        "those of two random models to each other"
    )
    uneven = (
        f"movement uneven over layers: the layer that moves most at least {UNEVEN:g} times the one that moves least"
    )
    for wanted, measured in ((close, _closer), (uneven, _uneven)):
        said = ". ".join(measured(layers, measure) for measure in SAID) if layers else "Not measured yet"
        yield f"- Wanted: {wanted}. {said}."


def _closer(layers: Sequence[Table], measure: str) -> str:
    """Say how many times further apart two random models are, from the worst layer to the best, in how many runs."""
    each = [list(map(_ratio, t.column(f"random_{measure}"), t.column(measure))) for t in layers]
    return _held(measure, [ratio for ratios in each for ratio in ratios], [min(ratios) for ratios in each], CLOSER)


def _uneven(layers: Sequence[Table], measure: str) -> str:
    """Say how uneven the layers are, and which moves most."""
    numbered = [dict(zip(t.column("layer"), t.column(measure), strict=True)) for t in layers]
    each = [{layer: value for layer, value in found.items() if layer is not None} for found in numbered]
    ratios = [_ratio(max(found.values()), min(found.values())) for found in each]
    most = Counter(max(found, key=lambda layer: found[layer]) for found in each)
    first = ", ".join(f"layer {layer} in {count}" for layer, count in sorted(most.items()))
    return f"{_held(measure, ratios, ratios, UNEVEN)} (moves most: {first})"


def _held(measure: str, ratios: Sequence[float], decisive: Sequence[float], bound: float) -> str:
    runs = sum(ratio >= bound for ratio in decisive)
    verdict = "held" if runs == len(decisive) else "did not hold" if not runs else "held in part"
    reach = f"{min(ratios):.1f} to {max(ratios):.1f} times"
    return f"By {SAID[measure]}: {reach}, {verdict} ({runs} of {len(decisive)} runs)"


def write_closeness(rows: Sequence[Row], results: Path, stem: str, planned: int) -> Iterator[str]:
    """Write a task's CSV and picture, and yield the paragraphs of its section.

    Args:
        rows: of `full`, one a seed.
        results: folder.
        stem: name of both files without its ending.
        planned: number of seeds.
    """
    if not rows:
        yield "Not run."
        return
    places = mean_table([_table(row, "places") for row in rows], MEASURES)
    places.to_csv(results / f"{stem}.csv")
    plot_closeness(places, results / f"{stem}.png")
    layers = [_table(row, "layers") for row in rows]
    yield markdown(("layer", *_heads()), [_line(layers, n, (layer,), planned) for n, layer in _numbered(layers)])
    components = [_table(row, "components") for row in rows]
    order = mean_table(components, MEASURES).column("angle")
    names = list(zip(components[0].column("component"), components[0].column("parameter"), strict=True))
    chosen = [n for n in range(len(names)) if names[n][1] == "weight" and order[n] is not None]
    chosen.sort(key=lambda n: -order[n])
    lines = [_line(components, n, (names[n][0],), planned) for n in chosen]
    yield "Weights of each component with its layers pooled, the one that turns most first:"
    yield markdown(("component", *_heads()), lines)
    yield f"Each layer, and biases: [{stem}.csv]({stem}.csv), and as a picture:\n\n![Angles]({stem}.png)"


def _numbered(layers: Sequence[Table]) -> Iterator[tuple[int, str]]:
    for number, layer in enumerate(layers[0].column("layer")):
        yield number, "-" if layer is None else str(layer)


def _heads() -> Iterator[str]:
    for said in SAID.values():
        yield from (said, f"{said}, noise", f"{said}, random")


def _line(tables: Sequence[Table], number: int, first: Sequence[object], planned: int) -> list[object]:
    """Return a line of a table: each distance with its spread over seeds, and those of the controls."""
    line = list(first)
    for measure in SAID:
        line.append(mean_and_spread(_known(tables, measure, number), planned, digits=5))
        for control in ("noise", "random"):
            values = _known(tables, f"{control}_{measure}", number)
            line.append(f"{statistics.mean(values):.5f}" if values else "-")
    return line


def _known(tables: Sequence[Table], measure: str, number: int) -> list[float]:
    values = (table.column(measure)[number] for table in tables)
    return [value for value in values if value is not None]


def _table(row: Row, name: str) -> Table:
    return Table(**row["closeness"][name])


def _ratio(value: float, by: float) -> float:
    return value / by if by else math.inf
