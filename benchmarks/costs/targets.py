"""On how many architectures does a config without arguments find the norms, and how many of them?

python -m benchmarks.costs.targets
"""

import sys

import peft
import torch

from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import run_script, stamp
from benchmarks.harness.tables import markdown
from peft_lntune import LNTuningConfig, find_norms
from tests.cases import FAMILIES, build

CONFIGS = {"peft_lntune": LNTuningConfig, "peft": peft.LNTuningConfig}


def cells() -> list[Cell]:
    """Return everything that is counted: each family of tiny random models that the tests use, under each config."""
    return [{"family": family, "config": config} for family in FAMILIES for config in CONFIGS]


def run_cell(cell: Cell) -> Row:
    """Count the norms that the config tunes; none where it raises for want of target modules."""
    model = build(cell["family"])
    norms = find_norms(model)
    try:
        tuned = peft.get_peft_model(model, CONFIGS[cell["config"]]())
        wrapped = {name for name, module in tuned.get_base_model().named_modules() if hasattr(module, "base_layer")}
    except ValueError:
        wrapped = set()
    return {"norms": len(norms), "tuned": len(wrapped & norms.keys()), **stamp(torch.device("cpu"))}


def report(rows: Rows) -> str:
    """The table, and how often every norm was found."""
    found = {family: {name: rows.get({"family": family, "config": name}) for name in CONFIGS} for family in FAMILIES}
    lines: list[list[object]] = []
    for family, by in found.items():
        norms = next((row["norms"] for row in by.values() if row), None)
        lines.append([family, norms, *(row["tuned"] if row else None for row in by.values())])
    parts = ["# Norms that `LNTuningConfig()` tunes without being told where"]
    parts.append(markdown(("model", "norms with parameters", *CONFIGS), lines))
    tunable = {family: by for family, by in found.items() if any(row and row["norms"] for row in by.values())}
    for name in CONFIGS:
        counted = [row for row in (by[name] for by in tunable.values()) if row]
        every, some = sum(row["tuned"] == row["norms"] for row in counted), sum(row["tuned"] > 0 for row in counted)
        parts.append(f"- {name}: every norm on {every} of {len(tunable)} that have norms to tune, some on {some}.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(min(run_script("targets", "Norms found without being told where.", cells(), run_cell, report), 1))
