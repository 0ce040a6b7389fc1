"""What `winning_tickets.py` compares, as it stands in sentences, and arXiv 2302.00378's claims with their figures."""

import operator
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.harness.classification import Protocol
from benchmarks.harness.comparison import Bound, Comparison, Side, not_run
from benchmarks.harness.finals import certainty, verdict
from benchmarks.harness.magnitude import LARGEST, OTHER_LARGEST
from benchmarks.papers.accuracy_report import ABOVE_HEAD, NEAR_FULL

CONTROLS = ("ln", "full", "head")
LAYER = "ln-layer"
RANDOM, SMALLEST, FARTHEST, OTHER_RANDOM = "norm-random", "norm-smallest", "norm-farthest", "other-random"
NORM_WAYS = {LARGEST: "largest", SMALLEST: "smallest", RANDOM: "random", FARTHEST: "farthest from the median"}
OTHER_WAYS = {OTHER_LARGEST: "largest", OTHER_RANDOM: "random"}
WAYS = {**NORM_WAYS, **OTHER_WAYS}
SAID = {"weight": "gains", "bias": "biases"}
OTHERS_SAID = "weights of other modules"
NORMS, FULL, HEAD = Side("norms", "ln"), Side("full", "full"), Side("head", "head")
PER = 1000  # entries
Gains = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Shape:
    """What of the experiments a model has room for.

    Attributes:
        components: that it has, norms aside.
        layers: how many.
        norms: `weight` and `bias`, or one of them: how many such entries its norms have together.
    """

    components: tuple[str, ...]
    layers: int
    norms: Mapping[str, int]


@dataclass(frozen=True)
class Scope:
    """What is reported.

    Attributes:
        protocol: of the rows.
        tasks: in this order.
        shape: of the model.
        counts: of entries, rising.
        first: counts that the claims are about.
        seeds: planned ones, and others that were run.
    """

    protocol: Protocol
    tasks: tuple[str, ...]
    shape: Shape
    counts: tuple[int, ...]
    first: tuple[int, ...]
    seeds: tuple[int, ...]

    def others_alone(self) -> list[Side]:
        """Return every component alone but norms."""
        return [Side(name.replace("_", " ").replace("ffn", "FFN"), name) for name in self.shape.components]

    def layers_alone(self) -> list[Side]:
        """Return the norms of each layer."""
        return [Side(f"layer {number}", LAYER, {"layer": number}) for number in range(self.shape.layers)]

    def parameters_with(self, counts: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield parameters of norms, each with the counts that there are so many entries for."""
        for parameter, size in self.shape.norms.items():
            yield from ((parameter, count) for count in counts if count <= size)

    def few(self) -> list[Side]:
        """Return every choice of few entries."""
        norms = [of_norms(arm, *at) for at in self.parameters_with(self.counts) for arm in NORM_WAYS]
        return norms + [of_others(arm, count) for count in self.counts for arm in OTHER_WAYS]


def of_norms(arm: str, parameter: str, count: int) -> Side:
    """Return some gains or biases."""
    words = (WAYS[arm], SAID[parameter])
    said = " ".join(reversed(words) if arm == FARTHEST else words)
    return Side(f"{count:,} {said}", arm, {"count": count, "parameter": parameter})


def of_others(arm: str, count: int) -> Side:
    """Return some weights of other modules."""
    return Side(f"{count:,} {WAYS[arm]} {OTHERS_SAID}", arm, {"count": count})


def claims(compared: Comparison, scope: Scope) -> Iterator[str]:
    """Yield a line for each claim."""
    near = (f"within {NEAR_FULL:g} points of full", -NEAR_FULL)
    above = (f"at least {ABOVE_HEAD:g} points above head", ABOVE_HEAD)
    layers = scope.layers_alone()
    yield _extreme(compared, [NORMS, *scope.others_alone()], FULL, "every component alone", "worst", *near)
    yield _per_entry(compared, scope.others_alone())
    yield _extreme(compared, layers, FULL, "norms of a single layer", "best", *near)
    yield _extreme(compared, layers, HEAD, "norms of any single layer", "worst", *above)
    yield from map(compared.wanted, bounds(scope))


def _extreme(
    compared: Comparison, sides: Sequence[Side], against: Side, said: str, which: str, wanted: str, bound: float
) -> str:
    """Hold the worst or the best of some arms to a bound."""
    ranked, missing = compared.ranked(sides, against)
    if not ranked:
        return f"- Wanted: {said} {wanted}. Not measured yet."
    chosen = ranked[-1] if which == "best" else ranked[0]
    named = replace(chosen, said=f"{said} (the {which} is {chosen.said}{not_run(missing)})")
    return compared.wanted(Bound(named, against, wanted, bound, operator.ge))


def points_per_entry(compared: Comparison, side: Side) -> Gains:
    """Return task -> seed -> points above head per `PER` tuned entries; nothing where no entry is tuned."""
    found: Gains = {}
    for task, points in compared.differences(side, HEAD).items():
        entries = {row["num_method_params"] for row in side.rows(compared.found, task)} - {0}
        found[task] = {seed: PER * value / max(entries) for seed, value in points.items() if entries}
    return found


def _per_entry(compared: Comparison, others: Sequence[Side]) -> str:
    """Compare what norms gain an entry with what the best of the other components does."""
    wanted = f"norms gain more points over head per {PER:,} tuned entries than any other component"
    ours = points_per_entry(compared, NORMS)
    theirs = {side.said: points_per_entry(compared, side) for side in others}
    means = {said: statistics.mean(values) for said, gains in theirs.items() if (values := compared.average(gains))}
    if not means or not compared.average(ours):
        return f"- Wanted: {wanted}. Not measured yet."
    rival = max(means, key=lambda said: means[said])
    values = compared.average(
        {
            task: {seed: ours[task][seed] - gain for seed, gain in gains.items() if seed in ours[task]}
            for task, gains in theirs[rival].items()
        }
    )
    missing = not_run(side for side in others if side.said not in means)
    if not values:
        return f"- Wanted: {wanted}. Not measured yet on equal seeds."
    held = verdict(f"{wanted} ({rival} has most{missing})", values, compared.planned, statistics.mean(values) > 0)
    return (
        f"- {held} How sure: {certainty(values, 0.0)}. This ratio favours whatever is small; equal numbers of entries "
        "are compared below."
    )


def bounds(scope: Scope) -> Iterator[Bound]:
    """Yield what holds if magnitude is the reason, at the first counts."""
    at_first = [*scope.parameters_with(scope.first)]
    for parameter, count in at_first:
        for way in (RANDOM, SMALLEST):
            theirs = of_norms(way, parameter, count)
            yield Bound(of_norms(LARGEST, parameter, count), theirs, f"above {WAYS[way]} ones")
    for parameter, count in at_first:
        if parameter == "weight":
            theirs = of_others(OTHER_LARGEST, count)
            yield Bound(of_norms(LARGEST, parameter, count), theirs, f"above as many largest {OTHERS_SAID}")
    for count in scope.first:
        yield Bound(of_others(OTHER_LARGEST, count), of_others(OTHER_RANDOM, count), "above random ones")


def few_pairs(scope: Scope) -> Iterator[tuple[Side, Side]]:
    """Yield the choices of equal number whose differences are shown."""
    at_all = [*scope.parameters_with(scope.counts)]
    for parameter, count in at_all:
        for ours, theirs in ((LARGEST, RANDOM), (LARGEST, SMALLEST), (FARTHEST, RANDOM), (FARTHEST, LARGEST)):
            yield of_norms(ours, parameter, count), of_norms(theirs, parameter, count)
    for parameter, count in at_all:
        if parameter == "weight":
            for ours, theirs in ((LARGEST, OTHER_LARGEST), (RANDOM, OTHER_RANDOM)):
                yield of_norms(ours, parameter, count), of_others(theirs, count)
    for count in scope.counts:
        yield of_others(OTHER_LARGEST, count), of_others(OTHER_RANDOM, count)
