"""On how many architectures does a config without arguments find the norms, and how many of them?

python -m benchmarks.targets
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import peft
import torch

from benchmarks.harness.environment import write_environment
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import base_parser, run_cells, stamp, start_process
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


def write_report(rows: Rows, results: Path) -> None:
    """Write `targets.md`."""
    found = {cell["family"]: {} for cell in cells()}  # type: dict[str, dict[str, Row]]
    for cell in cells():
        row = rows.get(cell)
        if row:
            found[cell["family"]][cell["config"]] = row
    lines: list[list[object]] = []
    for family, by in found.items():
        norms = next((row["norms"] for row in by.values()), None)
        lines.append([family, norms, *(by[name]["tuned"] if name in by else None for name in CONFIGS)])
    whole = [sum(c in by and by[c]["tuned"] == by[c]["norms"] for by in found.values()) for c in CONFIGS]
    some = [sum(c in by and by[c]["tuned"] > 0 for by in found.values()) for c in CONFIGS]
    parts = ["# Norms that `LNTuningConfig()` tunes without being told where"]
    parts.append(markdown(("model", "norms", *CONFIGS), lines))
    for name, all_of, any_of in zip(CONFIGS, whole, some, strict=True):
        parts.append(f"- {name}: every norm on {all_of} of {len(found)}, at least one on {any_of}.")
    (results / "targets.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many runs failed."""
    options = base_parser("Norms found without being told where.").parse_args(arguments)
    rows = Rows(options.results / "targets.jsonl")
    if options.list:
        print(f"{sum(cell not in rows for cell in cells())} runs left; about 1 min.")
        return 0
    start_process(threads=1)
    failed = 0
    if not options.report:
        write_environment(options.results / "environment.json", "targets", torch.device("cpu"), workers=1)
        failed = run_cells(cells(), rows, run_cell, jobs=1, title="targets")
    write_report(rows, options.results)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
