"""Which entries of the norms matter? Magnitude, Fisher information, movement and usefulness of each, side by side.

python -m benchmarks.papers.norm_entries --data-dir <folder>
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import classification
from benchmarks.harness.classification import (
    PROTOCOLS,
    SEEDS,
    Kind,
    Place,
    Protocol,
    by_name,
    choose_model,
    experiment_parser,
    kind,
    load_base,
    run_experiment,
    search_cells,
)
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
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import stamp
from benchmarks.harness.splits import Batch, batches, ordered_batches
from benchmarks.harness.tasks import TEXT_COLUMNS, Task, load_task
from benchmarks.harness.training import Schedule, train
from benchmarks.papers.norm_entries_report import Scope, write_report
from peft_lntune.selection import change_scores, magnitude_scores
from peft_lntune.selection.effective import effective_parameters

NAME = "norm_entries"
ARM, DTYPE = "ln", "float32"
PHASE = "entries"
MODELS = {"cpu": None, "cpu-600": None, "full": "bert-base-uncased"}
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
    return {kind(cell)} if cell["phase"] == PHASE else classification.needed_rates(cell)


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
    rate = rates[kind(cell)]
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
    options.model, protocol = choose_model(options.model, MODELS[options.protocol], PROTOCOLS[options.protocol])
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
    seeds = tuple(sorted({*SEEDS, *(cell["seed"] for cell in run)}))
    found = {task: [row for row in map(rows.get, entry_cells(protocol, task, seeds)) if row] for task in tasks}
    return Scope(protocol=protocol, sizes=SIZES, seeds=seeds, rows=found)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
