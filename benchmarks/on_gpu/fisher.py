"""Fisher scores of all norms against an ordinary pass and against one backward pass per sample."""

from functools import partial

from benchmarks.costs.fisher_cost import loop, step, tuned_norms
from benchmarks.harness.counting import peak_bytes
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.timing import Call, summary, take_turns
from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.shapes import make_batch
from peft_lntune import fisher_scores


def run_cell(cell: Cell, bench: Bench) -> Row:
    """Time and weigh three ways through the same batches, the first of them twice, and compare their scores."""
    name = cell["model"]
    batches, rows, tokens = bench.size((4, 64, 128) if name == "minilm" else (2, 32, 128), (2, 3, 6))
    model = bench.model(name, cell["dtype"])
    norms = tuned_norms(model)
    data = [make_batch(name, rows, tokens, bench.device) for _ in range(batches)]
    for number, batch in enumerate(data):  # not the same tokens in all of them
        batch["input_ids"] = batch["input_ids"].roll(number, dims=1)
        if name != "minilm":
            batch["labels"] = batch["input_ids"]
    scores = partial(fisher_scores, model, data, cell["kind"], progress=False)
    calls: dict[str, Call] = {
        "step": partial(step, model, data),
        "step again": partial(step, model, data),
        "fisher": scores,
        "loop": partial(loop, model, norms, data),
    }
    seconds = take_turns(calls, bench.rounds, bench.device, warm_up=1, box=0.5 * bench.box)
    arms = summary(seconds, "step")
    for arm, call in calls.items():
        arms[arm]["rounds"] = len(seconds[arm])
        arms[arm]["accelerator_memory_max"] = peak_bytes(call, bench.device)
    ours, theirs = scores(), loop(model, norms, data)
    largest = max(float(values.max()) for values in theirs.values())
    return {
        "arms": arms,
        "loop_to_fisher": summary(seconds, "fisher")["loop"]["ratio"],
        "difference": max(float((ours[key] - values).abs().max()) for key, values in theirs.items()) / largest,
        "batches": batches,
        "rows": rows,
        "tokens": tokens,
        "weights": bench.weights(name),
    }
