"""Where is tuning the norms within a point of full fine-tuning, and what closes the gap where it is not?

The page is written from the rows of the other experiments; the only thing run here counts the rows of the tasks.

python -m benchmarks.papers.near_full --data-dir <folder>
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.arms import ARMS
from benchmarks.harness.claims import ABOUT_VERDICTS
from benchmarks.harness.classification import PROTOCOLS, shared_searches
from benchmarks.harness.finals import by_seed, differences
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.paired import FAILS, HOLDS, INCONCLUSIVE, LEVEL, Paired
from benchmarks.harness.plots import ABOUT_DOTS, Dot, Panel, plot_dots
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import RESULTS, run_cells
from benchmarks.harness.tables import NONE, mean_and_spread, of_what_ran
from benchmarks.harness.tasks import SIMILARITY, TEXT_COLUMNS, read_rows

NAME = "near_full"
SOURCES = ("accuracy", "unified_framework", "layernorm_key_component", "how_fine", "winning_tickets")
NEAR = 1.0  # points: the bound set before measuring
LN, FULL, HEAD = "ln", "full", "head"
# What may close the gap: all norms with something beside, or other small methods. In the order of the table.
OTHERS = ("lora+ln", "mha-adapter+ln", "ffn-adapter+ln", "prefix+ln", "prefix+mha-adapter+ln", "mam+ln")
ALONE = ("bitfit", "lora", "mha-adapter", "ffn-adapter", "prefix")
MINILM = "MiniLM"
KINDS = {
    **dict.fromkeys(TEXT_COLUMNS, "classes"),
    **dict.fromkeys(SIMILARITY, "similarity"),
    "wnut_17": "entities",
    "squad_small": "answers",
}
COUNTED = ("sst2", "cola", "rte", "stsb", "trec", "wnut_17", "squad_small")
ABOUT_APART = (
    "One seed. Each group is searched at the rates that were chosen before it; `ln.bias` are the biases of the norms, "
    "apart from their gains."
)
ABOUT_PLOT = f"{ABOUT_DOTS} The dashed line is full fine-tuning, the dotted one is {NEAR:g} point below it."


@dataclass(frozen=True)
class Setting:
    """A protocol and a task, with the reported rows of each arm."""

    protocol: str
    task: str
    rows: Mapping[str, Mapping[int, Row]]

    @property
    def model(self) -> str:
        """The name of the model."""
        known = PROTOCOLS.get(self.protocol)
        if known is not None:
            return (known.model or MINILM).rsplit("/", 1)[-1]
        base = max((name for name in PROTOCOLS if self.protocol.startswith(f"{name}-")), key=len)
        return self.protocol.removeprefix(f"{base}-")

    @property
    def rates(self) -> str:
        """What learning rates are chosen for."""
        return "per part" if any("head_learning_rate" in row for row in self.rows[FULL].values()) else "one"

    @property
    def steps(self) -> tuple[int, int]:
        """Steps, and rows per step."""
        row = next(iter(self.rows[FULL].values()))
        return row["steps"], row["batch_size"]

    @property
    def said(self) -> str:
        """The setting in a plot."""
        steps, size = self.steps
        return f"{self.task}, {self.model}, {steps} x {size}" + (", rate per part" if self.rates != "one" else "")

    def minus_full(self, arm: str) -> Paired:
        """Return an arm minus full fine-tuning, within seeds."""
        of = [list(self.rows.get(each, {}).values()) for each in (arm, FULL)]
        return Paired({self.task: differences(*of)})

    def share(self) -> str | None:
        """Return the share of the way from the head to full that the norms go, in the mean over seeds, in per cent."""
        scores = [by_seed(list(self.rows.get(arm, {}).values())) for arm in (LN, HEAD, FULL)]
        seeds = set.intersection(*map(set, scores))
        if not seeds:
            return None
        ln, head, full = (statistics.mean(each[seed] for seed in seeds) for each in scores)
        return f"{100 * (ln - head) / (full - head):.0f} %"


def settings(folder: Path) -> list[Setting]:
    """Return every protocol and task of which there are rows of the norms and of full, over a float32 base.

    Where two experiments ran the same cell, the first of `SOURCES` counts.
    """
    found: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for source in SOURCES:
        for row in Rows(folder / f"{source}.jsonl"):
            cell = row["cell"]
            plain = {"protocol", "phase", "task", "arm", "dtype", "seed"} == cell.keys()
            if plain and cell["phase"] == "final" and cell["dtype"] == "float32" and cell["arm"] in ARMS:
                arms = found.setdefault((cell["protocol"], cell["task"]), {})
                arms.setdefault(cell["arm"], {}).setdefault(cell["seed"], row)
    every = [Setting(*at, arms) for at, arms in found.items() if {LN, FULL} <= arms.keys()]
    return sorted(every, key=lambda each: (each.model, each.task, each.steps, each.rates))


def verdict(found: Paired) -> str:
    """Return whether a difference is at least `-NEAR`."""
    return found.verdict(lambda mean: mean >= -NEAR)


def _cells(found: Paired) -> list[object]:
    """Return mean and spread, interval, verdict, and what would decide it."""
    if not found.seeds:
        return [None, None, None, None]
    word = verdict(found)
    more = found.more_runs(-NEAR) if word == INCONCLUSIVE and found.interval else NONE
    return [mean_and_spread(found.seeds, len(found.seeds)), found.span or NONE, word, more]


def _gaps(every: Sequence[Setting], sizes: Mapping[str, int]) -> str:
    """Return the table of all settings."""
    lines = []
    for each in every:
        steps, size = each.steps
        train = f"{sizes[each.task]:,}" if each.task in sizes else NONE
        place = [each.model, each.task, KINDS.get(each.task, "text"), train, f"{steps} x {size}", each.rates]
        lines.append([*place, *_cells(each.minus_full(LN)), each.share() or NONE])
    header = ("model", "task", "kind", "training rows", "steps x rows", "rates")
    measured = ("ln - full", f"{LEVEL:.0%} interval", f"within {NEAR:g} point", "to decide it", "head to full")
    return of_what_ran((*header, *measured), lines, names=6)


def _closing(every: Sequence[Setting]) -> Iterator[str]:
    """Yield a table for each setting in which the norms are not within a point for certain."""
    for each in every:
        gap = each.minus_full(LN)
        if not gap.seeds or metric_of(each.task).smaller:
            continue
        arms = [arm for arm in (LN, *OTHERS, *ALONE) if arm in each.rows]
        if len(arms) < 3:
            continue
        lines = []
        for arm in arms:
            rows = list(each.rows[arm].values())
            entries = rows[0]["num_method_params"]
            lines.append([arm, f"{entries:,}", *_cells(each.minus_full(arm))])
        header = ("method", "tuned entries", "minus full", f"{LEVEL:.0%} interval", f"within {NEAR:g} point")
        yield f"### {each.said}"
        yield of_what_ran((*header, "to decide it"), lines)


def _answer(every: Sequence[Setting]) -> str:
    """Say in which settings the norms are within a point, and in which not."""
    by_word: dict[str, list[str]] = {}
    for each in every:
        found = each.minus_full(LN)
        if found.seeds:
            by_word.setdefault(verdict(found), []).append(each.said)
    words = {HOLDS: "Within a point", FAILS: "Further away", INCONCLUSIVE: "Inconclusive"}
    return "\n".join(f"- {said}: {'; '.join(by_word[word])}." for word, said in words.items() if word in by_word)


def _recipe(every: Sequence[Setting]) -> str:
    """Say where something beside the norms closes a gap that they leave, and where nothing that was run does."""
    closed, left = [], []
    for each in every:
        if each.minus_full(LN).seeds and verdict(each.minus_full(LN)) != HOLDS:
            found = [arm for arm in OTHERS if (gap := each.minus_full(arm)).seeds and verdict(gap) == HOLDS]
            closed += [f"{arm} on {each.said}" for arm in found]
            left += [] if found else [each.said]
    lines = [f"- Closes the gap, with the whole interval within a point: {'; '.join(closed)}."] if closed else []
    lines += [f"- Nothing that was run closes it with certainty: {'; '.join(left)}."] if left else []
    return "\n".join(lines) or "No setting has a gap."


def rates_apart(folder: Path) -> str | None:
    """Return the table of searches with a rate for the head and for each part: held-out scores of one seed."""
    found = Rows(folder / f"{NAME}.jsonl")
    for source in SOURCES:
        found.adopt(Rows(folder / f"{source}.jsonl"))
    lines: list[list[object]] = []
    for protocol in (each for each in PROTOCOLS.values() if each.group_rates):
        found.adopt(shared_searches(found, protocol))
        every = [row for row in found if row["cell"]["phase"] == "search"]
        searches = [row for row in every if row["cell"]["dtype"] == "float32"]
        own = [row for row in searches if row["cell"]["protocol"] == protocol.name]
        grouped = {(row["cell"]["task"], row["cell"]["arm"]) for row in own if "group" in row["cell"]}
        for task, arm in sorted(grouped):
            rows = [row for row in own if (row["cell"]["task"], row["cell"]["arm"]) == (task, arm)]
            groups = dict.fromkeys(row["cell"]["group"] for row in rows if "group" in row["cell"])
            said = [_tried(rows, group) for group in (None, *groups)]
            setting = f"{task}, {protocol.said.split(',')[0]}, {protocol.search_steps} steps"
            lines.append([setting, arm, "; ".join(filter(None, said))])
    header = ("setting", "method", "rates tried, one group after the other: held-out scores")
    return of_what_ran(header, lines, 2) if lines else None


def _tried(rows: Sequence[Row], group: str | None) -> str:
    """Return the rates tried for a group, or for all parameters, with their scores; nothing without rows."""
    tried: dict[float, float] = {}
    for row in rows:
        if row["cell"].get("group") == group:
            metric = metric_of(row["cell"]["task"])
            tried[row["cell"]["learning_rate"]] = metric.factor * row["metrics"][f"held_out_{metric.name}"]
    scores = ", ".join(f"{rate:g}: {score:.1f}" for rate, score in sorted(tried.items()))
    return f"{group or 'one rate'} ({scores})" if tried else ""


def _flat(every: Sequence[Setting]) -> str | None:
    """Return the table of full fine-tuning after half of the steps, where rows have it."""
    lines: list[list[object]] = []
    for each in every:
        metric = metric_of(each.task)
        rows = [row for row in each.rows[FULL].values() if "metrics_midway" in row]
        if rows:
            midway = [metric.shown(row["metrics_midway"]) for row in rows]
            end = [metric.shown(row["metrics"]) for row in rows]
            gains = {row["cell"]["seed"]: metric.gain(b - a) for row, a, b in zip(rows, midway, end, strict=True)}
            span = Paired({each.task: gains}).span or NONE
            shown = [mean_and_spread(values, len(values)) for values in (midway, end, list(gains.values()))]
            lines.append([each.said, *shown, span])
    header = ("setting", "full after half of the steps", "after all", "gain", f"{LEVEL:.0%} interval")
    return of_what_ran(header, lines) if lines else None


def _plot(every: Sequence[Setting], path: Path) -> None:
    """Draw the difference of each setting in points, by kind of task."""
    groups: dict[str, list[Dot]] = {}
    for each in every:
        values = each.minus_full(LN).seeds
        if values and not metric_of(each.task).smaller:
            shown = ((LN, "ln"), ("lora", "lora"), ("lora+ln", "lora+ln"))
            for arm, method in shown:
                scores = each.minus_full(arm).seeds
                if scores:
                    name = "norms" if arm == LN else arm
                    groups.setdefault(each.said, []).append(Dot(name, method, scores))
    if groups:
        zero = Dot("full", FULL, [0.0])
        panel = Panel("minus full fine-tuning", "points", {"": [zero], **groups}, across=(FULL,), bounds=(-NEAR,))
        plot_dots(path, [panel], "How far from full fine-tuning")


def write_report(folder: Path) -> None:
    """Write the page and its plot."""
    every = settings(folder)
    sizes = {row["cell"]["task"]: row["training_rows"] for row in Rows(folder / f"{NAME}.jsonl")}
    drawn = any(each.minus_full(LN).seeds and not metric_of(each.task).smaller for each in every)
    if drawn:
        _plot(every, folder / f"{NAME}.png")
    flat, apart = _flat(every), rates_apart(folder)
    parts = [
        "# Where are the norms within a point of full fine-tuning?",
        "All rows of the other pages in which the norms and full fine-tuning were trained equally. Every method trains "
        "the head too. `head to full` is the share of the way from the head alone to full fine-tuning.",
        _answer(every) or "Nothing was run.",
        _gaps(every, sizes),
        *([f"![How far methods are from full fine-tuning]({NAME}.png)", ABOUT_PLOT] if drawn else []),
        "Differences are in points of the task's score, ours minus full, each taken within a seed; for a perplexity a "
        f"positive one says that ours is lower. {ABOUT_VERDICTS}",
        "## What closes the gap",
        _recipe(every),
        *_closing(every),
        *(["## Rates apart, on held-out rows", apart, ABOUT_APART] if apart else []),
        *(["## Has full fine-tuning flattened?", flat] if flat else []),
    ]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def count_rows(cell: Cell, data_dir: Path) -> Row:
    """Count the training rows of a task."""
    return {"training_rows": len(read_rows(cell["task"], data_dir)["train"])}


def main(arguments: Sequence[str] | None = None) -> int:
    """Count rows of tasks, and write the page; return how many runs failed."""
    parser = argparse.ArgumentParser(description="Where are the norms within a point of full fine-tuning?")
    parser.add_argument("--data-dir", type=Path, help="folder of <task>/train.jsonl; without it nothing is counted")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--report", action="store_true", help="write the page from the rows, and count nothing")
    options = parser.parse_args(arguments)
    failed = 0
    if options.data_dir is not None and not options.report:
        cells: list[dict[str, Any]] = [
            {"phase": "size", "task": task} for task in COUNTED if (options.data_dir / task / "train.jsonl").exists()
        ]
        rows = Rows(options.results / f"{NAME}.jsonl")
        failed = run_cells(cells, rows, partial(count_rows, data_dir=options.data_dir), 1, "rows of tasks")
    write_report(options.results)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
