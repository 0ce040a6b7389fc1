"""The tables and the plot of `unified_framework.py`, from its rows and those it shares with other benchmarks."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.arms import SHARE
from benchmarks.harness.classification import Protocol
from benchmarks.harness.comparison import ABOUT_DIFFERENCES, ABOUT_HEAD, ABOUT_RATES, Bound, Comparison, Side, not_run
from benchmarks.harness.finals import Finals
from benchmarks.harness.metrics import metric_of
from benchmarks.harness.plots import SMALLEST, Curves, plot_curves
from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.tables import NOT_RUN, cost_table, markdown

NAME = "unified_framework"
AVERAGED = ("sst2", "trec")  # where they are reported, averages are over these alone: the other tasks come after them
BEST = "prefix+mha-adapter+ln"  # of the paper's combinations
# In order of worth, which is the order they are run in.
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


def write_report(rows: Rows, results: Path, scope: Scope) -> None:
    """Write the page and its plot."""
    averaged = [task for task in scope.tasks if task in AVERAGED] or list(scope.tasks)
    compared = Comparison(Finals(rows, scope.protocol, scope.seeds), scope.tasks, averaged)
    stem = scope.protocol.stem(NAME)
    results.mkdir(parents=True, exist_ok=True)
    parts = [_title(scope), *_held(compared, scope), *_arms(compared, scope), *_costs(scope.cost)]
    if _plot(compared, scope, results / f"{stem}.png"):
        parts.append(f"![Scores against tuned entries]({stem}.png)")
        parts.append("Arms of like sizes stand a little beside each other. The head alone stands in the table only.")
    (results / f"{stem}.md").write_text("\n\n".join([*parts, *_left_out()]) + "\n", encoding="utf-8")


def _title(scope: Scope) -> str:
    protocol = scope.protocol
    scores = ", ".join(f"{task} by {metric_of(task).said}" for task in scope.tasks)
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
    yield "## What held"
    lines = [compared.wanted(bound) for bound in BOUNDS]
    lines += [_best(compared, scope), *(compared.wanted(bound) for bound in BOUNDS_OF_NORMS)]
    yield "\n".join(lines)
    if len({metric_of(task) for task in scope.tasks}) > 1 or metric_of(scope.tasks[0]).smaller:
        yield "A positive difference says that the first is better, also where a smaller score is."
    yield ABOUT_DIFFERENCES.format(also="", tasks=", ".join(compared.averaged))
    yield compared.difference_table(pair for pair in COMPARED if {side.arm for side in pair} <= {*scope.arms})


def _best(compared: Comparison, scope: Scope) -> str:
    """Compare the paper's best combination with whatever else did best here; that is chosen by the same figures."""
    others = [side(arm) for arm in (*FIRST, *COMBINED) if arm in scope.arms and arm not in (BEST, "full", "head")]
    ranked, left = compared.ranked(others, side(BEST))
    if not ranked:
        return f"- Wanted: {BEST} above every other arm but full. Not measured yet."
    rival = ranked[-1]
    wanted = f"above every other arm but full, of which {rival.said} is best here{not_run(left)}"
    return compared.wanted(Bound(side(BEST), rival, wanted))


def _arms(compared: Comparison, scope: Scope) -> Iterator[str]:
    for title, arms in (("Arms", (*FIRST, *COMBINED)), ("Parts of LN", ("ln", *ABLATIONS))):
        yield f"## {title}"
        lines = [[SAID.get(arm, arm), *compared.line(arm)] for arm in arms if arm in scope.arms]
        yield markdown(compared.header("arm"), lines)
    said = [ABOUT_HEAD] if "head" in scope.arms else []  # a causal LM has no new one
    halves = "Halves of the layers leave out norms outside the layers, such as the embeddings'."
    yield " ".join([*said, ABOUT_RATES, halves])


def _costs(row: Row | None) -> Iterator[str]:
    yield "## Time and memory against full fine-tuning"
    if row is None:
        yield f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}."
        return
    yield (
        f"A training step (forward, backward, AdamW) on the {row['rows']} longest training rows of "
        f"{row['cell']['task']}, {row['tokens']} tokens with padding, timed in turns, {row['cell']['rounds']} rounds; "
        "ratios are taken within a round. `full again` is full a second time: how far its ratio is from 1 is noise. "
        "The peak is of what the step makes; weights, and AdamW's 8 bytes for each trained entry, are not in it. "
        f"Measured on {row['device']}."
    )
    yield cost_table(row["arms"])


def _plot(compared: Comparison, scope: Scope, path: Path) -> bool:
    """Draw the tasks of which something was run, and tell whether there are any."""
    panels: dict[str, Curves] = {}
    for task in scope.tasks:
        points = {arm: compared.point(task, arm) for arm in scope.arms if arm != "head"}
        curves = {arm: [point] for arm, point in points.items() if point}
        if curves:
            panels[task] = curves
    if panels:
        title = "Scores at equal steps: mean, worst and best seed"
        plot_curves(path, panels, title, bands=["full"], smallest=SMALLEST)
    return bool(panels)


def _left_out() -> Iterator[str]:
    yield "## Not run here"
    yield (
        "- Every cell above that says so.\n"
        "- Generated texts are scored by perplexity alone, on a page of their own for each causal LM (`--model`); BLEU "
        "is not computed.\n"
        "- Prefixes are trained as they are, without a reparametrising network, which would train other numbers of "
        "entries than are kept."
    )
