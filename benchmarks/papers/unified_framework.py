"""Which parts go together: prefix, adapters, LoRA and LayerNorm, alone and combined? arXiv 2211.08682's experiments.

python -m benchmarks.papers.unified_framework --protocol full
python -m benchmarks.papers.unified_framework --data-dir <folder>
python -m benchmarks.papers.unified_framework --data-dir <folder> --model <a causal LM> --tasks tinyshakespeare e2e_nlg
"""

import argparse
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.harness import classification, questions, tagging, texts
from benchmarks.harness.answers import Answer, answer_section, measured_settings
from benchmarks.harness.arms import SHARE
from benchmarks.harness.claims import Finding, listed
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
    shared_searches,
)
from benchmarks.harness.comparison import ABOUT_DIFFERENCES, ABOUT_HEAD, ABOUT_RATES, Bound, Comparison, Side, not_run
from benchmarks.harness.finals import Finals, reported, seeds_of
from benchmarks.harness.method_costs import cost_section, time_methods
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.paired import FAILS, HOLDS, INCONCLUSIVE
from benchmarks.harness.plots import ABOUT_ACROSS, ABOUT_DOTS, Panel, plot_dots
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_cells
from benchmarks.harness.tables import of_what_ran
from benchmarks.harness.tasks import LOADERS, SIMILARITY, TEXT_COLUMNS

NAME = "unified_framework"
AVERAGED = ("sst2", "trec")  # where they are reported, averages are over these alone: the other tasks come after them
BEST = "prefix+mha-adapter+ln"  # of the paper's combinations
# In run order, which is the order they are run in.
FIRST = (
    *("ln", "mha-adapter", "ffn-adapter", "prefix"),
    *("mha-adapter+ln", "ffn-adapter+ln", "prefix+ln", BEST),
    *("full", "head"),
)
ABLATIONS = ("ln-weight", "ln-bias", "ln-attention", "ln-ffn", "ln-lower", "ln-upper")
COMBINED = ("lora", "mam", "mam+ln", "lora+ln")
SAID = {
    "ln": "ln: all norms",
    "mha-adapter": "mha-adapter: sequential, at the attention",
    "ffn-adapter": "ffn-adapter: sequential, at the FFN",
    "prefix": "prefix: keys and values",
    "mam": "mam: prefix, parallel FFN adapter of scale 4",
    "lora": "lora: rank 8 on query and value",
    "full": "full: everything",
    "head": "head: nothing else",
    "ln-weight": "gains",
    "ln-bias": "biases",
    "ln-attention": "norms of the attention",
    "ln-ffn": "norms of the FFN",
    "ln-lower": "norms of the lower half of the layers",
    "ln-upper": "norms of the upper half of the layers",
}


@dataclass(frozen=True)
class Scope:
    """What is reported.

    Attributes:
        protocol: of the rows.
        tasks: in this order.
        arms: that are possible with these tasks.
        seeds: planned ones, and others that were run.
        cost: the row that says what a step costs.
    """

    protocol: Protocol
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    cost: Row | None


def side(arm: str) -> Side:
    """Return an arm as it stands in a sentence."""
    return Side(SAID[arm] if arm in ABLATIONS else arm, arm)


BOUNDS = (
    Bound(side("mha-adapter+ln"), side("mha-adapter"), "above mha-adapter alone: the two together help"),
    Bound(side("mha-adapter+ln"), side("ln"), "above ln alone"),
    Bound(side("ffn-adapter+ln"), side("ffn-adapter"), "below ffn-adapter alone: ln hurts it", holds=operator.lt),
)
BOUNDS_OF_NORMS = (
    Bound(side("ln-bias"), side("ln-weight"), "above gains alone: biases matter more"),
    Bound(side("ln-attention"), side("ln-ffn"), "above norms of the FFN: those of the attention matter more"),
)
COMPARED = tuple(
    (side(ours), side(theirs))
    for ours, theirs in (
        ("mha-adapter+ln", "mha-adapter"),
        ("mha-adapter+ln", "ln"),
        ("ffn-adapter+ln", "ffn-adapter"),
        ("ffn-adapter+ln", "ln"),
        ("prefix+ln", "prefix"),
        ("prefix+ln", "ln"),
        ("lora+ln", "lora"),
        ("mam+ln", "mam"),
        (BEST, "prefix+ln"),
        (BEST, "mha-adapter+ln"),
        (BEST, "ffn-adapter+ln"),
        (BEST, "full"),
        ("mha-adapter+ln", "ffn-adapter+ln"),
        ("mha-adapter", "ffn-adapter"),
        ("ln", "full"),
        ("ln", "head"),
        ("ln-bias", "ln-weight"),
        ("ln-bias", "ln"),
        ("ln-attention", "ln-ffn"),
        ("ln-upper", "ln-lower"),
        ("ln-upper", "ln"),
    )
)


def _above(ours: str, theirs: str) -> Bound:
    return Bound(side(ours), side(theirs), f"above {side(theirs).said}")


def answers(compared: Comparison, scope: Scope) -> list[Answer]:
    """Return what the rows say of each claim of the abstract."""
    cost = scope.cost if compared.found.protocol == scope.protocol else None
    of_mha = (("mha-adapter+ln", "mha-adapter"), ("mha-adapter+ln", "ln"), ("prefix+ln", "prefix"))
    hurts = Bound(side("ffn-adapter+ln"), side("ffn-adapter"), "below ffn-adapter", holds=operator.lt)
    asked = compared.asked
    return [
        Answer(
            "LN-tuning, 0.03 % of the parameters, is above baselines of under 0.1 %", [asked(_above("ln", "bitfit"))]
        ),
        Answer("LN-tuning is of high time efficiency", [_faster(cost)]),
        Answer("prefix + adapter at the MHA + LN is the best combination", [_best(compared, scope, asked)]),
        Answer("tuning MHA and LayerNorm together improves", [asked(_above(*pair)) for pair in of_mha]),
        Answer("tuning FFN and LayerNorm together is worse", [asked(hurts)]),
        Answer("LN-tuning has no redundant parameters", [asked(_above("ln", part)) for part in ABLATIONS]),
    ]


def _faster(row: Row | None) -> Finding:
    wanted = "a training step of ln is faster than one of full"
    if row is None:
        return Finding(wanted)
    low, middle, high = row["arms"]["ln"]["ratio"]
    again = row["arms"]["full again"]["ratio"]
    noise = max(abs(again[0] - 1), abs(again[2] - 1))
    word = INCONCLUSIVE if abs(middle - 1) <= noise else HOLDS if middle < 1 else FAILS
    return Finding(wanted, f"{middle:.2f} of its time (quartiles {low:.2f} to {high:.2f})", word)


def write_report(rows: Rows, results: Path, scope: Scope) -> None:
    """Write the page and its plot."""
    found = Finals(rows, scope.protocol, scope.seeds)
    main = [task for task in scope.tasks if task in AVERAGED]
    averaged = [task for task in main if any(found.of(task, arm) for arm in scope.arms)] or main or list(scope.tasks)
    ran = [task for task in scope.tasks if task in averaged or any(found.of(task, arm) for arm in scope.arms)]
    compared = Comparison(found, ran, averaged)
    stem = scope.protocol.stem(NAME)
    results.mkdir(parents=True, exist_ok=True)
    settings = measured_settings(rows, scope.protocol, AVERAGED, scope.seeds, partial(answers, scope=scope))
    parts = [_title(scope, ran), *answer_section(settings), *_held(compared, scope), *_arms(compared, scope)]
    if _plot(compared, scope, results / f"{stem}.png"):
        parts.append(f"![Scores of each arm on {', '.join(ran)}]({stem}.png)")
        parts.append(f"{ABOUT_DOTS} {ABOUT_ACROSS}")
    parts += [*cost_section(scope.cost), *_left_out(compared, scope)]
    (results / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _title(scope: Scope, tasks: Sequence[str]) -> str:
    protocol = scope.protocol
    scores = ", ".join(f"{task} by {metric_of(task).said}" for task in tasks)
    return (
        "# Which parts go together\n\n"
        f"Protocol `{protocol.name}`: {protocol.steps} steps of {protocol.batch_size} rows for every arm; mean ± "
        f"standard deviation over {len(scope.seeds)} seeds; {scores}. Questions and combinations are those of arXiv "
        "2211.08682; models, steps and rates are our own, so nothing here reproduces its tables.\n\n"
        f"Budgets: an adapter and a prefix each have about {100 * SHARE:g} % of the model's entries, the share told "
        "of the paper's, so the bottleneck is as wide as the prefix is long (16 on MiniLM); LoRA's rank 8 on two "
        "projections comes to the same there. A combination has its parts at this size, hence their entries together; "
        "LN adds every norm."
    )


def _held(compared: Comparison, scope: Scope) -> Iterator[str]:
    """Yield the paper's claims and the table of differences."""
    yield "## What holds"
    lines = [compared.wanted(bound) for bound in BOUNDS]
    lines += [_best(compared, scope, compared.wanted), *(compared.wanted(bound) for bound in BOUNDS_OF_NORMS)]
    yield listed(finding.line for finding in lines)
    if len({metric_of(task) for task in compared.tasks}) > 1 or metric_of(compared.tasks[0]).smaller:
        yield "A positive difference says that the first is better, also where a smaller score is."
    yield ABOUT_DIFFERENCES.format(also="", tasks=", ".join(compared.averaged))
    yield compared.difference_table(pair for pair in COMPARED if {side.arm for side in pair} <= {*scope.arms})


def _best(compared: Comparison, scope: Scope, ask: Callable[[Bound], Finding]) -> Finding:
    """Compare the paper's best combination with whatever else did best here; that is chosen by the same figures."""
    others = [side(arm) for arm in (*FIRST, *COMBINED) if arm in scope.arms and arm not in (BEST, "full", "head")]
    ranked, left = compared.ranked(others, side(BEST))
    if not ranked:
        return Finding(f"{BEST} above every other arm but full")
    rival = ranked[-1]
    wanted = f"above every other arm but full, of which {rival.said} is best here{not_run(left)}"
    return ask(Bound(side(BEST), rival, wanted))


def _arms(compared: Comparison, scope: Scope) -> Iterator[str]:
    for title, arms in (("Arms", (*FIRST, *COMBINED)), ("Parts of LN", ("ln", *ABLATIONS))):
        yield f"## {title}"
        lines = [[SAID.get(arm, arm), *compared.line(arm)] for arm in arms if arm in scope.arms]
        yield of_what_ran(compared.header("arm"), lines)
    said = [ABOUT_HEAD] if "head" in scope.arms else []  # a causal LM has no new one
    halves = "Halves of the layers leave out norms outside the layers, such as the embeddings'."
    yield " ".join([*said, ABOUT_RATES, halves])


def _plot(compared: Comparison, scope: Scope, path: Path) -> bool:
    """Draw the tasks of which something was run, and tell whether there are any."""
    panels = []
    for task in compared.tasks:
        groups = {
            heading: compared.dots(task, [Side(arm, arm) for arm in arms if arm in scope.arms])
            for heading, arms in (("", (*FIRST, *COMBINED)), ("Parts of LN", ABLATIONS))
        }
        drawn = {heading: dots for heading, dots in groups.items() if dots}
        if drawn:
            panels.append(Panel(task, metric_of(task).along, drawn, across=("full", "head")))
    if panels:
        plot_dots(path, panels, f"Scores after {scope.protocol.steps} steps")
    return bool(panels)


def _left_out(compared: Comparison, scope: Scope) -> Iterator[str]:
    yield "## Not run here"
    groups = {"arms": [Side(arm, arm) for arm in scope.arms]}
    yield "\n".join([*compared.not_run(groups, scope.tasks), _NEVER_RUN])


_NEVER_RUN = (
    "- Generated texts are scored by perplexity alone, on a page of their own for each causal LM (`--model`); BLEU "
    "is not computed.\n"
    "- Prefixes are trained as they are, without a reparametrising network, which would train other numbers of "
    "entries than are kept."
)


DTYPE = "float32"
MODELS = {"full": "bert-large-cased"}  # None elsewhere: MiniLM, or the protocol's own
MAIN = ("sst2", "trec")
OTHERS = (*SIMILARITY, tagging.NAME, questions.NAME)
CAUSAL = tuple(texts.TEXTS)
ARM_NAMES = (*FIRST, *ABLATIONS, *COMBINED)
COST_ROUNDS = 10


def waves(options: argparse.Namespace, protocol: Protocol) -> list[list[Cell]]:
    """Return the cells most informative first; each stage searches its learning rates first."""
    main = [task for task in options.tasks if task not in OTHERS]
    others = [[task] for task in options.tasks if task in OTHERS]
    stages = [(arms, main) for arms in (FIRST, ABLATIONS, COMBINED)]
    stages += [(FIRST, tasks) for tasks in others]
    stages += [((*ABLATIONS, *COMBINED), tasks) for tasks in others]
    finals: list[list[Cell]] = []
    for arms, tasks in stages:
        kinds = [(task, arm, DTYPE) for arm in arms if arm in options.arms for task in tasks]
        finals.append([cell for kind in kinds for cell in final_cells(protocol, *kind, options.seeds)])
    return search_first(protocol, finals)


def cost_cell(options: argparse.Namespace, protocol: Protocol) -> Cell:
    """Return the one cell that times and weighs a training step of every arm but the ablations."""
    arms = [arm for arm in ("full", "full again", *FIRST, *COMBINED) if arm in options.possible or arm == "full again"]
    task = CAUSAL[0] if set(options.tasks) <= set(CAUSAL) else MAIN[0]  # one table, whatever tasks are asked for
    name = protocol.own_rates_of or protocol.name  # rates do not change what a step costs
    place = {"protocol": name, "phase": "cost", "task": task, "dtype": DTYPE}
    return {**place, "arms": list(dict.fromkeys(arms)), "rounds": COST_ROUNDS}


def run_cell(cell: Cell, protocol: Protocol, place: Place, rates: dict[Kind, float]) -> Row:
    """Run one cell; in a fresh process, importing this brings the loaders of all tasks."""
    return classification.run_cell(cell, protocol, place, rates)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = experiment_parser("Prefix, adapters, LoRA and LayerNorm, alone and combined.")
    parser.add_argument("--arms", nargs="+", choices=ARM_NAMES, default=ARM_NAMES)
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or [*MAIN, *OTHERS]
    known = (*TEXT_COLUMNS, *SIMILARITY, *LOADERS)
    refuse_unknown(parser, options.tasks, known)
    causal = [task for task in options.tasks if task in CAUSAL]
    if causal and (len(causal) < len(options.tasks) or options.model is None or options.data_dir is None):
        parser.error(f"{causal[0]} is a task of causal LMs: give --model with one, --data-dir, and no other tasks.")
    # A causal LM is tuned as it is: there is no new head to train alone.
    options.possible = tuple(arm for arm in ARM_NAMES if not (causal and arm == "head"))
    options.arms = [arm for arm in options.arms if arm in options.possible]
    if not options.arms:
        parser.error("a causal LM gets no head, so there is nothing that the arm head would train.")
    return options


def scope(options: argparse.Namespace, protocol: Protocol, rows: Rows) -> Scope:
    """Return what is reported: what the protocol plans, and what else has been asked for or run."""
    run = [cell for cell in reported(rows, protocol, DTYPE) if cell["arm"] in ARM_NAMES]
    planned = options.tasks if set(options.tasks) <= set(CAUSAL) else (*MAIN, *OTHERS, *options.tasks)
    return Scope(
        protocol=protocol,
        tasks=tuple(dict.fromkeys((*planned, *(cell["task"] for cell in run)))),
        arms=options.possible,
        seeds=seeds_of(run),
        cost=rows.get(cost_cell(options, protocol)),
    )


def shared_rows(results: Path) -> list[Row]:
    """Return rows of two other benchmarks that count here too: cells are equal where protocol, model and arm are."""
    return [row for name in ("accuracy", "layernorm_key_component") for row in Rows(results / f"{name}.jsonl")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = parse(arguments)
    options.model, protocol = choose_model(options.model, MODELS.get(options.protocol), PROTOCOLS[options.protocol])
    rows = Rows(options.results / f"{NAME}.jsonl")
    rows.adopt(shared_rows(options.results))
    rows.adopt(shared_searches(rows, protocol))
    cost, failed = cost_cell(options, protocol), 0
    if not options.report:
        failed = run_experiment(NAME, options, protocol, rows, waves(options, protocol), run_cell)
        if options.list:
            print("The table of costs is there." if cost in rows else "The table of costs comes last, in 2 min.")
            return failed
        place = Place(options.model, options.data_dir, options.device)
        failed += run_cells([cost], rows, partial(time_methods, protocol=protocol, place=place), 1, "costs")
    write_report(rows, options.results, scope(options, protocol, rows))
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
