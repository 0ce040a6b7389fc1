"""Masked arms: deltas on every norm, with only the entries of a mask tuned. Masks come from training rows.

Each function below chooses the mask of one arm; everything else (head, batches, steps) is as in the other arms.
Masks of a given number of entries, of norms and of other modules, are in `magnitude`.
"""

import math
import os
import zlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.harness import classification
from benchmarks.harness.arms import Tune, arm, ln
from benchmarks.harness.classification import Kind, Place, Protocol, by_name, load_base
from benchmarks.harness.rows import Cell
from benchmarks.harness.splits import batches
from benchmarks.harness.tasks import Task, load_task
from benchmarks.harness.training import Schedule, train
from peft_lntune import fisher_scores, select
from peft_lntune.selection import change_scores, combine_masks, magnitude_scores, random_scores

Named = dict[str, Tensor]
RATES = (3e-3, 7e-3, 2e-2, 5e-2)
DENSITY = 0.2  # where a kind of mask has its rate searched; its other densities take that rate
SEARCHED_AT = {"density": DENSITY}


@dataclass(frozen=True)
class Source:
    """What a mask is chosen from.

    Attributes:
        cell: coordinates, among them how much is chosen: a `density`, or a `count` of entries.
        task: of which the training rows are used; in a search without those held out.
        protocol: what is equal for all arms.
        place: model, data and device.
        rates: learning rates that were chosen; a mask of changes needs that of all norms.
        folder: where scores are kept while the experiment runs, so that another density need not make them again; None
            makes them each time.
    """

    cell: Cell
    task: Task
    protocol: Protocol
    place: Place
    rates: dict[Kind, float]
    folder: Path | None = None

    def model(self) -> nn.Module:
        """Load the pretrained body with the fresh head that training starts from."""
        return load_base(self.cell, self.protocol, self.place, self.task).to(self.place.device)

    def of(self, task: str) -> "Source":
        """Return the same for another task."""
        loaded = load_task(task, self.place.data_dir, self.place.model)
        return replace(self, cell={**self.cell, "task": task}, task=loaded)


Score = Callable[[Source], Named]
Choose = Callable[[Source], Named]
CHOICES: dict[str, Choose] = {}


def masked_arm(
    name: str,
    rates: tuple[float, ...] = RATES,
    rate_of: str | None = None,
    searched_at: Mapping[str, Any] = SEARCHED_AT,
    tune: Tune = ln,
) -> Callable[[Choose], Choose]:
    """Register a function that chooses masks of what `tune` trains as the arm `name`."""

    def add(choose: Choose) -> Choose:
        arm(name, rates, searched_at=searched_at, rate_of=rate_of)(tune)
        CHOICES[name] = choose
        return choose

    return add


def fisher_information(model: nn.Module, task: Task, protocol: Protocol, seed: int, device: torch.device) -> Named:
    """Return the empirical Fisher information of every norm on as many training rows as a mask is chosen by."""
    samples, size = protocol.mask_samples, protocol.batch_size
    data = batches(task.train, size, math.ceil(samples / size), seed, device)
    return fisher_scores(model, data, num_samples=samples, progress=False)


def _kept(score: Score) -> Score:
    """Make scores once for a task, phase and seed, and read them from the folder afterwards."""

    def read_or_make(source: Source) -> Named:
        cell = source.cell
        if source.folder is None:
            return score(source)
        path = source.folder / f"{score.__name__.strip('_')}-{cell['task']}-{cell['phase']}-{cell['seed']}.safetensors"
        if not path.exists():
            made = {name: values.detach().cpu().contiguous() for name, values in score(source).items()}
            unfinished = path.with_suffix(f".{os.getpid()}")
            save_file(made, unfinished)
            os.replace(unfinished, path)  # another process may be at the same scores; the last one stays
        return load_file(path)

    return read_or_make


@_kept
def _fisher(source: Source) -> Named:
    """Empirical Fisher information, at the pretrained body with the fresh head."""
    return fisher_information(source.model(), source.task, source.protocol, source.cell["seed"], _device(source))


@_kept
def _change(source: Source) -> Named:
    """How far each entry moves when all norms are trained: LT-SFT's rule; the model is as before afterwards."""
    start, cell, protocol = source.model(), source.cell, source.protocol
    steps = protocol.length(cell)
    trained: Any = ln(deepcopy(start))
    data = batches(source.task.train, protocol.batch_size, steps, cell["seed"], _device(source))
    train(trained, data, Schedule(steps, source.rates[_all_norms(cell)]))
    trained.merge_adapter()  # scores look at base parameters
    return change_scores(start, trained)


def random_seed(source: Source) -> int:
    """Return a seed for chance: another one for every task and seed, the same one for every density."""
    return zlib.crc32(f"{source.cell['task']} {source.cell['seed']}".encode())


def _random(source: Source) -> Named:
    return random_scores(source.model(), seed=random_seed(source))


@masked_arm("fisher")
def fisher(source: Source) -> Named:
    """The entries of most Fisher information."""
    return select(_fisher(source), density=source.cell["density"])


@masked_arm("lowest-fisher")
def lowest_fisher(source: Source) -> Named:
    """The entries of least Fisher information."""
    return select(_fisher(source), density=source.cell["density"], largest=False)


@masked_arm("random")
def random(source: Source) -> Named:
    """Any entries."""
    return select(_random(source), density=source.cell["density"])


@masked_arm("magnitude")
def magnitude(source: Source) -> Named:
    """The entries of the largest absolute value in the pretrained model."""
    return select(magnitude_scores(source.model()), density=source.cell["density"])


@masked_arm("change")
def change(source: Source) -> Named:
    """The entries that move most when all are trained; they are then trained again from their start."""
    return select(_change(source), density=source.cell["density"])


@masked_arm("union", rates=(), rate_of="fisher")
def union(source: Source) -> Named:
    """What the Fisher masks of other tasks, `mask_tasks`, have together; nothing of this task."""
    return combine_masks([fisher(source.of(task)) for task in source.cell["mask_tasks"]], how="union")


@masked_arm("random-union", rates=(), rate_of="random")
def random_union(source: Source) -> Named:
    """Any entries, as many as `union` has."""
    count = sum(int(mask.sum()) for mask in union(source).values())
    return select(_random(source), count=count)


def tune(
    model: nn.Module,
    cell: Cell,
    task: Task,
    *,
    protocol: Protocol,
    place: Place,
    rates: dict[Kind, float],
    folder: Path | None = None,
) -> nn.Module:
    """Make a model ready for a cell of any arm, masked or not."""
    if cell["arm"] not in CHOICES:
        return by_name(model, cell, task)
    chosen = CHOICES[cell["arm"]](Source(cell, task, protocol, place, rates, folder))
    masks = {name: mask.cpu() for name, mask in chosen.items()}  # the model is not on the device yet
    tuned: Any = by_name(model, cell, task)
    tuned.set_masks(masks)
    return tuned


def needed_rates(cell: Cell) -> set[Kind]:
    """Return the kinds whose learning rate must be known before a cell can run."""
    return classification.needed_rates(cell) | ({_all_norms(cell)} if cell["arm"] == "change" else set())


def _all_norms(cell: Cell) -> Kind:
    return cell["task"], "ln", cell["dtype"]


def _device(source: Source) -> torch.device:
    return torch.device(source.place.device)
