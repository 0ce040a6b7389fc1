"""Which entries of the norms matter? Magnitude, Fisher information, movement and usefulness of each, side by side.

python -m benchmarks.papers.norm_entries --data-dir <folder>
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import classification
from benchmarks.harness.claims import ABOUT_VERDICTS, listed, over_seeds
from benchmarks.harness.classification import (
    PROTOCOLS,
    Kind,
    Place,
    Protocol,
    by_name,
    choose_model,
    experiment_parser,
    load_base,
    run_experiment,
    search_cells,
)
from benchmarks.harness.finals import Finals, edge_note, seeds_of
from benchmarks.harness.leave_out import (
    Answers,
    Named,
    answers,
    contributions,
    flat,
    partition,
    quantile,
    spearman,
    usefulness,
    without,
)
from benchmarks.harness.masked import fisher_information
from benchmarks.harness.paired import Pairs
from benchmarks.harness.plots import ABOUT_DOTS, Dot, Panel, plot_dots, plot_matrices
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import stamp
from benchmarks.harness.splits import Batch, batches, ordered_batches
from benchmarks.harness.tables import mean_and_spread, of_what_ran
from benchmarks.harness.tasks import TEXT_COLUMNS, Task, load_task
from benchmarks.harness.training import Schedule, train
from peft_lntune.selection import change_scores, magnitude_scores
from peft_lntune.selection.effective import effective_parameters

NAME = "norm_entries"
SCORES = ("magnitude", "Fisher", "movement")
MEASURED = (*SCORES, "contribution", "leave-out")
KINDS = ("together", "gains", "biases")
PAIRS = tuple(f"{one}, {other}" for one, other in combinations(MEASURED, 2))
Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class Scope:
    """What is reported.

    Attributes:
        protocol: of the rows.
        sizes: the coordinates of a cell that say how much is measured.
        seeds: planned ones, and others that were run.
        rows: task -> reported rows, in the order of the seeds.
        edges: the sentence that says where the rate of all norms was the smallest or largest tried.
    """

    protocol: Protocol
    sizes: Mapping[str, int]
    seeds: tuple[int, ...]
    rows: Mapping[str, Sequence[Row]]
    edges: str

    @property
    def planned(self) -> int:
        """Return how many seeds are planned."""
        return len(self.seeds)

    def values(self, task: str, value: Value) -> list[float]:
        """Return a value of each row that has one."""
        found = (value(row) for row in self.rows[task])
        return [each for each in found if each is not None]

    def pairs(self, value: Value) -> Pairs:
        """Return task -> seed -> value, of the rows that have one."""
        return {
            task: {row["cell"]["seed"]: each for row in rows if (each := value(row)) is not None}
            for task, rows in self.rows.items()
        }


def _correlation(kind: str, pair: str) -> Value:
    """Return what reads a correlation over entries from a row, in hundredths."""
    return lambda row: _hundredths(row["correlations"][kind][pair])


def _groups_of(kind: str, score: str) -> Value:
    return lambda row: _hundredths(row["group_correlations"][kind][score])


def _difference(first: Value, second: Value) -> Value:
    def value(row: Row) -> float | None:
        one, other = first(row), second(row)
        return None if one is None or other is None else one - other

    return value


def _hundredths(value: float | None) -> float | None:
    return None if value is None else 100 * value


_USEFUL = {score: _correlation("together", f"{score}, contribution") for score in SCORES}
# What was wanted before measuring, and the value that is above 0 where it is so.
WANTED: tuple[tuple[str, Value], ...] = (
    *(
        (f"larger {kind} contribute more", _correlation(kind, "magnitude, contribution"))
        for kind in ("gains", "biases")
    ),
    ("entries of more Fisher information contribute more", _USEFUL["Fisher"]),
    (
        "Fisher information ranks contributions better than magnitude",
        _difference(_USEFUL["Fisher"], _USEFUL["magnitude"]),
    ),
    (
        "movement ranks contributions better than Fisher information",
        _difference(_USEFUL["movement"], _USEFUL["Fisher"]),
    ),
)


def write_report(results: Path, scope: Scope) -> None:
    """Write the page and its two pictures."""
    end = "" if scope.protocol.name == "cpu" else f"_{scope.protocol.name}"
    results.mkdir(parents=True, exist_ok=True)
    parts = [_title(scope), *_held(scope), *_correlations(scope)]
    if any(scope.rows.values()):
        _plot_correlations(scope, results / f"{NAME}{end}.png")
        parts.append(f"![Rank correlations, mean over tasks and seeds]({NAME}{end}.png)")
    parts += _bins_left_out(scope)
    if any(scope.rows.values()):
        _plot_bins(scope, results / f"{NAME}_left_out{end}.png")
        drawn = " and ".join(task for task, rows in scope.rows.items() if rows)
        parts.append(f"![Rise in loss without each bin, on {drawn}]({NAME}_left_out{end}.png)")
        parts.append(ABOUT_DOTS)
    (results / f"{NAME}{end}.md").write_text("\n\n".join([*parts, *_answers(scope)]) + "\n", encoding="utf-8")


def _title(scope: Scope) -> str:
    protocol, sizes = scope.protocol, scope.sizes
    return (
        "# Which entries of the norms matter\n\n"
        f"Protocol `{protocol.name}`: all norms and the head are trained for {protocol.steps} steps of "
        f"{protocol.batch_size} rows; mean ± standard deviation over {scope.planned} seeds. Of each entry (a gain or a "
        "bias) is known:\n\n"
        "- magnitude: |w0| in the pretrained model;\n"
        f"- Fisher: empirical Fisher information over {protocol.mask_samples:,} training rows, at the pretrained body "
        "with the fresh head of the seed, as masks are chosen by;\n"
        "- movement: |w1 - w0| over the training;\n"
        f"- contribution: its share of the loss that all norms save, by integrated gradients from w0 to w1 "
        f"({sizes['points']} points);\n"
        "- leave-out: the loss that is added where its random group is set back to w0, mean over "
        f"{sizes['partitions']} partitions into {sizes['groups']} groups.\n\n"
        f"The last two are on the same {sizes['rows']} rows that were held out of the training rows. Correlations are "
        "Spearman's, in hundredths. What an entry's leave-out says is mostly of the others in its groups, so over "
        "entries its correlations are small by construction; those over groups are not."
    )


def _held(scope: Scope) -> Iterator[str]:
    yield "## What holds"
    yield listed(_line(scope, wanted, value) for wanted, value in WANTED)
    yield ABOUT_VERDICTS


def _line(scope: Scope, wanted: str, value: Value) -> str:
    said = f"{wanted}: rank correlation, or difference of two, above 0 on average over {', '.join(scope.rows)}"
    return over_seeds(said, scope.pairs(value), scope.planned, note=scope.edges).line


def _correlations(scope: Scope) -> Iterator[str]:
    header = [f"{task}, {kind}" for task in scope.rows for kind in KINDS]
    yield "## Over entries"
    yield of_what_ran(("rank correlation of", *header), [[pair, *_cells(scope, _correlation, pair)] for pair in PAIRS])
    yield "## Over random groups"
    yield "Of the sum of a score over a group's entries with the loss that leaving the group out adds:"
    lines = [[score, *_cells(scope, _groups_of, score)] for score in (*SCORES, "contribution")]
    yield of_what_ran(("rank correlation of", *header), lines)
    yield "`-` stands where all entries are equal. With gains or biases alone, the rest of each group is noise."


def _cells(scope: Scope, read: Callable[[str, str], Value], name: str) -> Iterator[str | None]:
    for task, rows in scope.rows.items():
        for kind in KINDS:
            values = scope.values(task, read(kind, name))
            yield mean_and_spread(values, scope.planned) if values or not rows else "-"


def _bins_left_out(scope: Scope) -> Iterator[str]:
    bins = scope.sizes["bins"]
    yield "## Without the entries of the highest or lowest scores"
    ends = (("highest", bins - 1), ("lowest", 0))
    header = [f"{task}, {said}" for task in scope.rows for said, _ in ends]
    lines = [
        [kind, score, *(_rise(scope, task, kind, score, b) for task in scope.rows for _, b in ends)]
        for kind in ("gains", "biases")
        for score in (*SCORES, "random")
    ]
    yield of_what_ran(("entries", "by", *header), lines)
    yield (
        f"The loss that is added, and in brackets the points of accuracy lost, where one of {bins} equal bins of all "
        "gains, or of all biases, is set back to its start. `random` has no order: its bins show what chance does."
    )


def _rise(scope: Scope, task: str, kind: str, score: str, number: int) -> str | None:
    loss = scope.values(task, lambda row: row["bins"][kind][score][number][0])
    points = scope.values(task, lambda row: 100 * row["bins"][kind][score][number][1])
    said = mean_and_spread(loss, scope.planned, digits=3)
    return said and f"{said} ({mean_and_spread(points, len(points))})"


def _answers(scope: Scope) -> Iterator[str]:
    yield "## What there was to save"
    lines: list[list[object]] = []
    for task in scope.rows:
        line: list[object] = [task]
        for when in ("tuned", "reset"):
            line.append(mean_and_spread(scope.values(task, _answer(when, "loss")), scope.planned, digits=3))
            accuracy = [100 * value for value in scope.values(task, _answer(when, "accuracy"))]
            line.append(mean_and_spread(accuracy, scope.planned))
        contributed = scope.values(task, lambda row: row["contributed"])
        lines.append([*line, mean_and_spread(contributed, scope.planned, digits=3)])
    header = ("loss", "accuracy, %", "loss, norms set back", "accuracy, %, norms set back")
    yield of_what_ran(("task", *header, "sum of contributions"), lines)
    yield (
        "The sum of contributions is the difference of the two losses, but for the error of the integral. The head is "
        "the trained one throughout, so norms set back do worse here than a head trained on a frozen body."
    )


def _answer(when: str, name: str) -> Value:
    return lambda row: row["answers"][when][name]


def _plot_correlations(scope: Scope, path: Path) -> None:
    panels = {kind: [[_mean(scope, kind, one, other) for other in MEASURED] for one in MEASURED] for kind in KINDS}
    tasks = " and ".join(task for task, rows in scope.rows.items() if rows)
    plot_matrices(path, panels, MEASURED, f"Spearman's correlation over entries, mean of {tasks}")


def _mean(scope: Scope, kind: str, one: str, other: str) -> float | None:
    if one == other:
        return 100.0
    pair = ", ".join(sorted((one, other), key=MEASURED.index))
    values = [value for task in scope.rows for value in scope.values(task, _correlation(kind, pair))]
    return statistics.mean(values) if values else None


def _plot_bins(scope: Scope, path: Path) -> None:
    bins = scope.sizes["bins"]
    panels = []
    for task, rows in scope.rows.items():
        for kind in ("gains", "biases") if rows else ():
            groups = {
                _bin_said(b, bins): [
                    Dot(score, METHODS[score], [row["bins"][kind][score][b][0] for row in rows]) for score in METHODS
                ]
                for b in range(bins)
            }
            panels.append(Panel(f"{task}, {kind}", "loss that is added", groups))
    plot_dots(path, panels, f"Each of {bins} bins of entries set back to its start")


def _bin_said(number: int, bins: int) -> str:
    """Return which entries a bin has, from the lowest scores to the highest."""
    return f"{100 * number / bins:g} to {100 * (number + 1) / bins:g} % by"


# Whose colours they have: a score chooses the entries that the mask of its name keeps.
METHODS = {"magnitude": "magnitude", "Fisher": "fisher", "movement": "change", "random": "random"}
ARM, DTYPE = "ln", "float32"
PHASE = "entries"
MODELS = {"full": "bert-base-uncased"}  # None elsewhere: MiniLM, or the protocol's own
TASKS = ("sst2", "trec")
# Part of a cell: rows held out of the training rows, partitions and their groups, bins of a score, points of the path.
SIZES = {"rows": 192, "partitions": 4, "groups": 10, "bins": 4, "points": 6}
BATCH = 32


def entry_cells(protocol: Protocol, task: str, seeds: Sequence[int]) -> list[Cell]:
    """Return the runs that are reported."""
    place = {"protocol": protocol.name, "phase": PHASE, "task": task, "arm": ARM, "dtype": DTYPE, **SIZES}
    return [{**place, "seed": seed} for seed in seeds]


def needed_rates(cell: Cell) -> set[Kind]:
    """Return the rate of all norms, at which they are trained."""
    return {classification.kind(cell)} if cell["phase"] == PHASE else classification.needed_rates(cell)


def waves(options: argparse.Namespace, protocol: Protocol) -> list[list[Cell]]:
    """Return the search for the rate of all norms, and the reported cells, seed by seed."""
    found = [cell for task in options.tasks for cell in entry_cells(protocol, task, options.seeds)]
    searches = [cell for task in options.tasks for cell in search_cells(protocol, task, ARM, DTYPE)]
    return [searches, sorted(found, key=lambda cell: cell["seed"])]


def run_cell(cell: Cell, protocol: Protocol, place: Place, rates: dict[Kind, float]) -> Row:
    """Train all norms on the rows that are not held out, and compare what is known of each entry."""
    if cell["phase"] == "search":
        return classification.run_cell(cell, protocol, place, rates)
    device = torch.device(place.device)
    task = load_task(cell["task"], place.data_dir, place.model).held_out()
    base = load_base(cell, protocol, place, task).to(device)
    model = by_name(load_base(cell, protocol, place, task), cell, task).to(device)
    rate = rates[classification.kind(cell)]
    data = batches(task.train, protocol.batch_size, protocol.steps, cell["seed"], device)
    trained = train(model, data, Schedule(protocol.steps, rate))
    begin = time.perf_counter()
    found = compare(base, effective_parameters(model), task, cell, protocol, device)
    seconds = {"train_time": trained["train_time"], "compare_time": round(time.perf_counter() - begin, 2)}
    return {"learning_rate": rate, "steps": protocol.steps, **found, **seconds, **stamp(device)}


@dataclass(frozen=True)
class Entries:
    """The entries of all norms before and after training, n of them, and the model that runs with any mix of both.

    Attributes:
        model: the pretrained body with the fresh head.
        start: norms before training, by parameter name.
        end: norms after it.
        rest: everything else after training, of which the head has moved.
        held_out: batches of rows that nothing was trained on.
    """

    model: Any
    start: Named
    end: Named
    rest: Named
    held_out: Sequence[Batch]

    def left_out(self, group: Tensor) -> Answers:
        """Return loss and accuracy with a group of entries, bool (n,), set back to its start."""
        chosen = group.to(next(iter(self.end.values())).device)
        return answers(self.model, {**self.rest, **without(self.start, self.end, chosen)}, self.held_out)

    def kinds(self) -> dict[str, Tensor]:
        """Return which entries are gains, which are biases, and all of them: bool (n,)."""
        biases = flat({name: torch.full(value.shape, name.endswith("bias")) for name, value in self.end.items()})
        return {"together": torch.ones_like(biases), "gains": ~biases, "biases": biases}


def compare(base: Any, end: Named, task: Task, cell: Cell, protocol: Protocol, device: torch.device) -> Row:
    """Return how scores and usefulness of the entries of all norms go together.

    Args:
        base: the pretrained body with the fresh head.
        end: all parameters after training, by the names of `base`.
        task: whose validation split has been held out of the training rows.
        cell: its sizes and its seed.
        protocol: says how many rows the Fisher information is of.
        device: of all tensors.

    Returns:
        `answers`: loss and accuracy with all that was trained, and with every norm set back. `contributed`: the sum of
        the contributions. `entries`: kind -> how many there are. `correlations`: kind -> "one, other" -> Spearman's
        correlation over entries. `group_correlations`: kind -> score -> that of its sum over a random group with the
        loss that leaving the group out adds. `bins`: kind -> score -> for each bin, the loss that leaving it out adds
        and the accuracy that it costs.
    """
    information = fisher_information(base, task, protocol, cell["seed"], device)
    names, own = list(information), dict(base.named_parameters())
    start, trained = ({name: given[name].detach() for name in names} for given in (own, end))
    rest = {name: value.detach() for name, value in end.items() if name not in trained}
    size = min(cell["rows"], len(task.validation))
    held_out = list(ordered_batches(task.validation.take(list(range(size))), BATCH, device))
    entries = Entries(base, start, trained, rest, held_out)
    scores = {"magnitude": magnitude_scores(base), "Fisher": information, "movement": change_scores(start, trained)}
    vectors = {said: flat({name: score[name] for name in names}).cpu() for said, score in scores.items()}
    kinds, drawn = entries.kinds(), torch.Generator().manual_seed(cell["seed"])
    everything = kinds["together"]
    tuned, reset = entries.left_out(~everything), entries.left_out(everything)
    binned = {**vectors, "random": torch.rand(len(everything), generator=drawn)}
    partitions = [partition(len(everything), cell["groups"], drawn) for _ in range(cell["partitions"])]
    rises = [[entries.left_out(of == g).loss - tuned.loss for g in range(cell["groups"])] for of in partitions]
    vectors["contribution"] = contributions(base, start, trained, rest, held_out, cell["points"]).cpu()
    by_group = {
        said: {name: _over_groups(vector * chosen, partitions, rises) for name, vector in vectors.items()}
        for said, chosen in kinds.items()
    }
    vectors["leave-out"] = usefulness(partitions, rises)
    return {
        "answers": {"tuned": _rounded(tuned), "reset": _rounded(reset)},
        "contributed": round(float(vectors["contribution"].sum()), 5),
        "entries": {said: int(chosen.sum()) for said, chosen in kinds.items()},
        "correlations": {said: _pairs(vectors, chosen) for said, chosen in kinds.items()},
        "group_correlations": by_group,
        "bins": {
            said: {name: _bins(entries, tuned, score, kinds[said], cell["bins"]) for name, score in binned.items()}
            for said in ("gains", "biases")
        },
    }


def _pairs(vectors: Mapping[str, Tensor], chosen: Tensor) -> dict[str, float | None]:
    """Correlate each two vectors (n,) over the chosen entries."""
    pairs = combinations(vectors, 2)
    return {f"{one}, {other}": _digits(spearman(vectors[one][chosen], vectors[other][chosen])) for one, other in pairs}


def _over_groups(vector: Tensor, partitions: Sequence[Tensor], rises: Sequence[Sequence[float]]) -> float | None:
    """Correlate the sum of a vector (n,) over each random group with what leaving the group out does."""
    groups = zip(partitions, rises, strict=True)
    sums = [torch.zeros(len(found)).index_add(0, of, vector) for of, found in groups]
    return _digits(spearman(torch.cat(sums), torch.tensor(rises).flatten()))


def _bins(entries: Entries, tuned: Answers, score: Tensor, chosen: Tensor, bins: int) -> list[list[float]]:
    """Leave out each bin of the chosen entries by their score, the smallest first."""
    number = torch.full(score.shape, -1).masked_scatter(chosen, quantile(score[chosen], bins))
    found = [entries.left_out(number == b) for b in range(bins)]
    return [[round(each.loss - tuned.loss, 5), round(tuned.accuracy - each.accuracy, 5)] for each in found]


def _rounded(found: Answers) -> dict[str, float]:
    return {name: round(value, 5) for name, value in found._asdict().items()}


def _digits(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def shared_rows(results: Path) -> list[Row]:
    """Return the rows of `accuracy.py` that say at which rate all norms are trained."""
    rows = Rows(results / "accuracy.jsonl")
    return [row for row in rows if row["cell"]["phase"] == "search" and row["cell"]["arm"] == ARM]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = experiment_parser("Which entries of the norms matter?")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or TASKS
    unknown = [task for task in options.tasks if task not in TEXT_COLUMNS]
    if unknown:
        parser.error(f"unknown task {unknown[0]!r}; the tasks are {', '.join(TEXT_COLUMNS)}.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    options.model, protocol = choose_model(options.model, MODELS.get(options.protocol), PROTOCOLS[options.protocol])
    rows = Rows(options.results / f"{NAME}.jsonl")
    rows.adopt(shared_rows(options.results))
    failed = 0
    if not options.report:
        failed = run_experiment(NAME, options, protocol, rows, waves(options, protocol), run_cell, needed_rates)
    if not options.list:
        write_report(options.results, scope(options, protocol, rows))
    return failed


def scope(options: argparse.Namespace, protocol: Protocol, rows: Rows) -> Scope:
    """Return what is reported: what the protocol plans, and what else has been asked for or run."""
    run = [row["cell"] for row in rows if row["cell"]["phase"] == PHASE and row["cell"]["protocol"] == protocol.name]
    tasks = tuple(dict.fromkeys((*TASKS, *options.tasks, *(cell["task"] for cell in run))))
    seeds = seeds_of(run)
    found = {task: [row for row in map(rows.get, entry_cells(protocol, task, seeds)) if row] for task in tasks}
    finals = Finals(rows, protocol, seeds)
    edges = edge_note({ARM: [task for task in tasks if found[task] and finals.at_edge(task, ARM, DTYPE)]})
    return Scope(protocol=protocol, sizes=SIZES, seeds=seeds, rows=found, edges=edges)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
