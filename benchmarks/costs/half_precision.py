"""Over a bf16 base: which share of the tuned entries moves at all, at which learning rate?

python -m benchmarks.costs.half_precision
"""

import sys

import torch
from torch import Tensor

from benchmarks.harness.arms import find_arm, own_parameters
from benchmarks.harness.models import tiny_llama
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_script, stamp
from benchmarks.harness.tables import markdown

ARM_NAMES = ("ln", "plain", "stock-ln")
RATES = (1e-4, 1e-3, 3e-3, 1e-2)
STEPS = 50


def cells() -> list[Cell]:
    """Return every arm at every learning rate."""
    return [{"model": "tiny-llama", "arm": arm, "learning_rate": rate} for arm in ARM_NAMES for rate in RATES]


def run_cell(cell: Cell) -> Row:
    """Train on random tokens with AdamW, and count the entries that are not where they started."""
    model = find_arm(cell["arm"]).tune(tiny_llama(layers=2, dtype="bfloat16")).train()
    tuned: dict[str, Tensor] = own_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in tuned.items()}
    optimizer = torch.optim.AdamW(tuned.values(), lr=cell["learning_rate"], weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(1, 256, (8, 32), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = sum(int((parameter != before[name]).sum()) for name, parameter in tuned.items())
    entries = sum(parameter.numel() for parameter in tuned.values())
    return {"steps": STEPS, "moved": moved / entries, "num_method_params": entries, **stamp(torch.device("cpu"))}


def report(rows: Rows) -> str:
    """The table."""
    lines: list[list[object]] = []
    for arm in ARM_NAMES:
        found = [rows.get({"model": "tiny-llama", "arm": arm, "learning_rate": rate}) for rate in RATES]
        lines.append([arm, *(f"{row['moved']:.0%}" if row else None for row in found)])
    header = ("arm", *(f"lr {rate:g}" for rate in RATES))
    title = f"# Share of the norms' entries that moved in {STEPS} AdamW steps, tiny Llama in bf16"
    return "\n\n".join([title, markdown(header, lines)]) + "\n"


if __name__ == "__main__":
    sys.exit(min(run_script("half_precision", "What moves over a bf16 base.", cells(), run_cell, report), 1))
