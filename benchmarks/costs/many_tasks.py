"""What does a training step of many tasks in one batch cost, compared with one task? Run it when nothing else runs.

python -m benchmarks.costs.many_tasks
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from benchmarks.harness.claims import time_claim
from benchmarks.harness.costs import in_turns, training_call
from benchmarks.harness.counting import count_operations
from benchmarks.harness.made import made_batch
from benchmarks.harness.models import load_classifier
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_timed, stamp
from benchmarks.harness.tables import NOT_RUN, cost_table, markdown
from benchmarks.harness.training import CLIP
from peft_lntune import LNTuningConfig, ManyTasks

TASKS = (1, 8, 32)
HEADS = {"classifier": ["classifier"], "pooler and classifier": ["pooler", "classifier"]}
WANTED = 1.10  # of the time of one task, set before anything was measured
PROTOCOLS: dict[str, dict[str, Any]] = {
    "cpu": {"rounds": 20, "batch": 32, "tokens": 32},
    "gpu": {"rounds": 50, "batch": 32, "tokens": 128},
}


def cells(protocol: str) -> list[Cell]:
    """Return the heads that are trained beside the norms."""
    return [{"protocol": protocol, "model": "minilm", "head": head} for head in HEADS]


def run_cell(cell: Cell, checkpoint: str, device: torch.device) -> Row:
    """Time, weigh and count a whole step: forward, backward, clipping, AdamW."""
    protocol, heads = PROTOCOLS[cell["protocol"]], HEADS[cell["head"]]
    batch = made_batch(protocol["batch"], protocol["tokens"], device)
    one = training_call(tuned(checkpoint, heads, 1).to(device), batch)
    calls: dict[str, Callable[[], object]] = {"one": one, "one again": one}
    entries = 0
    for count in TASKS:
        tasks = ManyTasks(tuned(checkpoint, heads, count).to(device))
        entries = tasks.entries
        calls[said(count)] = many_call(tasks, batch)
    measured = in_turns(calls, protocol["rounds"], device)
    operations = {name: count_operations(call) for name, call in calls.items()}
    return {"arms": measured, "operations": operations, "entries": entries, **protocol, **stamp(device)}


def tuned(checkpoint: str, heads: Sequence[str], tasks: int) -> PeftModel:
    """A classifier without dropout, with so many adapters of all norms and a head."""
    model = load_classifier(checkpoint, num_labels=2, dtype="float32", seed=0, dropout=0.0)
    config = LNTuningConfig(modules_to_save=list(heads))
    peft_model = get_peft_model(model, config, adapter_name="0")
    for number in range(1, tasks):
        peft_model.add_adapter(str(number), LNTuningConfig(modules_to_save=list(heads)))
    return peft_model.train()


def many_call(tasks: ManyTasks, batch: dict[str, Tensor]) -> Callable[[], object]:
    """Return a whole step of all tasks, with rows in turn; its losses are read, as those of one task are."""
    names = [tasks.names[row % len(tasks)] for row in range(len(batch["labels"]))]
    optimizer = tasks.optimizer(torch.optim.AdamW, lr=1e-5, weight_decay=0.0, fused=True, max_grad_norm=CLIP)

    def call() -> None:
        with tasks.route(names):
            losses = tasks.losses(tasks.model(**batch), batch)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        total.item()

    return call


def said(tasks: int) -> str:
    """The name of an arm."""
    return "1 task" if tasks == 1 else f"{tasks} tasks"


def write_report(rows: Rows, results: Path, planned: Sequence[Cell], protocol: str) -> None:
    """Write `many_tasks.md`, for another protocol than the CPU's with its name in it."""
    size = PROTOCOLS[protocol]
    parts = [
        "# Many tasks in one batch",
        f"all-MiniLM-L6-v2 with a head, {size['batch']} rows of {size['tokens']} tokens, float32: a whole training "
        "step with clipping and AdamW. `one` is one adapter in PEFT's way with torch's AdamW; `again` is the same a "
        "second time: how far its ratio is from 1 is noise. The others are `ManyTasks` with the same rows in turn "
        "among so many tasks, each with an adapter, a head and an AdamW of its own. Arms are timed in turns; ratios "
        "are taken within a round. The peak is of a step, beside parameters and AdamW's moments.",
    ]
    for cell in planned:
        row = rows.get(cell)
        parts.append(f"## Norms, {cell['head']}")
        parts += [NOT_RUN] if row is None else [cost_table(row["arms"]), _operations(row), _verdict(row)]
    results.mkdir(parents=True, exist_ok=True)
    stem = "many_tasks" if protocol == "cpu" else f"many_tasks_{protocol}"
    (results / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _operations(row: Row) -> str:
    counts = {name: count for name, count in row["operations"].items() if name != "one again"}
    lines = [[name, f"{count:,}", f"{count / counts['one']:.3f}"] for name, count in counts.items()]
    table = markdown(("arm", "dispatched operations of a step", "ratio"), lines)
    return f"{table}\n\nA task takes {row['entries']:,} entries: 16 bytes each for value, gradient and two moments."


def _verdict(row: Row) -> str:
    noise = row["arms"]["one again"]["ratio"]
    wanted = f"at most {WANTED:.2f} of the time of one"
    return "\n".join(
        time_claim(f"{said(count)}: {wanted}", row["arms"][said(count)]["ratio"], noise, WANTED) for count in TASKS
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    description = "Time, memory and operations of a training step of many tasks in one batch, against one task."
    return run_timed("many_tasks", description, tuple(PROTOCOLS), cells, run_cell, write_report, 5, arguments)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
