"""The process that uses the device: it can be killed when a part takes too long, and a new one goes on.

After an error of a kernel, every later call of the same process fails, and a compiler cannot be interrupted. So the
process that keeps the time and the rows never touches the device.
"""

import contextlib
import importlib.metadata
import os
import platform
import signal
import sys
import traceback
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.harness.environment import environment
from benchmarks.harness.rows import Cell, Row
from benchmarks.harness.runner import end_with_parent, stamp
from benchmarks.on_gpu.bench import Bench, SkippedError
from benchmarks.on_gpu.plan import find_part

SEED = 0
OPTIONAL = ("triton", "torchao", "bitsandbytes", "flash-attn")
LONGEST = 300  # characters of a reason: messages of compilers are pages long


class DeviceError(RuntimeError):
    """The process that uses the device does not start."""


class Worker:
    """A process that measures one cell after the other.

    Attributes:
        about: what the process said of the machine when it started; None before that.
    """

    def __init__(self, device: str, small: bool, minilm: str | None) -> None:
        """Keep what the process is started with.

        Args:
            device: such as `cuda` or `cpu`.
            small: tiny sizes.
            minilm: folder of the checkpoint, or None.
        """
        self._arguments = device, small, minilm
        self._process: Any = None
        self._pipe: Any = None
        self.about: dict[str, Any] | None = None

    def start(self, seconds: float) -> None:
        """Start a process, if none is running, and wait until it has imported everything.

        Raises:
            DeviceError: it is not ready in time, or has ended.
        """
        if self._process is not None:
            return
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=False)
        self._process.start()
        theirs.close()
        answer = self._receive(seconds)
        if not isinstance(answer, dict) or "about" not in answer:
            self.kill()
            raise DeviceError(
                f"The process that uses {self._arguments[0]} was not ready after {seconds:.0f} s. Its error is above."
            )
        self.about = answer["about"]

    def measure(self, cell: Cell, box: float, limit: float) -> Row:
        """Measure one cell.

        Args:
            cell: its coordinates.
            box: seconds after which it should come to an end.
            limit: seconds after which it is killed.

        Returns:
            The row without its cell; one of status `failed` where the process ended or was killed.
        """
        self._pipe.send((dict(cell), box))
        answer = self._receive(limit)
        if answer is None:
            alive = self._process.is_alive()
            code = self._process.exitcode
            self.kill()
            reason = f"not finished after {limit:.0f} s" if alive else f"its process ended with code {code}"
            return {"status": "failed", "reason": reason}
        if answer.pop("broken", False):
            self.kill()
        return dict(answer)

    def kill(self) -> None:
        """End the process and those that compile for it."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # where it has not yet made a group of its own
        self._process.join()
        self._pipe.close()
        self._process = None

    def _receive(self, seconds: float) -> Any:
        """Return what the process sends, or None where it does not in time."""
        try:
            return self._pipe.recv() if self._pipe.poll(max(0.0, seconds)) else None
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            return None


def versions() -> dict[str, str | None]:
    """Return the versions that a row names."""
    device = torch.device("cpu")
    found: dict[str, str | None] = {"python": platform.python_version(), **environment(device, 1)["packages"]}
    for name in OPTIONAL:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def run_cell(cell: Cell, bench: Bench) -> Row:
    """Measure one cell; what goes wrong becomes a row with the reason."""
    part = find_part(cell["part"])
    torch.manual_seed(SEED)
    begun = {"seed": SEED, "versions": versions()}
    try:
        found = part.run(cell, bench)
        return {**begun, **found, **stamp(bench.device)}
    except SkippedError as error:
        return {**begun, **stamp(bench.device), "status": "skipped", "reason": _short(error)}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reason = f"{type(error).__name__}: {_short(error)}"
        return {**begun, **stamp(bench.device), "status": "failed", "reason": reason}


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:LONGEST] if lines else ""


def _work(pipe: Any, device_name: str, small: bool, minilm: str | None) -> None:
    """Measure what the pipe asks for, until it is closed."""
    os.setsid()  # a group of its own, which is killed as one
    end_with_parent()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device(device_name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device).item()  # the context
    bench, last = Bench(device, small, minilm), None
    pipe.send({"about": environment(device, 1)})
    while True:
        try:
            cell, bench.box = pipe.recv()
        except EOFError:
            return
        if cell["part"] != last:
            bench.clear()
            last = cell["part"]
        row = run_cell(cell, bench)
        if row["status"] == "failed":
            bench.clear()  # also what the failed cell has kept
            row["broken"] = not _works(device)
        pipe.send(row)


def _works(device: torch.device) -> bool:
    """Tell whether the device still answers: after an error of a kernel it does not."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True
