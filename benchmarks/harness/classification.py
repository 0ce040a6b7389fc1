"""One cell of an experiment that trains: an arm, a task, a dtype, a seed; and the search for its learning rate."""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig

from benchmarks.harness.arms import find_arm
from benchmarks.harness.environment import write_environment
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.models import default_model, load_model
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import base_parser, format_seconds, parse_device, run_cells, stamp, start_process
from benchmarks.harness.splits import batches
from benchmarks.harness.tasks import Task, load_task
from benchmarks.harness.training import Schedule, counts, make_optimizer, saved_bytes, train, train_step

Kind = tuple[str, ...]  # task, arm and dtype; and a group of parameters, where the rate is that group's
HEAD = "head"
Tuner = Callable[[nn.Module, Cell, Task], nn.Module]


@dataclass(frozen=True)
class Protocol:
    """What is equal for all arms.

    Attributes:
        name: written into every cell.
        steps: of a reported run.
        search_steps: of a run that only chooses a learning rate.
        batch_size: rows per step.
        dropout: replaces the checkpoint's; None keeps it.
        mask_samples: training rows that a mask is chosen by.
        group_rates: learning rates that are tried for groups of parameters (the head, the parts of an arm that joins
            several), group by group in this order, after one rate for all; empty keeps one rate for all.
        rates: by arm, learning rates that are tried instead of the arm's.
        extensions: how many rates a search may add to its grid, one after the other, while the best is at its edge.
        held_out: training rows that learning rates are scored on, at most; also at most a tenth of them.
        scored: validation rows that are scored, the same for all arms; None: all.
        autocast: whether models run in bf16 autocast.
        own_rates_of: the protocol, equal but for the groups, whose searches for one rate for all count here too.
        midway: arms that are also scored after half of the steps, which shows whether they have flattened.
        model: Hub id of the model that the protocol is of; None leaves the model to the script.
        model_type: of the config of that model.
    """

    name: str
    steps: int
    search_steps: int
    batch_size: int
    dropout: float | None
    mask_samples: int = 1024
    group_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    extensions: int = 0
    held_out: int = 1000
    scored: int | None = None
    autocast: bool = False
    own_rates_of: str | None = None
    midway: tuple[str, ...] = ()
    model: str | None = None
    model_type: str | None = None

    def length(self, cell: Cell) -> int:
        """Return the steps of a cell."""
        return self.search_steps if cell["phase"] == "search" else self.steps

    def groups(self, arm: str) -> list[str]:
        """Return the groups of an arm that have a search of their own, in its order.

        The arm of the head alone has none, and neither has a head whose rate is another arm's.
        """
        chosen = find_arm(arm)
        own = {*chosen.parts, *([] if arm == HEAD or chosen.head_rate_of else [HEAD])}
        return [group for group in self.group_rates if group in own]

    def grid(self, arm: str, group: str | None = None) -> tuple[float, ...]:
        """Return the rates that are tried for an arm, or for one group of its parameters, before any extension."""
        return self.rates.get(arm, find_arm(arm).rates) if group is None else self.group_rates[group]

    @property
    def said(self) -> str:
        """The model, the length of training and what rates are chosen for, in a table."""
        model = (self.model or "MiniLM").rsplit("/", 1)[-1]
        rates = ", a rate per part" if self.group_rates else ""
        return f"{model}, {self.steps:,} steps of {self.batch_size} rows{rates}"

    def stem(self, name: str) -> str:
        """Return how the files of a report are called: by its name, and by any protocol but the CPU's."""
        return name if self.name == "cpu" else f"{name}_{self.name}"


AnyProtocol = TypeVar("AnyProtocol", bound=Protocol)
SEEDS = (0, 1, 2)
GROUP_RATES = {
    "head": (1e-3, 3e-3, 1e-2),
    "prefix": (3e-3, 1e-2, 3e-2),
    "mha-adapter": (1e-3, 3e-3, 1e-2),
    "ffn-adapter": (1e-3, 3e-3, 1e-2),
    "lora": (1e-3, 3e-3, 1e-2),
    "ln": (1e-3, 3e-3, 1e-2),
    "ln.bias": (2e-3, 7e-3, 2e-2),  # where the norms are all that is tuned: apart from the gains
}
# MPNet is four times as deep and wide as MiniLM and diverges at rates that suit MiniLM.
MPNET_NORM_RATES = (3e-4, 1e-3, 3e-3)
MPNET_RATES = {
    "full": (2e-5, 5e-5, 1.5e-4),
    "lora": (3e-4, 1e-3, 3e-3),
    "bitfit": (3e-4, 1e-3, 3e-3),
    **dict.fromkeys(("ln", "ln-weight", "ln-bias", "ln-ffn", "ln-attention"), MPNET_NORM_RATES),
    **dict.fromkeys(("mha-adapter", "mha-adapter+ln", "ffn-adapter", "ffn-adapter+ln", "lora+ln"), MPNET_NORM_RATES),
    **dict.fromkeys(("fisher", "random", "lowest-fisher", "magnitude", "change"), (1e-3, 3e-3, 1e-2)),
}
MPNET_GROUP_RATES = {
    "head": (1e-3, 3e-3, 1e-2),
    "mha-adapter": (3e-4, 1e-3, 3e-3),
    "ffn-adapter": (3e-4, 1e-3, 3e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "ln": MPNET_NORM_RATES,
}
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("cpu", steps=300, search_steps=200, batch_size=16, dropout=0.0),
        Protocol("cpu-600", steps=600, search_steps=400, batch_size=32, dropout=0.0),
        Protocol(
            "cpu-groups",
            steps=300,
            search_steps=200,
            batch_size=16,
            dropout=0.0,
            group_rates=GROUP_RATES,
            extensions=3,
            own_rates_of="cpu",
        ),
        Protocol(
            "mpnet",
            steps=80,
            search_steps=40,
            batch_size=16,
            dropout=0.0,
            group_rates=MPNET_GROUP_RATES,
            rates=MPNET_RATES,
            extensions=3,
            held_out=300,
            midway=("full",),
            model="sentence-transformers/all-mpnet-base-v2",
            model_type="mpnet",
        ),
        Protocol("full", steps=3000, search_steps=3000, batch_size=32, dropout=None),
    )
}


@dataclass(frozen=True)
class Place:
    """Where things are; nothing of it is written into a row."""

    model: str
    data_dir: Path | None
    device: str


def choose_model(asked: str | None, usual: str | None, protocol: AnyProtocol) -> tuple[str, AnyProtocol]:
    """Return the model and the protocol, whose name tells any model but MiniLM, since rows are found by it.

    Args:
        asked: on the command line.
        usual: where nothing was asked for; None is MiniLM.
        protocol: as it is for MiniLM, or of a model of its own, which keeps its name.

    Raises:
        ValueError: the protocol is of a model, and a model of another type was asked for.
    """
    if protocol.model is not None:
        if asked is not None and (found := AutoConfig.from_pretrained(asked).model_type) != protocol.model_type:
            raise ValueError(
                f"The protocol {protocol.name} is of {protocol.model}, but --model is a folder or Hub id of a model of "
                f"type {found!r}. Give a copy of {protocol.model}, or another --protocol."
            )
        return asked or protocol.model, protocol
    model = asked or usual
    if model is None:
        return default_model(), protocol
    end = f"-{Path(model).name}"
    own_rates_of = protocol.own_rates_of and f"{protocol.own_rates_of}{end}"
    return model, replace(protocol, name=f"{protocol.name}{end}", own_rates_of=own_rates_of, model=model)


def kind(cell: Cell) -> Kind:
    """Return what a learning rate is chosen for."""
    return cell["task"], find_arm(cell["arm"]).rate_of or cell["arm"], cell["dtype"]


def head_kind(cell: Cell) -> Kind | None:
    """Return what the rate of the head is chosen for, where the head has one of its own."""
    arm = find_arm(cell["arm"]).head_rate_of
    return None if arm is None else (cell["task"], arm, cell["dtype"])


def search_cells(protocol: Protocol, task: str, arm: str, dtype: str, group: str | None = None) -> list[Cell]:
    """Return the runs that choose an arm's learning rate, or that of one group of its parameters, on one seed."""
    place = {"protocol": protocol.name, "phase": "search", "task": task, "arm": arm, "dtype": dtype, "seed": 0}
    place |= find_arm(arm).searched_at
    return [_at_rate(place, group, rate) for rate in protocol.grid(arm, group)]


def _at_rate(place: Cell, group: str | None, rate: float) -> Cell:
    return {**place, **({} if group is None else {"group": group}), "learning_rate": rate}


def grown_cells(rows: Rows, protocol: Protocol, kind: Kind) -> list[Cell]:
    """Return the runs that choose a learning rate, with those that extend the grid as far as rows say so.

    While the best rate is the smallest or the largest, the next rate beyond it is tried too, at most
    `protocol.extensions` times. A last cell without a row is the one to run next.
    """
    task, arm, dtype, *groups = kind
    group = groups[0] if groups else None
    cells = search_cells(protocol, task, arm, dtype, group)
    for _ in range(protocol.extensions):
        best = _best_of([row for cell in cells if (row := rows.get(cell)) is not None], task)
        tried = [cell["learning_rate"] for cell in cells]
        if best is None or min(tried) < best < max(tried) or any(cell not in rows for cell in cells):
            break
        cells.append({**cells[0], "learning_rate": next_rate(best, up=best == max(tried))})
    return cells


def next_rate(rate: float, up: bool) -> float:
    """Return the next of 1 and 3 times a power of ten, at least 1.4 times above or below a rate.

    Example:
        >>> next_rate(3e-3, up=True), next_rate(1e-3, up=True), next_rate(2e-5, up=False), next_rate(1.5e-4, up=True)
        (0.01, 0.003, 1e-05, 0.0003)
    """
    place = math.floor(2 * math.log10(rate))
    ladder = [float(f"{10 ** (each / 2):.1g}") for each in range(place - 3, place + 5)]
    if up:
        return min(each for each in ladder if each > 1.4 * rate)
    return max(each for each in ladder if each < rate / 1.4)


def shared_searches(rows: Rows, protocol: Protocol) -> list[Row]:
    """Return the searches of an equal protocol without groups, as those of this protocol: one rate for all."""
    searches = [row for row in rows if row["cell"]["phase"] == "search" and "group" not in row["cell"]]
    own = [row for row in searches if row["cell"]["protocol"] == protocol.own_rates_of]
    return [{**row, "cell": {**row["cell"], "protocol": protocol.name}} for row in own]


def with_groups(protocol: Protocol, kind: Kind) -> list[Kind]:
    """Return the kind of an arm's own rate and those of its groups; each is searched at the rates before it."""
    return [kind, *((*kind, group) for group in protocol.groups(kind[1]))] if len(kind) == 3 else [kind]


def rates_of(row: Row) -> dict[str, float]:
    """Return the learning rates of a row by group; that of all other parameters has an empty name.

    Example:
        >>> rates_of({"learning_rate": 0.1, "head_learning_rate": 0.2, "part_learning_rates": {"prefix": 0.3}})
        {'': 0.1, 'head': 0.2, 'prefix': 0.3}
    """
    head = {HEAD: row["head_learning_rate"]} if "head_learning_rate" in row else {}
    return {"": row["learning_rate"], **head, **row.get("part_learning_rates", {})}


def final_cells(protocol: Protocol, task: str, arm: str, dtype: str, seeds: Iterable[int], **at: Any) -> list[Cell]:
    """Return the runs that are reported; `at` are the further coordinates of an arm that has some."""
    place = {"protocol": protocol.name, "phase": "final", "task": task, "arm": arm, "dtype": dtype, **at}
    return [{**place, "seed": seed} for seed in seeds]


def best_rates(rows: Rows, protocol: Protocol, kinds: Iterable[Kind]) -> dict[Kind, float]:
    """Return the learning rate that did best on held-out training rows, where the search is complete.

    Equal scores go to the smaller rate.

    Raises:
        ValueError: a group was searched at other rates of the rest than those that are chosen now.
    """
    found: dict[Kind, float] = {}
    for kind in kinds:
        rate = _best_rate(rows, protocol, kind)
        if rate is not None:
            found[kind] = rate
    return found


def _best_rate(rows: Rows, protocol: Protocol, kind: Kind) -> float | None:
    task, arm, _, *groups = kind
    searched = [rows.get(cell) for cell in grown_cells(rows, protocol, kind)]
    known = [row for row in searched if row is not None]
    if not known or len(known) < len(searched):
        return None
    for group in groups:
        before = with_groups(protocol, kind[:3])[: protocol.groups(arm).index(group) + 1]
        wanted = {name: _best_rate(rows, protocol, each) for each in before for name in each[3:] or ("",)}
        for row in known:
            others = {name: rate for name, rate in rates_of(row).items() if name != group}
            if others != wanted:
                raise ValueError(
                    f"The rate of {group} of the arm {arm} on {task} was searched at {others}, and the other searches "
                    f"choose {wanted} now. Remove these lines from {rows.path.name} to search again."
                )
    return _best_of(known, task)


def _best_of(known: Sequence[Row], task: str) -> float | None:
    """Return the rate of the best row; of equal scores, the smaller rate."""
    if not known:
        return None
    metric = metric_of(task)
    best = max(known, key=lambda row: (metric.held_out(row["metrics"]), -row["cell"]["learning_rate"]))
    return float(best["cell"]["learning_rate"])


def needed_rates(cell: Cell) -> set[Kind]:
    """Return the arms whose learning rates must be known before a cell can run."""
    own = {kind(cell)} if cell["phase"] == "final" or "group" in cell else set()
    head = head_kind(cell)
    return own if head is None else own | {head}


def all_needed(protocol: Protocol, cell: Cell, needs: Callable[[Cell], set[Kind]] = needed_rates) -> list[Kind]:
    """Return every rate that a cell needs: those of the arms it names, with their groups as far as it goes.

    A search for one group needs the groups before it; other searches need no groups.
    """
    every = [each for found in sorted(needs(cell)) for each in with_groups(protocol, found)]
    if cell["phase"] != "search":
        return every
    own = kind(cell)
    groups = protocol.groups(own[1])
    before = groups[: groups.index(cell["group"])] if "group" in cell else []
    return [each for each in every if each[:3] != own or len(each) == 3 or each[3] in before]


def search_first(
    protocol: Protocol, stages: Iterable[Sequence[Cell]], needs: Callable[[Cell], set[Kind]] = needed_rates
) -> list[list[Cell]]:
    """Return waves: each stage of reported cells, seed by seed, behind the searches for what nothing before it needs.

    Args:
        protocol: of the cells.
        stages: reported cells, most informative first.
        needs: which learning rates a cell needs; a search may need one as well, which is then searched before it.
    """
    searched: set[Kind] = set()
    waves: list[list[Cell]] = []
    for finals in stages:
        left = [each for each in _kinds(protocol, finals, needs) if each not in searched]
        while left:
            first = {each: _kinds(protocol, search_cells(protocol, *each), needs) for each in left}
            ready = [each for each, before in first.items() if searched.issuperset(before)]
            searched |= {*ready}
            waves.append([cell for each in ready for cell in search_cells(protocol, *each)])
            every = (kind for each, before in first.items() for kind in (*before, each))
            left = [each for each in dict.fromkeys(every) if each not in searched]
        waves.append(sorted(finals, key=lambda cell: cell["seed"]))
    return [wave for wave in waves if wave]


def _kinds(protocol: Protocol, cells: Iterable[Cell], needs: Callable[[Cell], set[Kind]]) -> list[Kind]:
    return list(dict.fromkeys(kind for cell in cells for kind in all_needed(protocol, cell, needs)))


def experiment_parser(description: str, protocols: Sequence[str] = tuple(PROTOCOLS)) -> argparse.ArgumentParser:
    """Return the options that every experiment that trains has; `protocols` are names to choose from."""
    parser = base_parser(description, protocols)
    parser.add_argument("--data-dir", type=Path, help="folder of <task>/{train,validation}.jsonl (default: the Hub)")
    parser.add_argument("--model", default=None, help="folder or Hub id (default: see the README)")
    parser.add_argument("--tasks", nargs="+", default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    return parser


def refuse_unknown(parser: argparse.ArgumentParser, tasks: Iterable[str], known: Iterable[str]) -> None:
    """End the program with a message where a task is not known."""
    unknown = [task for task in tasks if task not in known]
    if unknown:
        parser.error(f"unknown task {unknown[0]!r}; the tasks are {', '.join(known)}.")


def run_experiment(
    name: str,
    options: argparse.Namespace,
    protocol: Protocol,
    rows: Rows,
    waves: Sequence[Sequence[Cell]],
    run: Callable[..., Row] | None = None,
    needs: Callable[[Cell], set[Kind]] = needed_rates,
) -> int:
    """Run what has no row yet, wave by wave, or list it.

    Args:
        name: of the experiment, in `environment.json`.
        options: the command line, see `experiment_parser`.
        protocol: what is equal for all arms.
        rows: where the rows go.
        waves: cells most informative first; a wave may need the learning rates that the waves before it have chosen.
        run: takes a cell, and `protocol`, `place` and `rates` by name; `run_cell` where None.
        needs: which learning rates a cell needs; one whose rates are not known is left for the next time.

    Returns:
        How many runs failed.
    """
    device = parse_device(options)
    place = Place(options.model, options.data_dir, options.device)
    start_process(threads=1 if options.jobs > 1 else torch.get_num_threads())
    if options.list:
        left = [cell for wave in waves for cell in wave if cell not in rows]
        seconds = estimate(left, protocol, place) / options.jobs
        print(f"{len(left)} runs left; about {format_seconds(seconds)} with {options.jobs} processes side by side.")
        return 0
    write_environment(options.results / "environment.json", name, device, options.jobs)
    failed = 0
    for wave in waves:
        rates = best_rates(rows, protocol, _kinds(protocol, wave, needs))
        ready = [cell for cell in wave if {*all_needed(protocol, cell, needs)} <= rates.keys()]
        one = partial(run or run_cell, protocol=protocol, place=place, rates=rates)
        title = f"{wave[0]['dtype']} {wave[0]['phase']}"
        failed += run_cells(ready, rows, one, options.jobs, title)
        while further := _extensions(rows, protocol, ready):
            missed = run_cells(further, rows, one, options.jobs, f"{title}, further rates")
            failed += missed
            if missed:
                break
    return failed


def _extensions(rows: Rows, protocol: Protocol, wave: Sequence[Cell]) -> list[Cell]:
    """Return the runs that the searches of a wave need beyond their grids and that have no row yet."""
    searches = [cell for cell in wave if cell["phase"] == "search" and protocol.extensions]
    kinds = dict.fromkeys((*kind(cell), *([cell["group"]] if "group" in cell else [])) for cell in searches)
    last = (grown_cells(rows, protocol, each)[-1] for each in kinds)
    return [cell for cell in last if cell not in rows]


def by_name(model: nn.Module, cell: Cell, task: Task) -> nn.Module:
    """Apply the arm that a cell names: all there is to do where an arm needs no data."""
    chosen = find_arm(cell["arm"])
    return chosen.tune(model, **{name: cell[name] for name in chosen.takes})


def run_cell(
    cell: Cell,
    protocol: Protocol,
    place: Place,
    rates: dict[Kind, float],
    tune: Tuner = by_name,
    inspect: Callable[[nn.Module], Row] | None = None,
) -> Row:
    """Train one arm once and measure it.

    Args:
        cell: coordinates; a searching cell brings its learning rate.
        protocol: what is equal for all arms.
        place: model, data and device.
        rates: learning rates of the reported cells.
        tune: makes the base model with a fresh head ready to train; it may look at the training rows.
        inspect: what else the row says of the trained model.
    """
    device, search = torch.device(place.device), cell["phase"] == "search"
    task = load_task(cell["task"], place.data_dir, place.model)
    task = task.held_out(protocol.held_out) if search else task.first(protocol.scored)
    own, head, group = kind(cell), head_kind(cell), cell.get("group")
    rate = cell["learning_rate"] if search and group is None else rates[own]
    chosen = [each for each in all_needed(protocol, cell) if len(each) > 3 and each[:3] == own]
    part_rates = {each[3]: rates[each] for each in chosen} | ({} if group is None else {group: cell["learning_rate"]})
    head_rate = part_rates.pop(HEAD, None) if head is None else rates[head]
    model = tune(load_base(cell, protocol, place, task), cell, task).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = protocol.length(cell)
    data = batches(task.train, protocol.batch_size, steps, cell["seed"], device)
    halfway: dict[str, float] = {}
    midway = (
        partial(_score_into, halfway, task, model, device) if cell["arm"] in protocol.midway and not search else None
    )
    trained = train(model, data, Schedule(steps, rate, head_rate=head_rate, part_rates=part_rates), midway)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    scores = task.score(model, device)
    metrics: dict[str, Any] = {f"held_out_{k}" if search else k: round(value, 5) for k, value in scores.items()}
    metrics |= {name: trained.pop(name) for name in ("train_loss", "moved")}
    return {
        "learning_rate": rate,
        **({} if head_rate is None else {"head_learning_rate": head_rate}),
        **({"part_learning_rates": part_rates} if part_rates else {}),
        "steps": steps,
        "batch_size": protocol.batch_size,
        "metrics": metrics,
        **({"metrics_midway": halfway} if halfway else {}),
        **trained,
        "file_size": saved_bytes(model),
        "accelerator_memory_max": memory,
        **counts(model),
        **(inspect(model) if inspect else {}),
        **stamp(device),
    }


def _score_into(found: dict[str, float], task: Task, model: nn.Module, device: torch.device) -> None:
    found |= {name: round(value, 5) for name, value in task.score(model, device).items()}


def step_seconds(cell: Cell, protocol: Protocol, place: Place) -> float:
    """Return the time of one training step, after one that warms up."""
    task = load_task(cell["task"], place.data_dir, place.model)
    model = by_name(load_base(cell, protocol, place, task), cell, task).to(place.device).train()
    optimizer = make_optimizer(model, 1e-5)
    seconds = 0.0
    for batch in batches(task.train, protocol.batch_size, 2, 0, torch.device(place.device)):
        begin = time.perf_counter()
        train_step(model, batch, optimizer)
        seconds = time.perf_counter() - begin
    return seconds


def estimate(cells: Iterable[Cell], protocol: Protocol, place: Place) -> float:
    """Return the seconds that cells will train one after the other, from one timed step of each arm and dtype."""
    times: dict[tuple[str, str], float] = {}
    seconds = 0.0
    for cell in cells:
        if "arm" not in cell:
            continue  # the model as it is: only scored
        key = cell["arm"], cell["dtype"]
        if key not in times:
            times[key] = step_seconds(cell, protocol, place)
        seconds += times[key] * protocol.length(cell)
    return seconds


def load_base(cell: Cell, protocol: Protocol, place: Place, task: Task) -> nn.Module:
    """Load the base model of a cell with the fresh head of its seed."""
    model = load_model(place.model, task.head, cell["dtype"], cell["seed"], protocol.dropout)
    if protocol.autocast:
        model.forward = torch.autocast(torch.device(place.device).type, torch.bfloat16)(model.forward)
    return model
