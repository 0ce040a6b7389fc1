"""What do deltas on modules cost, compared with `requires_grad` on the same parameters? And what does a supermask?

python -m benchmarks.costs.module_cost
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from benchmarks.harness.arms import own_parameters
from benchmarks.harness.costs import in_turns, training_call
from benchmarks.harness.made import made_batch
from benchmarks.harness.models import head_modules, load_classifier
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_timed, stamp
from benchmarks.harness.tables import NOT_RUN, cost_table
from peft_lntune import ModuleTuningConfig, SupermaskConfig, plan

# What is tuned, as fields of a ModuleTuningConfig.
GROUPS: dict[str, dict[str, Any]] = {
    "query": {"components": ["query"]},
    "ffn": {"components": ["ffn_up", "ffn_down"]},
    "bitfit": {"preset": "bitfit"},
    "l0-close": {"preset": "l0-close"},
}
# Masks are for matrices, so only where the group has nothing else.
MASKED = ("query", "ffn")
PROTOCOLS: dict[str, dict[str, Any]] = {
    "cpu": {"rounds": 20, "batch": 16, "tokens": 32},
    "gpu": {"rounds": 50, "batch": 32, "tokens": 128},
}


def cells(protocol: str) -> list[Cell]:
    """Return the groups that are timed together, turn by turn."""
    return [{"protocol": protocol, "model": "minilm", "tuned": group} for group in GROUPS]


def run_cell(cell: Cell, checkpoint: str, device: torch.device) -> Row:
    """Time and weigh a training step of the same parameters, tuned in both ways."""
    protocol, fields = PROTOCOLS[cell["protocol"]], GROUPS[cell["tuned"]]
    arms = {"plain": plain, "plain again": plain, "deltas": deltas}
    if cell["tuned"] in MASKED:
        arms["supermask"] = supermask
    batch = made_batch(protocol["batch"], protocol["tokens"], device)
    calls: dict[str, Callable[[], object]] = {}
    entries = {}
    for name, tune in arms.items():
        model = load_classifier(checkpoint, num_labels=2, dtype="float32", seed=0, dropout=0.0).to(device)
        model = tune(model, fields)
        entries[name] = sum(parameter.numel() for parameter in own_parameters(model).values())
        calls[name] = training_call(model, batch)
    base = sum(parameter.numel() for parameter in model.parameters()) - entries[name]
    measured = in_turns(calls, protocol["rounds"], device)
    return {"arms": measured, "num_method_params": entries, "num_base_params": base, **protocol, **stamp(device)}


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the head's modules as `modules_to_save` takes them."""
    return [name.split(".")[-1] for name in head_modules(model)]


def plain(model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    """Train the parameters that a config chooses, and the head, by `requires_grad`."""
    parts = plan(model, ModuleTuningConfig(**fields, modules_to_save=head_names(model))).parts
    chosen = {f"{name}.{parameter}" for name, part in parts.items() for parameter in part.entries}
    heads = tuple(f"{name}." for name in head_modules(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen or name.startswith(heads))
    return model


def deltas(model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    """Train the same as deltas."""
    return peft.get_peft_model(model, ModuleTuningConfig(**fields, modules_to_save=head_names(model)))


def supermask(model: nn.Module, fields: dict[str, Any]) -> nn.Module:
    """Train a score for each entry of the weights among them."""
    return peft.get_peft_model(model, SupermaskConfig(**fields, modules_to_save=head_names(model)))


def write_report(rows: Rows, results: Path, planned: Sequence[Cell], protocol: str) -> None:
    """Write `module_cost.md`, for another protocol than the CPU's with its name in it."""
    size = PROTOCOLS[protocol]
    parts = [
        "# What tuning modules costs",
        f"all-MiniLM-L6-v2 with a head, {size['batch']} rows of {size['tokens']} tokens, float32: a whole training "
        "step with AdamW. `plain` is `requires_grad` on the same parameters; `again` is the same a second time: how "
        "far its ratio is from 1 is noise. `supermask` trains a score for each weight among them, and no bias. Arms "
        "are timed in turns; ratios are taken within a round. The peak is of a step, so it holds activations, "
        "gradients and sums of base and delta while they are used, but neither parameters nor AdamW's two moments, "
        "which come to 8 bytes a tuned entry for every arm.",
    ]
    for cell in planned:
        row = rows.get(cell)
        parts.append(f"## {cell['tuned']}")
        parts += [NOT_RUN] if row is None else [cost_table(row["arms"]), _memory(row)]
    results.mkdir(parents=True, exist_ok=True)
    stem = "module_cost" if protocol == "cpu" else f"module_cost_{protocol}"
    (results / f"{stem}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _memory(row: Row) -> str:
    """What the deltas take beside the base, which the plain lines change in place, by arithmetic and as measured."""
    tuned, arms = row["num_method_params"]["deltas"], row["arms"]
    more = arms["deltas"]["accelerator_memory_max"] - arms["plain"]["accelerator_memory_max"]
    return (
        f"{tuned:,} tuned entries. Beside the base that stays as it is, deltas take 4 bytes an entry "
        f"({4 * tuned / 1e6:.1f} MB), and in a step {more / 1e6:.1f} MB more than plain lines at the peak "
        f"({more / tuned:.1f} bytes an entry; the backward pass makes the sum of base and delta again)."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    description = "Time and memory of tuning modules as deltas, against requires_grad on the same parameters."
    return run_timed("module_cost", description, tuple(PROTOCOLS), cells, run_cell, write_report, 3, arguments)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
