"""Is every module a winning ticket, norms the best one, and because of their size? arXiv 2302.00378's experiments.

python -m benchmarks.papers.winning_tickets --protocol full
python -m benchmarks.papers.winning_tickets --data-dir <folder>
python -m benchmarks.papers.winning_tickets --data-dir <folder> --arms components layers
"""

import argparse
import operator
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig

from benchmarks.harness import classification, masked
from benchmarks.harness.answers import Answer, answer_section, measured_settings
from benchmarks.harness.arms import ALONE
from benchmarks.harness.claims import ABOUT_VERDICTS, Finding, listed, over_seeds
from benchmarks.harness.classification import (
    PROTOCOLS,
    Kind,
    Place,
    Protocol,
    choose_model,
    experiment_parser,
    final_cells,
    refuse_unknown,
    run_experiment,
    search_first,
)
from benchmarks.harness.comparison import ABOUT_DIFFERENCES, ABOUT_HEAD, ABOUT_RATES, Bound, Comparison, Side, not_run
from benchmarks.harness.finals import Finals, figures, reported, seeds_of
from benchmarks.harness.magnitude import COUNT, LARGEST, OTHER_LARGEST, mean_magnitude
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.models import classes
from benchmarks.harness.paired import Paired
from benchmarks.harness.plots import ABOUT_ACROSS, ABOUT_DOTS, Line, Lines, Panel, plot_along, plot_dots
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.tables import NOT_RUN, mean_and_spread, of_what_ran
from benchmarks.harness.tasks import TEXT_COLUMNS
from benchmarks.papers.accuracy import ABOVE_HEAD, NEAR_FULL
from peft_lntune import LNTuningConfig, ModuleTuningConfig, plan
from peft_lntune.architectures.table import ComponentName
from peft_lntune.config.deltas import Tune
from peft_lntune.core.delta import PARAMETERS
from peft_lntune.errors import NoMatchError, UnsupportedError

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


def answers(compared: Comparison, scope: Scope) -> list[Answer]:
    """Return what the rows say of each claim of the abstract."""
    near = (f"within {NEAR_FULL:g} points of full", -NEAR_FULL)
    layers = scope.layers_alone()
    every = [NORMS, *scope.others_alone()]
    alone = [compared.asked(Bound(side, FULL, near[0], near[1], operator.ge)) for side in every]
    acceptable = (f"at least {ABOVE_HEAD:g} points above head", ABOVE_HEAD)
    single = [
        _extreme(compared, layers, FULL, "norms of a single layer", "best", *near, ask=compared.asked),
        _extreme(compared, layers, HEAD, "norms of any single layer", "worst", *acceptable, ask=compared.asked),
    ]
    return [
        Answer("every module, tuned alone, is comparable to full fine-tuning", alone),
        Answer("LayerNorms transfer best per trained weight", [_per_entry(compared, scope.others_alone())]),
        Answer("the norms of a single layer (0.003 % of BERT) show acceptable performance", single),
        Answer("because of their high-magnitude weights", [*map(compared.asked, bounds(scope))]),
    ]


def claims(compared: Comparison, scope: Scope) -> Iterator[Finding]:
    """Yield what is found of each claim."""
    near = (f"within {NEAR_FULL:g} points of full", -NEAR_FULL)
    above = (f"at least {ABOVE_HEAD:g} points above head", ABOVE_HEAD)
    layers = scope.layers_alone()
    yield _extreme(compared, [NORMS, *scope.others_alone()], FULL, "every component alone", "worst", *near)
    yield _per_entry(compared, scope.others_alone())
    yield _extreme(compared, layers, FULL, "norms of a single layer", "best", *near)
    yield _extreme(compared, layers, HEAD, "norms of any single layer", "worst", *above)
    yield from map(compared.wanted, bounds(scope))


def _extreme(
    compared: Comparison,
    sides: Sequence[Side],
    against: Side,
    said: str,
    which: str,
    wanted: str,
    bound: float,
    ask: Callable[[Bound], Finding] | None = None,
) -> Finding:
    """Hold the worst or the best of some arms to a bound."""
    ranked, missing = compared.ranked(sides, against)
    if not ranked:
        return Finding(f"{said} {wanted}")
    chosen = ranked[-1] if which == "best" else ranked[0]
    named = replace(chosen, said=f"{said} (the {which} is {chosen.said}{not_run(missing)})")
    return (ask or compared.wanted)(Bound(named, against, wanted, bound, operator.ge))


def points_per_entry(compared: Comparison, side: Side) -> Gains:
    """Return task -> seed -> points above head per `PER` tuned entries; nothing where no entry is tuned."""
    found: Gains = {}
    for task, points in compared.differences(side, HEAD).items():
        entries = {row["num_method_params"] for row in side.rows(compared.found, task)} - {0}
        found[task] = {seed: PER * value / max(entries) for seed, value in points.items() if entries}
    return found


def _per_entry(compared: Comparison, others: Sequence[Side]) -> Finding:
    """Compare what norms gain an entry with what the best of the other components does."""
    wanted = f"norms gain more points over head per {PER:,} tuned entries than any other component"
    ours = points_per_entry(compared, NORMS)
    theirs = {side.said: points_per_entry(compared, side) for side in others}
    means = {said: statistics.mean(values) for said, gains in theirs.items() if (values := compared.average(gains))}
    if not means or not compared.average(ours):
        return Finding(wanted)
    rival = max(means, key=lambda said: means[said])
    pairs = compared.of_averaged(
        {
            task: {seed: ours[task][seed] - gain for seed, gain in gains.items() if seed in ours[task]}
            for task, gains in theirs[rival].items()
        }
    )
    missing = not_run(side for side in others if side.said not in means)
    if not Paired(pairs).seeds:
        return Finding(wanted, missing="Not measured yet on equal seeds")
    note = compared.edges([NORMS, *(side for side in others if side.said == rival)])
    note = f"{note} This ratio favours whatever is small; equal numbers of entries are compared below.".lstrip()
    return over_seeds(f"{wanted} ({rival} has most{missing})", pairs, compared.planned, note=note)


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


NAME = "winning_tickets"
EVERY = {"weight": "ln-weight", "bias": "ln-bias"}  # the arms that tune every gain, every bias


def write_report(rows: Rows, results: Path, scope: Scope) -> None:
    """Write the page and its plots."""
    compared = Comparison(Finals(rows, scope.protocol, scope.seeds), scope.tasks, scope.tasks)
    results.mkdir(parents=True, exist_ok=True)
    settings = measured_settings(rows, scope.protocol, scope.tasks, scope.seeds, partial(answers, scope=scope))
    parts = [*_title(scope), *answer_section(settings), *_held(compared, scope)]
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
    yield "## What holds"
    yield listed(finding.line for finding in claims(compared, scope))
    yield (
        f"Differences are taken within a seed. {ABOUT_VERDICTS} Which component or layer "
        "is the best or the worst is told from the same figures, which is kind to the best and hard on the worst."
    )


# Tables.


def _components(compared: Comparison, scope: Scope, results: Path) -> Iterator[str]:
    yield "## One component in all layers"
    others = scope.others_alone()
    lines = []
    for side in (NORMS, *others, FULL, HEAD):
        per_entry = mean_and_spread(compared.average(points_per_entry(compared, side)), compared.planned, digits=3)
        entries, rates = compared.entries(side.arm), _rates(compared, side)
        lines.append([side.said, entries, *_scores(compared, side), None if side is HEAD else per_entry, rates])
    rate = _rate_column(compared)
    header = ("component", "tuned entries", *_columns(compared), f"above head per {PER:,} entries", rate)
    yield of_what_ran(header, lines)
    yield f"{ABOUT_HEAD} {ABOUT_RATES} Norms are the arm `ln`: every norm of the model, the embeddings' included."
    yield from _beside(compared, scope, results, [NORMS, *others])
    yield ABOUT_DIFFERENCES.format(also="", tasks="the tasks")
    against_full = [(side, FULL) for side in (NORMS, *others)]
    yield compared.difference_table([*against_full, *((NORMS, side) for side in others)])


def _layers(compared: Comparison, scope: Scope, results: Path) -> Iterator[str]:
    yield "## The norms of one layer"
    sides = [*scope.layers_alone(), NORMS]
    lines = [
        [side.said, compared.entries(side.arm, **side.at), *_scores(compared, side), _rates(compared, side)]
        for side in sides
    ]
    yield of_what_ran(("norms of", "tuned entries", *_columns(compared), _rate_column(compared)), lines)
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
        scores = [*_scores(compared, side), _rates(compared, side)]
        lines.append([of, WAYS[side.arm], f"{side.at['count']:,}", size, *scores])
    for parameter, count in scope.shape.norms.items():
        side = Side(SAID[parameter], EVERY[parameter])
        scores = [*_scores(compared, side), _rates(compared, side)]
        lines.append([SAID[parameter], "every one", f"{count:,}", None, *scores])
    header = ("entries of", "chosen", "entries", "mean size", *_columns(compared), _rate_column(compared))
    yield of_what_ran(header, lines, names=3)
    yield _about_few(compared)
    for parameter in scope.shape.norms:
        yield from _curves(compared, scope, results, parameter)
    yield compared.difference_table(few_pairs(scope))


def _about_few(compared: Comparison) -> str:
    searched = (of_norms(LARGEST, "weight", COUNT), of_others(OTHER_LARGEST, COUNT))
    norms, others = (_rates(compared, side) or NOT_RUN for side in searched)
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


def _rate_column(compared: Comparison) -> str:
    return compared.header()[-1]


def _rates(compared: Comparison, side: Side) -> str | None:
    return compared.rates(side.arm, **side.at)


def _columns(compared: Comparison) -> tuple[str, ...]:
    return (*compared.tasks, "on average", "minus full", "minus head")


def _scores(compared: Comparison, side: Side) -> list[object]:
    """Return scores by task and on average, and how far that is from full and from head."""
    cells = compared.scores(side.arm, **side.at)
    for control in (FULL, HEAD):
        values = compared.average(compared.differences(side, control))
        cells.append(None if side is control else mean_and_spread(values, compared.planned))
    return cells


def _mean_size(compared: Comparison, side: Side) -> str | None:
    rows = [row for task in compared.tasks for row in side.rows(compared.found, task)]
    return f"{statistics.mean(row['mean_magnitude'] for row in rows):.3g}" if rows else None


# Pictures; each yields the line that shows it, where there is anything to draw.


def _beside(compared: Comparison, scope: Scope, results: Path, sides: Sequence[Side]) -> Iterator[str]:
    """Draw each arm by itself, beside the others."""
    said = "each component alone in all layers"
    yield from _rows(compared, scope, results / f"{scope.protocol.stem(f'{NAME}_components')}.png", {"": sides}, said)


def _rows(
    compared: Comparison, scope: Scope, path: Path, groups: Mapping[str, Sequence[Side]], said: str
) -> Iterator[str]:
    """Draw a row for each arm, with full and head above them."""
    panels = []
    for task in compared.tasks:
        drawn = {heading: dots for heading, sides in groups.items() if (dots := compared.dots(task, sides))}
        if drawn:
            controls = compared.dots(task, [FULL, HEAD])
            drawn = {"": [*controls, *drawn.pop("", [])], **drawn}
            panels.append(Panel(task, metric_of(task).along, drawn, across=(FULL.arm, HEAD.arm)))
    if panels:
        plot_dots(path, panels, f"Accuracy after {scope.protocol.steps} steps: {said}")
        yield f"![Accuracy of {said}, on {', '.join(panel.title for panel in panels)}]({path.name})"
        yield f"{ABOUT_DOTS} {ABOUT_ACROSS}"


def _in_a_row(compared: Comparison, scope: Scope, results: Path, sides: Sequence[Side]) -> Iterator[str]:
    """Draw arms that follow each other as one line, with full, head and all norms across the panel."""
    path = results / f"{scope.protocol.stem(f'{NAME}_layers')}.png"
    panels: dict[str, Lines] = {}
    for task in compared.tasks:
        scores = {place: figures(side.rows(compared.found, task)) for place, side in enumerate(sides)}
        points = [(place, values) for place, values in scores.items() if values]
        if points:
            across = [(side.said, side.arm, figures(side.rows(compared.found, task))) for side in (FULL, NORMS, HEAD)]
            lines = {said: Line(arm, [(0, values)], across=True) for said, arm, values in across if values}
            panels[task] = {"norms of one layer": Line(LAYER, points), **lines}
    if panels:
        title = f"Accuracy after {scope.protocol.steps} steps: the norms of one layer"
        along, upright = "layer of which the norms are tuned", {task: metric_of(task).along for task in panels}
        plot_along(path, panels, title, along, upright, whole=True)
        yield f"![Accuracy of the norms of one layer, on {', '.join(panels)}]({path.name})"
        yield f"{ABOUT_DOTS} Bands across the panel do the same for full, all norms and head."


def _curves(compared: Comparison, scope: Scope, results: Path, parameter: str) -> Iterator[str]:
    """Draw the ways to choose few entries, under the number of the entries, and at last every entry."""
    groups: dict[str, list[Side]] = {}
    for side in scope.few():
        if side.at.get("parameter", "weight") == parameter:
            way = WAYS[side.arm] if side.arm in NORM_WAYS else f"{WAYS[side.arm]} {OTHERS_SAID}"
            groups.setdefault(f"{side.at['count']:,} entries", []).append(replace(side, said=way))
    groups[f"{scope.shape.norms[parameter]:,} entries"] = [
        Side(f"every one of the {SAID[parameter]}", EVERY[parameter])
    ]
    said = f"{SAID[parameter]} of norms"
    path = results / f"{scope.protocol.stem(f'{NAME}_{SAID[parameter]}')}.png"
    yield from _rows(compared, scope, path, groups, said)


def _left_out(compared: Comparison, scope: Scope) -> Iterator[str]:
    """Name every arm without rows, and what there is no arm for."""
    yield "## Not run here"
    groups = {
        "components": [NORMS, *scope.others_alone(), FULL, HEAD],
        "layers": scope.layers_alone(),
        "few entries": scope.few(),
    }
    lines = list(compared.not_run(groups))
    lines += [
        f"- {count:,} {SAID[parameter]}: the norms of this model have {size:,}."
        for parameter, size in scope.shape.norms.items()
        for count in scope.counts
        if count > size
    ]
    lines.append("- The pooler alone: every arm trains it with the classifier, so it is the arm `head`.")
    yield "\n".join(lines)


DTYPE = "float32"
# What a protocol runs where the command line says nothing: a Hub id (None: MiniLM), and tasks.
MODELS = {"full": "bert-base-uncased"}  # None elsewhere: MiniLM, or the protocol's own
TASKS = ("sst2", "trec")
HUB_TASKS = {"full": ("sst2", "cola", "mrpc", "rte")}
COUNTS = (768, 48, 192, 3072)  # most informative first
FIRST = 2  # of the counts, that come before other modules
GROUPS = {
    "components": (*CONTROLS, *ALONE),
    "layers": (LAYER,),
    "magnitude": tuple(NORM_WAYS),
    "others": tuple(OTHER_WAYS),
}
ARM_NAMES = tuple(arm for arms in GROUPS.values() for arm in arms)


def shape_of(model: str) -> Shape:
    """Return what of the experiments a model has room for, from its config alone."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        empty = classes(2).auto_class.from_config(config)
    norms = {parameter: _entries(empty, LNTuningConfig(tune=cast(Tune, parameter))) for parameter in PARAMETERS}
    there = tuple(name for name in ALONE if _entries(empty, ModuleTuningConfig(components=[cast(ComponentName, name)])))
    return Shape(there, config.num_hidden_layers, {name: size for name, size in norms.items() if size})


def _entries(model: nn.Module, config: LNTuningConfig | ModuleTuningConfig) -> int:
    try:
        return plan(model, config).entries
    except (NoMatchError, UnsupportedError):
        return 0


def stages(options: argparse.Namespace, shape: Shape) -> list[list[dict[str, Any]]]:
    """Return the coordinates of what is reported (arm, layer, count, parameter), most informative first."""
    first, rest = options.counts[:FIRST], options.counts[FIRST:]

    def norms(counts: Sequence[int], parameter: str) -> list[dict[str, Any]]:
        kept = [count for count in counts if count <= shape.norms[parameter]]
        return [{"arm": arm, "count": count, "parameter": parameter} for count in kept for arm in NORM_WAYS]

    def others(counts: Sequence[int]) -> list[dict[str, Any]]:
        return [{"arm": arm, "count": count} for count in counts for arm in OTHER_WAYS]

    found: list[list[dict[str, Any]]] = [
        [{"arm": arm} for arm in (*CONTROLS, *shape.components)],
        [{"arm": LAYER, "layer": layer} for layer in range(shape.layers)],
        *(norms(first, parameter) for parameter in shape.norms),
        others(first),
        *(norms(rest, parameter) for parameter in shape.norms),
        others(rest),
    ]
    return [[at for at in stage if at["arm"] in options.arms] for stage in found]


def waves(options: argparse.Namespace, protocol: Protocol, shape: Shape) -> list[list[Cell]]:
    """Return the cells most informative first; each stage searches its learning rates first."""
    finals = partial(final_cells, protocol, dtype=DTYPE, seeds=options.seeds)
    planned = [[(task, at) for at in stage for task in options.tasks] for stage in stages(options, shape)]
    return search_first(protocol, [[cell for task, at in stage for cell in finals(task, **at)] for stage in planned])


def run_cell(cell: Cell, protocol: Protocol, place: Place, rates: dict[Kind, float]) -> Row:
    """Run one cell of any arm; a reported one of few entries also says how large they were before."""
    tune = partial(masked.tune, protocol=protocol, place=place, rates=rates)
    wanted = cell["arm"] in masked.CHOICES and cell["phase"] == "final"
    return classification.run_cell(cell, protocol, place, rates, tune, _sized if wanted else None)


def _sized(model: nn.Module) -> Row:
    return {"mean_magnitude": float(f"{mean_magnitude(model):.6g}")}


def shared_rows(results: Path) -> list[Row]:
    """Return rows of other benchmarks that count here too: cells are equal where protocol, model and arm are."""
    names = ("accuracy", "layernorm_key_component", "unified_framework")
    return [row for name in names for row in Rows(results / f"{name}.jsonl")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = experiment_parser("Is every module a winning ticket, and norms because of their size?")
    known = (*GROUPS, *ARM_NAMES)
    parser.add_argument("--arms", nargs="+", choices=known, default=[*GROUPS], help="groups of arms, or arms")
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="of entries, the most valuable first")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or HUB_TASKS.get(options.protocol, TASKS)
    options.arms = [arm for name in options.arms for arm in GROUPS.get(name, (name,))]
    refuse_unknown(parser, options.tasks, TEXT_COLUMNS)
    return options


def scope(options: argparse.Namespace, protocol: Protocol, shape: Shape, rows: Rows) -> Scope:
    """Return what is reported: what the protocol plans, and what else has been asked for or run."""
    run = [cell for cell in reported(rows, protocol, DTYPE) if cell["arm"] in ARM_NAMES]
    counts = [cell["count"] for cell in run if "count" in cell]
    return Scope(
        protocol=protocol,
        tasks=tuple(
            dict.fromkeys((*HUB_TASKS.get(options.protocol, TASKS), *options.tasks, *(cell["task"] for cell in run)))
        ),
        shape=shape,
        counts=tuple(sorted({*options.counts, *counts})),
        first=tuple(options.counts[:FIRST]),
        seeds=seeds_of(run),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    options.model, protocol = choose_model(options.model, MODELS.get(options.protocol), PROTOCOLS[options.protocol])
    shape = shape_of(options.model)
    rows = Rows(options.results / f"{NAME}.jsonl")
    rows.adopt(shared_rows(options.results))
    failed = 0
    if not options.report:
        failed = run_experiment(NAME, options, protocol, rows, waves(options, protocol, shape), run_cell)
    if not options.list:
        write_report(rows, options.results, scope(options, protocol, shape, rows))
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
