"""What a training step of each method costs on a task, in time and in memory: the methods take turns."""

from collections.abc import Iterator

import torch

from benchmarks.harness.classification import Place, Protocol, Tuner, by_name, load_base
from benchmarks.harness.costs import in_turns, training_call
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.runner import stamp
from benchmarks.harness.splits import ordered
from benchmarks.harness.tables import NOT_RUN, cost_table
from benchmarks.harness.tasks import load_task
from benchmarks.harness.timing import Call


def time_methods(cell: Cell, protocol: Protocol, place: Place, tune: Tuner = by_name, warm_up: int = 2) -> Row:
    """Time and weigh a training step of every method, on the batch of the longest training rows.

    Args:
        cell: the task, the methods as `arms` (`full again` is `full` a second time), `rounds`, and `tokens` where rows
            are to be no longer than that.
        protocol: what is equal for all methods.
        place: model, data and device.
        tune: makes a base model ready to train.
        warm_up: rounds that are not counted.
    """
    task, device = load_task(cell["task"], place.data_dir, place.model), torch.device(place.device)
    lengths, most = task.train.lengths, cell.get("tokens")
    whole = [rows for rows in ordered(task.train, protocol.batch_size) if len(rows) == protocol.batch_size]
    longest = [rows for rows in whole if most is None or lengths[rows[-1]] <= most][-1]
    batch = task.train.batch(longest, device)
    calls: dict[str, Call] = {}
    for name in cell["arms"]:
        own = {**cell, "seed": 0, "arm": name.removesuffix(" again")}
        calls[name] = training_call(tune(load_base(own, protocol, place, task), own, task).to(device), batch)
    shape = {"rows": len(longest), "tokens": batch["input_ids"].shape[1]}
    return {"arms": in_turns(calls, cell["rounds"], device, warm_up=warm_up), **shape, **stamp(device)}


def cost_section(row: Row | None) -> Iterator[str]:
    """Yield the section of a page that has the costs of methods relative to full fine-tuning."""
    yield "## Time and memory against full fine-tuning"
    if row is None:
        yield f"{NOT_RUN[0].upper()}{NOT_RUN[1:]}."
        return
    limit = f" of at most {row['cell']['tokens']} tokens" if "tokens" in row["cell"] else ""
    yield (
        f"A training step (forward, backward, AdamW) on the {row['rows']} longest training rows{limit} of "
        f"{row['cell']['task']}, {row['tokens']} tokens with padding, timed in turns, {row['cell']['rounds']} rounds; "
        "ratios are taken within a round. `full again` is full a second time: how far its ratio is from 1 is noise. "
        "The peak is of what the step makes; weights, and AdamW's 8 bytes for each trained entry, are not in it. "
        f"Measured on {row['device']}."
    )
    yield cost_table(row["arms"])
