"""How many bytes does a saved adapter take, without a head?

python -m benchmarks.costs.size
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from torch import nn

from benchmarks.harness.arms import find_arm, own_parameters
from benchmarks.harness.claims import claim
from benchmarks.harness.models import load_body
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_script, stamp
from benchmarks.harness.tables import markdown
from benchmarks.harness.training import saved_bytes

ARM_NAMES = ("ln", "ln-weight", "ln-bias", "plain", "stock-ln", "bitfit", "lora", "road", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT = 45_000  # bytes this project allows itself for the deltas of every norm of MiniLM, in float32


def cells() -> list[Cell]:
    """Return everything that is weighed."""
    return [{"model": "minilm", "arm": arm, "dtype": dtype} for dtype in DTYPES for arm in ARM_NAMES]


def run_cell(cell: Cell, checkpoint: str) -> Row:
    """Save one adapter and weigh the file of its tensors."""
    model = find_arm(cell["arm"]).tune(load_body(checkpoint).to(DTYPES[cell["dtype"]]))
    entries = sum(parameter.numel() for parameter in own_parameters(model).values())
    return {"file_size": _file_size(model), "num_method_params": entries, **stamp(torch.device("cpu"))}


def _file_size(model: nn.Module) -> int:
    """Return the bytes of the file PEFT writes; for plain arms, of a safetensors file of the trained tensors."""
    if not isinstance(model, peft.PeftModel):
        return saved_bytes(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def report(rows: Rows) -> str:
    """The table, and whether the limit held."""
    lines: list[list[object]] = []
    for arm in ARM_NAMES:
        found = {dtype: rows.get({"model": "minilm", "arm": arm, "dtype": dtype}) for dtype in DTYPES}
        entries = [f"{row['num_method_params']:,}" for row in found.values() if row]
        sizes = [f"{row['file_size']:,}" if row else None for row in found.values()]
        lines.append([arm, entries[0] if entries else None, *sizes])
    parts = ["# Bytes of a saved adapter of all-MiniLM-L6-v2, without a head"]
    parts.append(markdown(("arm", "tuned entries", "float32 base", "bf16 base"), lines))
    ours = rows.get({"model": "minilm", "arm": "ln", "dtype": "float32"})
    if ours:
        size = ours["file_size"]
        parts.append(claim(f"ln in at most {LIMIT:,} bytes", f"{size:,}", size <= LIMIT))
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    return run_script("size", "Bytes of a saved adapter.", cells(), run_cell, report, arguments, checkpoint=True)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
