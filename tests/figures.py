"""The figures of the documentation, computed from `benchmarks/results`: the functions `docs/figures.toml` calls."""

import json
import re
import statistics
import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.costs import recover as repair
from benchmarks.harness.arms import find_arm
from benchmarks.harness.classification import PROTOCOLS, SEEDS
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.rows import Row, cell_key
from benchmarks.harness.tables import mean_and_spread

RESULTS = Path(__file__).parent.parent / "benchmarks/results"
TASKS = ("sst2", "trec")  # the tasks that every paper's script runs, and averages


class Seeds(dict[int, float]):
    """Figures by seed. A difference is taken within a seed, as on the result pages; `{x}` prints mean ± spread."""

    def __sub__(self, other: "Seeds") -> "Seeds":
        return Seeds({seed: value - other[seed] for seed, value in self.items() if seed in other})

    def __neg__(self) -> "Seeds":
        return Seeds({seed: -value for seed, value in self.items()})

    @property
    def mean(self) -> float:
        return statistics.mean(self.values())

    @property
    def spread(self) -> float:
        return statistics.stdev(self.values())

    def __format__(self, spec: str) -> str:
        if spec not in ("", "+"):
            return format(self.mean, spec)
        text = mean_and_spread(list(self.values()), planned=len(self))
        return f"+{text}" if spec == "+" and self.mean >= 0 else str(text)


@cache
def read(file: str) -> list[Row]:
    """The rows of one file of results."""
    lines = (RESULTS / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


@cache
def _runs() -> dict[str, dict[int, Row]]:
    """The reported runs of every paper's script, by their coordinates without the seed; equal cells are run once."""
    found: dict[str, dict[int, Row]] = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for row in read(path.stem):
            cell = dict(row["cell"])
            if cell.get("phase") == "final":
                found.setdefault(cell_key({k: v for k, v in cell.items() if k != "seed"}), {}).setdefault(
                    cell["seed"], row
                )
    return found


def runs(
    arm: str, task: str, protocol: str = "cpu", dtype: str = "float32", seeds: int = len(SEEDS), **at: Any
) -> dict[int, Row]:
    """Seed -> the reported row of an arm on a task, for the first seeds: by default those that every arm is to have."""
    cell = {"protocol": protocol, "phase": "final", "task": task, "arm": arm, "dtype": dtype, **at}
    return {seed: row for seed, row in _runs()[cell_key(cell)].items() if seed < seeds}


def score(arm: str, task: str, **at: Any) -> Seeds:
    """An arm's score on a task, by its metric: accuracy in per cent, perplexity."""
    return Seeds({seed: metric_of(task).shown(row["metrics"]) for seed, row in runs(arm, task, **at).items()})


def mean(arm: str, **at: Any) -> Seeds:
    """An arm's accuracy on average over the tasks."""
    return _average([score(arm, task, **at) for task in TASKS])


def entries(arm: str, task: str = "sst2", **at: Any) -> int:
    """How many entries an arm tunes, beside the head."""
    return int(next(iter(runs(arm, task, **at).values()))["num_method_params"])


def rate(arm: str, task: str, **at: Any) -> float:
    """The learning rate that was chosen."""
    return float(next(iter(runs(arm, task, **at).values()))["learning_rate"])


def tried_rate(arm: str, task: str) -> str:
    """The learning rate that was chosen, and whether none beyond it was tried."""
    chosen, tried = rate(arm, task), find_arm(arm).rates
    edge = ", the smallest tried" if chosen == min(tried) else ", the largest tried" if chosen == max(tried) else ""
    return f"{chosen:.5f}".rstrip("0") + edge


def _searches(arm: str, task: str, protocol: str, group: str) -> dict[float, float]:
    """Learning rate -> held-out score in per cent, of one search."""
    found = {}
    for run in (row for path in sorted(RESULTS.glob("*.jsonl")) for row in read(path.stem)):
        cell = run["cell"]
        place = {"protocol": protocol, "phase": "search", "task": task, "arm": arm, "dtype": "float32"}
        if place.items() <= cell.items() and cell.get("group", "") == group:
            found[cell["learning_rate"]] = 100 * metric_of(task).held_out(run["metrics"])
    return found


def searched(arm: str, task: str = "sst2", protocol: str = "mpnet") -> dict[str, float]:
    """Group -> the learning rate that its search chose; the rate of all, or of the rest, has an empty name."""
    found = {group: _searches(arm, task, protocol, group) for group in ("", *PROTOCOLS[protocol].groups(arm))}
    return {group: min(rates, key=lambda rate: (-rates[rate], rate)) for group, rates in found.items()}


def held_out(
    arm: str, group: str = "", rate: float | None = None, protocol: str = "mpnet", task: str = "sst2"
) -> float:
    """The best held-out score of a search in per cent, or that of one of its rates."""
    found = _searches(arm, task, protocol, group)
    return max(found.values()) if rate is None else found[rate]


def searched_line(arm: str, task: str) -> str:
    """The cells of an arm's search: the rate of all, then of the head, each with its held-out score."""
    found = searched(arm, task)
    return " | ".join(f"{found[group]:g}: {held_out(arm, group, task=task):.1f}" for group in ("", "head"))


def worst(arm: str, task: str = "sst2", protocol: str = "mpnet") -> float:
    """The learning rate that did worst in the search of one rate for all."""
    found = _searches(arm, task, protocol, "")
    return min(found, key=lambda rate: found[rate])


def of_runs(arm: str, task: str, *path: str, factor: float = 1.0, **at: Any) -> Seeds:
    """Another figure of the reported rows, by its path in them; the mean of a list."""
    return Seeds({seed: factor * _mean(_at(row, path)) for seed, row in runs(arm, task, **at).items()})


def row(file: str, **cell: Any) -> Row:
    """The one row with these coordinates."""
    found = [row for row in read(file) if all(row["cell"].get(name) == value for name, value in cell.items())]
    assert len(found) == 1, f"{len(found)} rows of {file}.jsonl have {cell}"
    return found[0]


def ratio(file: str, arm: str, quartile: int = 1, **cell: Any) -> float:
    """The time of an arm relative to the first one: median, or the quartile 0 or 2."""
    return float(_arms(file, cell)[arm]["ratio"][quartile])


def peak(file: str, arm: str, **cell: Any) -> float:
    """The peak memory of an arm relative to the first one."""
    arms = _arms(file, cell)
    return float(arms[arm]["accelerator_memory_max"] / next(iter(arms.values()))["accelerator_memory_max"])


def cost(arm: str) -> str:
    """The cells of an arm's time and peak memory beside full fine-tuning; empty where it was not timed."""
    timed = row("unified_framework", phase="cost", protocol="cpu")["arms"]
    if arm not in timed:
        return "|"
    ratios = timed[arm]["ratio"][1], timed[arm]["accelerator_memory_max"] / timed["full"]["accelerator_memory_max"]
    return " | ".join("1" if ratio == 1 else f"{ratio:.2f}" for ratio in ratios)


def closer(measure: str) -> list[float]:
    """How many times closer each layer stays to the pretrained model than two random models are, in every run."""
    layers = _layers()
    return [r / v for columns in layers for r, v in zip(columns[f"random_{measure}"], columns[measure], strict=True)]


def uneven(measure: str) -> list[float]:
    """How many times further the layer that moves most has moved than the one that moves least, in every run."""
    moved = [
        [value for layer, value in zip(columns["layer"], columns[measure], strict=True) if layer is not None]
        for columns in _layers()
    ]
    return [max(run) / min(run) for run in moved]


def most_changed(measure: str, parameter: str, head: bool = False) -> int:
    """In how many runs of full fine-tuning this parameter of the norms behind the FFN changes most of all."""
    count = 0
    for run in (row for row in read("layernorm_key_component") if row["cell"]["phase"] == "final" and "change" in row):
        table = run["change"]["components"]
        lines = [dict(zip(table["columns"], line, strict=True)) for line in table["rows"]]
        kept = [line for line in lines if line[measure] is not None]
        body = [line for line in kept if head or line["component"] not in ("pooler", "head")]
        first = max(body, key=lambda line: line[measure])
        count += (first["component"], first["parameter"]) == ("FFN norm", parameter)
    return count


def operations(measure: str, arm: str, model: str = "minilm", **at: Any) -> int:
    """How many operations an arm dispatches."""
    return int(row("operations", measure=measure, arm=arm, model=model, **at)["operations"])


def every_norm(config: str) -> tuple[int, int]:
    """On how many architectures a config finds every norm by default, and how many have norms."""
    found = [row for row in read("targets") if row["cell"]["config"] == config and row["norms"]]
    return sum(row["tuned"] == row["norms"] for row in found), len(found)


def mixed(arm: str, tokens: int) -> dict[str, Any]:
    """A batch of 32 adapters, in rows of so many tokens: times relative to the bank, operations."""
    costs: dict[str, Any] = row("serving", measure="mixed")["by_tokens"][str(tokens)][arm]
    return costs


def bank_operations() -> list[float]:
    """Operations of a bank's batch relative to the base, for every size of bank and batch."""
    counted = row("serving", measure="operations")
    return [count / counted["base"] for counts in counted["operations"].values() for count in counts.values()]


def engine_operations(step: int) -> float:
    """Operations of a step of continuous batching relative to the base engine's, for any number of adapters."""
    counted = row("continuous_batching", measure="operations")["operations"]
    [ours] = {own[step] for name, own in counted.items() if name != "base"}
    return float(ours / counted["base"][step])


def engine_processor(arm: str) -> list[float]:
    """Processor time of continuous batching relative to the base engine's, quartiles."""
    quartiles: list[float] = row("continuous_batching", measure="time")["arms"][arm]["processor"]["ratio"]
    return quartiles


def tasks_operations(arm: str) -> float:
    """Operations of a step of many tasks with a classifier each, relative to one adapter."""
    counted = row("many_tasks", head="classifier")["operations"]
    return float(counted[arm] / counted["one"])


def module_entries(tuned: str) -> int:
    """How many entries the benchmark of modules tunes."""
    return int(row("module_cost", tuned=tuned)["num_method_params"]["deltas"])


def mask_spreads() -> list[float]:
    """The spreads over seeds of all masks of a density."""
    arms, densities = ("fisher", "random", "lowest-fisher", "magnitude", "change"), (0.01, 0.05, 0.2)
    return [score(arm, task, density=at).spread for arm in arms for at in densities for task in TASKS]


def sampled(sparsity: float) -> Seeds:
    """The accuracy of sampled masks on average over the tasks."""
    return _average([of_runs("supermask", t, "masks", "sampled", factor=100, sparsity=sparsity) for t in TASKS])


def stories(arm: str) -> Seeds:
    """The perplexity of an arm over the small causal model."""
    return score(arm, "tinyshakespeare", protocol="cpu-stories260K")


def smollm2(arm: str, task: str = "tinyshakespeare") -> Seeds:
    """The perplexity of a method over SmolLM2."""
    return score(arm, task, protocol="smollm2")


def smollm2_base(task: str = "tinyshakespeare") -> float:
    """The perplexity of SmolLM2 without training."""
    return float(row("llm", protocol="smollm2", phase="base", task=task)["metrics"]["perplexity"])


def smollm2_texts(task: str, *arms: str) -> str:
    """The cells of a task: the perplexity of SmolLM2 as it is, and of each method."""
    return " | ".join(f"{each:.2f}" for each in (smollm2_base(task), *(smollm2(arm, task) for arm in arms)))


def smollm2_search(arm: str) -> dict[float, Row]:
    """Rate -> the run of a method's search over SmolLM2."""
    cell = {"protocol": "smollm2", "phase": "search", "task": "tinyshakespeare", "arm": arm}
    found = [row for row in read("llm") if cell.items() <= row["cell"].items()]
    return {row["learning_rate"]: row for row in sorted(found, key=lambda row: float(row["learning_rate"]))}


def smollm2_rate(arm: str) -> float:
    """The learning rate that a method's search over SmolLM2 chose."""
    search = smollm2_search(arm)
    return min(search, key=lambda rate: (search[rate]["metrics"]["held_out_perplexity"], rate))


def smollm2_held_out(arm: str, times: int = 0) -> float | None:
    """The held-out perplexity at the chosen rate, or the next below (-1) or above (1); None: not tried."""
    search = smollm2_search(arm)
    rates = [*search]
    at = rates.index(smollm2_rate(arm)) + times
    return float(search[rates[at]]["metrics"]["held_out_perplexity"]) if 0 <= at < len(rates) else None


def smollm2_line(arm: str) -> str:
    """The cells of a method: entries, chosen rate, held-out perplexity at and beside it, perplexity of the long run."""
    entries = smollm2_search(arm)[smollm2_rate(arm)]["num_trainable_params"]
    held_out = [smollm2_held_out(arm, times) for times in (-1, 0, 1)]
    beside = " / ".join("-" if each is None else f"{each:.1f}" for each in held_out)
    ran = cell_key({"protocol": "smollm2", "phase": "final", "task": "tinyshakespeare", "arm": arm, "dtype": "float32"})
    return f"{entries:,} | {smollm2_rate(arm):g} | {beside} | {f'{smollm2(arm):.1f}' if ran in _runs() else '-'}"


def above_head(layer: int) -> Seeds:
    """Points above the head alone of the norms of one layer."""
    return mean("ln-layer", layer=layer) - mean("head")


def few(arm: str, parameter: str) -> Seeds:
    """The accuracy of 768 entries of the norms on average over the tasks."""
    return mean(arm, count=768, parameter=parameter)


def listed(figures: Seeds) -> str:
    """The figures of the seeds, one by one."""
    return ", ".join(f"{figures[seed]:.1f}" for seed in sorted(figures))


def contribution(entries: str, score: str, task: str | None = None) -> Seeds:
    """The rank correlation of a score with the contribution of entries, in hundredths; without a task, over both."""
    path = ("correlations", entries, f"{score}, contribution")
    if task is None:
        return over_tasks("norm_entries", *path, factor=100)
    return by_seed("norm_entries", *path, factor=100, task=task)


def groups(task: str) -> Seeds:
    """The rank correlation of a group's summed Fisher information with its use, in hundredths."""
    return by_seed("norm_entries", "group_correlations", "together", "Fisher", factor=100, task=task)


def without(score: str, quarter: int) -> Seeds:
    """Points of accuracy on trec that resetting a quarter of the gains costs, the lowest scores first."""
    return by_seed("norm_entries", "bins", "gains", score, quarter, 1, factor=100, task="trec")


def by_seed(file: str, *path: str | int, factor: float = 1.0, **cell: Any) -> Seeds:
    """A figure of all rows with these coordinates, by its path in them."""
    chosen = [row for row in read(file) if all(row["cell"].get(name) == value for name, value in cell.items())]
    return Seeds({row["cell"]["seed"]: factor * _at(row, path) for row in chosen})


def over_tasks(file: str, *path: str | int, factor: float = 1.0, **cell: Any) -> Seeds:
    """The mean of `by_seed` over the tasks."""
    return _average([by_seed(file, *path, factor=factor, task=task, **cell) for task in TASKS])


def said(page: str, pattern: str) -> float:
    """A figure that only the result page has, from its sentence: the group of a pattern."""
    found = re.findall(pattern, (RESULTS / f"{page}.md").read_text(encoding="utf-8"))
    assert found, f"{page}.md does not say {pattern!r}"
    return float(found[0].replace(",", ""))


def repaired(damage: str, arm: str, domain: str = "gsm8k", measure: str = "perplexity") -> float:
    """Quality of a damaged language model after a repair, at the rate of all damages; seed 0."""
    at = {} if arm not in repair.RATE else {"learning_rate": repair.RATE[arm]}
    return float(row("recover", damage=damage, arm=arm, seed=0, **at)["metrics"][domain][measure])


def rendered(template: str, names: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """A template with its expressions evaluated, and where in the text their values are.

    Example:
        >>> rendered("{1 + 1} and {2 / 3:.1f}", {})
        ('2 and 0.7', [(0, 1), (6, 9)])
    """
    text, places = "", []
    for literal, expression, spec, _ in string.Formatter().parse(template):
        text += literal
        if expression is not None:
            value = eval(expression, globals() | names)
            start, text = len(text), text + format(value, spec or "")
            places.append((start, len(text)))
    return text, places


def matches(page: str, text: str) -> Iterator[int]:
    """Where a text begins in a page, every time, not within a longer number."""
    for found in re.finditer(rf"(?<![\d.,]){re.escape(text)}(?!\d|[.,]\d)", page):
        yield found.start()


def _layers() -> list[dict[str, list[Any]]]:
    tables = [row["closeness"]["layers"] for task in TASKS for row in _own_full(task)]
    return [dict(zip(t["columns"], map(list, zip(*t["rows"], strict=True)), strict=True)) for t in tables]


def _own_full(task: str) -> list[Row]:
    cells = ({**row["cell"], "row": row} for row in read("how_fine"))
    return [c["row"] for c in cells if c["phase"] == "final" and c["arm"] == "full" and c["task"] == task]


def _average(tasks: list[Seeds]) -> Seeds:
    shared = set.intersection(*map(set, tasks))
    return Seeds({seed: statistics.mean(task[seed] for task in tasks) for seed in sorted(shared)})


def _arms(file: str, cell: dict[str, Any]) -> dict[str, Any]:
    arms: dict[str, Any] = row(file, **cell)["arms"]
    return arms


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def _mean(value: Any) -> float:
    return statistics.mean(value) if isinstance(value, list) else value
