"""Training: which entries move over a base in half precision, and what a step costs beside other methods."""

from functools import partial
from typing import Any

import torch

from benchmarks.harness.arms import find_arm, own_parameters
from benchmarks.harness.costs import in_turns
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.timing import Call
from benchmarks.harness.training import launch_step, make_optimizer
from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.shapes import make_batch

ARMS = ("plain", "plain again", "ln", "stock-ln", "lora", "road")
MOVING = ("ln", "stock-ln", "plain")
# AdamW's step does not depend on the scale of the loss; gradients in float16 do not vanish with this one.
LOSS_SCALE = 1024.0


def moving(cell: Cell, bench: Bench) -> Row:
    """Train on random tokens with AdamW, and count the entries that have moved and are finite."""
    steps, rows, tokens = bench.size(20, 3), bench.size(8, 2), bench.size(128, 6)
    model = find_arm(cell["arm"]).tune(bench.model(cell["model"], cell["dtype"])).train()
    tuned = own_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in tuned.items()}
    optimizer = torch.optim.AdamW(tuned.values(), lr=cell["learning_rate"], weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = make_batch(cell["model"], rows, tokens, bench.device)
        order = torch.randperm(tokens, generator=generator).to(bench.device)
        batch["input_ids"] = batch["input_ids"][:, order]
        (LOSS_SCALE * model(**batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    entries = sum(parameter.numel() for parameter in tuned.values())
    moved = sum(int(((p != before[name]) & p.isfinite()).sum()) for name, p in tuned.items())
    broken = sum(int((~p.isfinite()).sum()) for p in tuned.values())
    return {
        "steps": steps,
        "loss_scale": LOSS_SCALE,
        "num_method_params": entries,
        "moved": moved / entries,
        "not_finite": broken / entries,
    }


def step_call(model: Any, batch: dict[str, Any]) -> Call:
    """Return a whole training step (forward, backward, clipping, AdamW) that does not wait for the device."""
    model.train()
    return partial(launch_step, model, batch, make_optimizer(model, 1e-5))


def cost(cell: Cell, bench: Bench) -> Row:
    """Time and weigh training steps of all arms in turns."""
    name = cell["model"]
    decoder = name not in ("minilm", "bert-large")
    rows, tokens = bench.size((4, 512) if decoder else (32, 128), (2, 6))
    batch = make_batch(name, rows, tokens, bench.device)
    calls: dict[str, Call] = {}
    trained = {}
    for arm in ARMS:
        model = find_arm(arm.removesuffix(" again")).tune(bench.model(name, cell["dtype"])).to(bench.device)
        trained[arm] = sum(parameter.numel() for parameter in own_parameters(model).values())
        calls[arm] = step_call(model, batch)
    arms = in_turns(calls, bench.rounds, bench.device, box=0.6 * bench.box)
    return {
        "arms": arms,
        "rows": rows,
        "tokens": tokens,
        "num_method_params": trained,
        "weights": bench.weights(name),
    }
