"""A killed run leaves its rows and no process behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.harness.rows import Rows

SCRIPT = """
import os, sys, time
from pathlib import Path
from benchmarks.harness.rows import Rows
from benchmarks.harness.runner import run_cells

def run(cell):
    Path(sys.argv[1], f"{os.getpid()}.pid").touch()
    time.sleep(0 if cell["seed"] == 0 else 600)
    return {}

if __name__ == "__main__":
    run_cells([{"seed": seed} for seed in range(4)], Rows(Path(sys.argv[1], "rows.jsonl")), run, 2, "kill")
"""
PATIENCE = 60  # seconds; starting two processes that import torch takes most of it on a busy machine


@pytest.mark.full
def test_a_killed_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        assert _wait_for(lambda: len(Rows(tmp_path / "rows.jsonl")) == 1 and len(_workers(tmp_path)) == 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _wait_for(lambda: not any(_is_alive(worker) for worker in _workers(tmp_path)))
    assert [row["cell"] for row in Rows(tmp_path / "rows.jsonl")] == [{"seed": 0}]


def _workers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def _wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False
