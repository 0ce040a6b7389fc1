"""The page of `llm`: rows -> claims, tables with the names of PEFT's method_comparison, and plots."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.claims import ABOUT_VERDICTS
from benchmarks.harness.classification import Protocol, grown_cells
from benchmarks.harness.finals import Finals, differences, figures
from benchmarks.harness.method_costs import cost_section
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.paired import Paired
from benchmarks.harness.plots import ABOUT_DOTS, Dot, Line, Panel, plot_along, plot_dots
from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.tables import mean_and_spread, of_what_ran, what_did_not_run

SAID = {
    "ln": "ln: all norms, deltas in float32",
    "ln-64": "ln-64: 64 entries per norm, by Fisher information",
    "lora": "lora: rank 8 on query and value",
    "lora+ln": "lora+ln: both",
    "ia3": "ia3: factors of keys, values and FFN",
    "road": "road: rotations of query and value",
    "beft": "beft: biases of values",
    "full": "full: everything",
    "ln-bf16": "ln-bf16: ln, over norms in bfloat16",
    "stock-ln-bf16": "stock-ln-bf16: PEFT's LN tuning, norms in bfloat16",
}
DIGITS = 2  # of a perplexity, which is near 1 for texts that follow from what is given
# First and second, and what the difference is held to: the first is better, by as many points of perplexity.
COMPARED = (
    ("ln", "lora"),
    ("ln", "full"),
    ("ln", "ia3"),
    ("ln", "road"),
    ("ln", "beft"),
    ("ln-64", "ln"),
    ("lora+ln", "lora"),
    ("lora+ln", "ln"),
    ("ln-bf16", "stock-ln-bf16"),
)
SIZES = ("num_trainable_params", "file_size")
BFLOAT16 = ("ln-bf16", "stock-ln-bf16")
GENERATED = {"bleu": ("BLEU", 1.0), "chrf": ("chrF", 1.0), "exact_match": ("test accuracy, %", 100.0)}


@dataclass(frozen=True)
class Scope:
    """What is reported.

    Attributes:
        protocol: of the rows.
        tasks: in order; of which something was run or not.
        arms: methods in order -> name of the experiment.
        seeds: planned ones.
        searched_on: the task whose search chooses the rates; None: each task has its own search.
        base: task -> the row of the model as it is.
        cost: the row that says what a step costs.
        command: that runs what was not run.
    """

    protocol: Protocol
    tasks: tuple[str, ...]
    arms: Mapping[str, str]
    seeds: tuple[int, ...]
    searched_on: str | None
    base: Mapping[str, Row]
    cost: Row | None
    command: str


def write_report(rows: Rows, results: Path, scope: Scope, stem: str) -> None:
    """Write the page and its plots."""
    found = Finals(rows, scope.protocol, scope.seeds)
    ran = [task for task in scope.tasks if any(found.of(task, arm) for arm in scope.arms)]
    results.mkdir(parents=True, exist_ok=True)
    parts = [
        _title(scope, found, ran),
        *_differences(found, scope, ran),
        *_methods(found, scope, ran),
        *_plot(found, scope, ran, results / f"{stem}.png"),
        *_rates(rows, scope, results / f"{stem}_rates.png"),
        *_moved(rows, scope),
        *cost_section(scope.cost),
        *_left_out(found, scope),
    ]
    (results / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _title(scope: Scope, found: Finals, ran: Sequence[str]) -> str:
    protocol = scope.protocol
    seeds = _seeds(found, scope, ran)
    scored = "all rows" if protocol.scored is None else f"{protocol.scored} rows"
    searched = f"{protocol.search_steps} steps, scored on at most {protocol.held_out} held-out training rows"
    shared = "" if scope.searched_on is None else f" of {scope.searched_on}; the other tasks take its rates"
    numbers = "bf16 autocast" if protocol.autocast else "float32"
    return (
        "# Which method for a language model\n\n"
        f"Model: {protocol.model}. Protocol `{protocol.name}`: {protocol.steps} steps of {protocol.batch_size} rows "
        f"for every method, {numbers}, {scored} of the validation split scored; seeds run: {len(seeds)} of "
        f"{len(scope.seeds)}. Learning rates are searched for every method by {searched}{shared}. The grid grows while "
        "the best rate is at its edge.\n\n"
        "Perplexity is per token, over speeches of tinyshakespeare, sentences of e2e_nlg after their facts, and "
        "answers of gsm8k after their questions, with the token that ends a text. So a part of what is learned is "
        "where a text ends. Smaller is better."
    )


def _seeds(found: Finals, scope: Scope, ran: Sequence[str]) -> set[int]:
    return {row["cell"]["seed"] for task in ran for row in _rows(found, scope, task)}


def _cell(values: Sequence[float], digits: int = 1) -> str | None:
    """Return a figure, with its spread where there are several runs."""
    if len(values) > 1:
        return mean_and_spread(values, len(values), digits)
    return f"{values[0]:.{digits}f}" if values else None


def _differences(found: Finals, scope: Scope, ran: Sequence[str]) -> Iterator[str]:
    yield "## Differences"
    single = len(_seeds(found, scope, ran)) < 2
    lines: list[list[object]] = []
    for ours, theirs in COMPARED:
        cells: list[object] = []
        for task in ran:
            pairs = differences(found.of(task, ours), found.of(task, theirs))
            paired = Paired({task: pairs})
            word = "" if paired.interval is None else f" ({paired.verdict(lambda mean: mean > 0)})"
            cells.append(f"{_cell([*pairs.values()], DIGITS)}{word}" if pairs else None)
        lines.append([f"{ours} - {theirs}", *cells])
    yield of_what_ran(("difference" if single else "difference (above 0)", *ran), lines)
    said = "One seed was run, so none of these differences is certain." if single else ABOUT_VERDICTS
    yield (
        "Points of perplexity by which the first method is better than the second; negative where it is worse. Each "
        f"difference is taken within a seed (the same batches). {said}"
    )


def _methods(found: Finals, scope: Scope, ran: Sequence[str]) -> Iterator[str]:
    yield "## Methods"
    header = ["experiment_name", "num_trainable_params", "file_size", "learning rate"]
    kinds = {task: [key for key in GENERATED if _generated(_rows(found, scope, task), key)] for task in ran}
    for task in ran:
        header += [f"{task} perplexity", f"{task} train_loss"]
        header += [f"{task} {GENERATED[key][0]}" for key in kinds[task]]
    base: list[object] = ["the model as it is", 0, 0, "-"]
    for task in ran:
        row = [scope.base[task]] if task in scope.base else []
        base += [_cell(figures(row), DIGITS), None, *(_generated_cell(row, key) for key in kinds[task])]
    lines = [base]
    for arm, name in scope.arms.items():
        every = [row for task in ran for row in found.of(task, arm)]
        rates = sorted({row["learning_rate"] for row in every})
        edge = " (edge)" if found.at_edge(scope.searched_on or (ran[0] if ran else ""), arm) else ""
        first = every[0] if every else None
        line: list[object] = [
            name,
            first and f"{first['num_trainable_params']:,}",
            first and f"{first['file_size']:,}",
            "; ".join(f"{rate:g}" for rate in rates) + edge if rates else None,
        ]
        for task in ran:
            rows = found.of(task, arm)
            losses = [row["metrics"]["train_loss"] for row in rows if row["metrics"]["train_loss"] is not None]
            line += [_cell(figures(rows), DIGITS), _cell(losses, 3)]
            line += [_generated_cell(rows, key) for key in kinds[task]]
        lines.append(line)
    yield of_what_ran(header, lines)
    counts = {row["generated"]["count"] for task in ran for row in _rows(found, scope, task) if row.get("generated")}
    answered = (
        " BLEU and chrF (sacrebleu, all references) and test accuracy (exact match of the number behind `####`) are of "
        f"{max(counts)} greedy answers per run."
        if counts
        else ""
    )
    yield (
        "Names are those of PEFT's method_comparison: method, model, variant. `lntune` is this package, `ln_tuning` is "
        "PEFT's own, and `-bfloat16` are norms stored in bfloat16. `file_size` is in bytes: the adapter, or for full "
        "fine-tuning the model. `train_loss` is the mean over the last tenth of the steps. Settings differ from "
        f"theirs: model, data, steps, and a learning rate searched per method.{answered}"
    )


def _rows(found: Finals, scope: Scope, task: str) -> list[Row]:
    return [row for arm in scope.arms for row in found.of(task, arm)]


def _generated(rows: Sequence[Row], key: str) -> list[float]:
    return [GENERATED[key][1] * row["generated"][key] for row in rows if key in row.get("generated", {})]


def _generated_cell(rows: Sequence[Row], key: str) -> str | None:
    return _cell(_generated(rows, key))


def _plot(found: Finals, scope: Scope, ran: Sequence[str], path: Path) -> Iterator[str]:
    """Draw the tasks of which something was run."""
    panels = []
    for task in ran:
        dots = [Dot(arm, arm, figures(found.of(task, arm))) for arm in scope.arms if found.of(task, arm)]
        if task in scope.base:
            dots.insert(0, Dot("as it is", "head", figures([scope.base[task]])))
        panels.append(Panel(task, metric_of(task).along, {"": dots}, across=("full",)))
    if panels:
        plot_dots(path, panels, f"Perplexity after {scope.protocol.steps} steps")
        yield f"![Perplexity of each method on {', '.join(ran)}]({path.name})"
        yield f"{ABOUT_DOTS} The dashed line is full fine-tuning; `as it is` is the model without training."


def _searches(rows: Rows, scope: Scope, task: str) -> dict[str, list[Row]]:
    """Return the runs of each method's search that there are, from the smallest rate to the largest."""
    found = {}
    for arm in scope.arms:
        cells = grown_cells(rows, scope.protocol, (task, arm, "float32"))
        ran = [row for row in map(rows.get, cells) if row is not None]
        if ran:
            found[arm] = sorted(ran, key=lambda row: row["learning_rate"])
    return found


def _rates(rows: Rows, scope: Scope, path: Path) -> Iterator[str]:
    yield "## Learning rates"
    drawn: dict[str, dict[str, Line]] = {}
    upright: dict[str, str] = {}
    for task in (scope.searched_on,) if scope.searched_on else scope.tasks:
        searches = _searches(rows, scope, task)
        if not searches:
            continue
        name = f"held_out_{metric_of(task).name}"
        rates = sorted({row["learning_rate"] for found in searches.values() for row in found})
        lines: list[list[object]] = []
        for arm, found in searches.items():
            scores = {row["learning_rate"]: row["metrics"][name] for row in found}
            best = min(scores, key=lambda rate: (scores[rate], rate))
            shown = {rate: f"{score:.1f}" for rate, score in scores.items()}
            shown[best] = f"**{shown[best]}**{' (edge)' if best in (min(scores), max(scores)) else ''}"
            sizes = [f"{found[0][name]:,}" for name in SIZES]
            lines.append([SAID[arm], *sizes, *(shown.get(rate, "") for rate in rates)])
        yield f"Held-out perplexity on {task} after {scope.protocol.search_steps} steps at each learning rate:"
        yield of_what_ran(("method", *SIZES, *(f"{rate:g}" for rate in rates)), lines)
        title = f"{task}: each method's search"
        upright[title] = "log of held-out perplexity (smaller is better)"
        drawn[title] = {
            arm: Line(arm, [(math.log10(row["learning_rate"]), [math.log(row["metrics"][name])]) for row in found])
            for arm, found in searches.items()
            if arm not in BFLOAT16
        }
    if not drawn:
        yield "Nothing was run."
        return
    yield (
        f"One seed, {scope.protocol.search_steps} steps, in which the learning rate falls to 0; the best is bold, "
        "with `(edge)` where no rate beyond it was tried. Short searches prefer large rates: for longer training start "
        "at a third of the best rate. Rates are added only while the best one is at the edge; other cells are empty."
    )
    plot_along(path, drawn, "Learning rates", "log10 of the learning rate", upright)
    yield f"![Held-out perplexity of each method by learning rate]({path.name})"


def _moved(rows: Rows, scope: Scope) -> Iterator[str]:
    """Yield which share of the entries moved over norms in bfloat16."""
    task = scope.searched_on or scope.tasks[0]
    shares = {
        arm: {row["learning_rate"]: row["metrics"]["moved"] for row in found}
        for arm, found in _searches(rows, scope, task).items()
        if arm in BFLOAT16
    }
    if not shares:
        return
    yield "## Over norms in bfloat16"
    rates = sorted({rate for each in shares.values() for rate in each})
    lines = [
        [SAID[arm], *(f"{each[rate]:.1%}" if rate in each else "" for rate in rates)] for arm, each in shares.items()
    ]
    yield of_what_ran(("entries that moved", *(f"{rate:g}" for rate in rates)), lines)
    yield (
        "Share of the norms' entries that differ from their start after "
        f"{scope.protocol.search_steps} steps, by learning rate. The model is rounded to bfloat16 and its norms are "
        "stored in it; other weights and arithmetic are float32."
    )


def _left_out(found: Finals, scope: Scope) -> Iterator[str]:
    yield "## Not run here"
    runs = {task: {arm: len(found.of(task, arm)) for arm in scope.arms} for task in scope.tasks}
    lines = [f"- {said}" for said in what_did_not_run(runs, len(scope.seeds))]
    yield "\n".join([*(lines or ["- Nothing."]), f"- To go on from these rows: `{scope.command}`."])
