"""One cell of a classification experiment: an arm, a task, a dtype, a seed; and the search for its learning rate."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.arms import find_arm
from benchmarks.harness.models import load_classifier
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import stamp
from benchmarks.harness.tasks import batches, load_task
from benchmarks.harness.training import Schedule, accuracy, counts, make_optimizer, saved_bytes, train, train_step

Kind = tuple[str, str, str]


@dataclass(frozen=True)
class Protocol:
    """What is equal for all arms.

    Attributes:
        name: written into every cell.
        steps: of a reported run.
        search_steps: of a run that only chooses a learning rate.
        batch_size: rows a step.
        dropout: replaces the checkpoint's; None keeps it.
    """

    name: str
    steps: int
    search_steps: int
    batch_size: int
    dropout: float | None

    def length(self, cell: Cell) -> int:
        """Return the steps of a cell."""
        return self.search_steps if cell["phase"] == "search" else self.steps


@dataclass(frozen=True)
class Place:
    """Where things are; nothing of it is written into a row."""

    model: str
    data_dir: Path | None
    device: str


def kind(cell: Cell) -> Kind:
    """Return what a learning rate is chosen for."""
    return cell["task"], cell["arm"], cell["dtype"]


def search_cells(protocol: Protocol, task: str, arm: str, dtype: str) -> list[Cell]:
    """Return the runs that choose an arm's learning rate, on one seed."""
    place = {"protocol": protocol.name, "phase": "search", "task": task, "arm": arm, "dtype": dtype, "seed": 0}
    return [{**place, "learning_rate": rate} for rate in find_arm(arm).rates]


def final_cells(protocol: Protocol, task: str, arm: str, dtype: str, seeds: Iterable[int]) -> list[Cell]:
    """Return the runs that are reported."""
    place = {"protocol": protocol.name, "phase": "final", "task": task, "arm": arm, "dtype": dtype}
    return [{**place, "seed": seed} for seed in seeds]


def best_rates(rows: Rows, protocol: Protocol, kinds: Iterable[Kind]) -> dict[Kind, float]:
    """Return the learning rate that did best on held-out training rows, where the search is complete.

    Equal scores go to the smaller rate.
    """
    found = {}
    for task, arm, dtype in kinds:
        searched = [rows.get(cell) for cell in search_cells(protocol, task, arm, dtype)]
        known = [row for row in searched if row is not None]
        if known and len(known) == len(searched):
            best = max(known, key=lambda row: (row["metrics"]["held_out_accuracy"], -row["learning_rate"]))
            found[task, arm, dtype] = float(best["learning_rate"])
    return found


def run_cell(cell: Cell, protocol: Protocol, place: Place, rates: dict[Kind, float]) -> Row:
    """Train one arm once and measure it.

    Args:
        cell: coordinates; a searching cell brings its learning rate.
        protocol: what is equal for all arms.
        place: model, data and device.
        rates: learning rates of the reported cells.
    """
    device, search = torch.device(place.device), cell["phase"] == "search"
    task = load_task(cell["task"], place.data_dir, place.model)
    if search:
        task = task.held_out()
    rate = cell["learning_rate"] if search else rates[kind(cell)]
    model = _tuned(cell, protocol, place, task.num_labels)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = protocol.length(cell)
    data = batches(task.train, protocol.batch_size, steps, cell["seed"], device)
    trained = train(model, data, Schedule(steps, rate))
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    score = round(accuracy(model, task.validation, device), 5)
    metrics: dict[str, Any] = {"held_out_accuracy" if search else "accuracy": score}
    metrics |= {name: trained.pop(name) for name in ("train_loss", "moved")}
    return {
        "learning_rate": rate,
        "steps": steps,
        "batch_size": protocol.batch_size,
        "metrics": metrics,
        **trained,
        "file_size": saved_bytes(model),
        "accelerator_memory_max": memory,
        **counts(model),
        **stamp(device),
    }


def step_seconds(cell: Cell, protocol: Protocol, place: Place) -> float:
    """Return the time of one training step, after one that warms up."""
    task = load_task(cell["task"], place.data_dir, place.model)
    model = _tuned(cell, protocol, place, task.num_labels).train()
    optimizer = make_optimizer(model, 1e-5)
    seconds = 0.0
    for batch in batches(task.train, protocol.batch_size, 2, 0, torch.device(place.device)):
        begin = time.perf_counter()
        train_step(model, batch, optimizer)
        seconds = time.perf_counter() - begin
    return seconds


def estimate(cells: Iterable[Cell], protocol: Protocol, place: Place) -> float:
    """Return the seconds that cells will take one after the other, from one timed step of each arm and dtype."""
    times: dict[tuple[str, str], float] = {}
    seconds = 0.0
    for cell in cells:
        key = cell["arm"], cell["dtype"]
        if key not in times:
            times[key] = step_seconds(cell, protocol, place)
        seconds += times[key] * protocol.length(cell)
    return seconds


def _tuned(cell: Cell, protocol: Protocol, place: Place, num_labels: int) -> nn.Module:
    """Load the base model of a cell and apply its arm."""
    base = load_classifier(place.model, num_labels, cell["dtype"], cell["seed"], protocol.dropout)
    return find_arm(cell["arm"]).tune(base).to(place.device)
