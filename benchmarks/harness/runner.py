"""Runs the cells of an experiment that have no row yet, most informative first, and says what is left."""

import argparse
import datetime
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch

from benchmarks.harness.environment import device_name, write_environment
from benchmarks.harness.models import default_model
from benchmarks.harness.rows import Cell, Row, Rows

RESULTS = Path(__file__).resolve().parents[1] / "results"
Run = Callable[[Cell], Row]


def base_parser(description: str, protocols: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the options every experiment has.

    Args:
        description: for the help text.
        protocols: names to choose from, the first by default; an experiment with one protocol gives none.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--list", action="store_true", help="print the runs left and an estimate, and run nothing")
    parser.add_argument(
        "--report", action="store_true", help="write the table and the plot from the rows, and run nothing"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the rows (default: benchmarks/results)"
    )
    if protocols:
        parser.add_argument("--protocol", choices=protocols, default=protocols[0], help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side on a CPU, each with one thread")
    return parser


def run_cells(cells: Sequence[Cell], rows: Rows, run: Run, jobs: int, title: str) -> int:
    """Run every cell without a row and append its row as soon as it is known.

    A run that raises is written to the terminal and leaves no row, so it is tried again the next time.

    Args:
        cells: independent of each other, the most valuable first.
        rows: where the rows go; only this process writes.
        run: cell -> row without `cell`, importable by name since it is sent to other processes.
        jobs: processes side by side; 1 runs in this process.
        title: of the progress bar.

    Returns:
        How many runs raised.
    """
    from tqdm import tqdm

    left = [cell for cell in cells if cell not in rows]
    failed = 0
    with tqdm(total=len(left), desc=title, file=sys.stderr, disable=not left) as bar:
        for cell, outcome in _outcomes(left, run, jobs):
            bar.update()
            if isinstance(outcome, Exception):
                failed += 1
                bar.write(f"failed: {dict(cell)}: {type(outcome).__name__}: {outcome}")
                continue
            rows.append({"cell": dict(cell), **outcome})
    return failed


def stamp(device: torch.device) -> Row:
    """Return what every row says about itself: status, device and time."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"status": "success", "device": device_name(device), "created_at": now}


def format_seconds(seconds: float) -> str:
    """Return a duration in words.

    Example:
        >>> format_seconds(5400)
        '1 h 30 min'
    """
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def start_process(threads: int = 1) -> None:
    """Set up a process that trains: its threads, and no lines about fresh heads between the progress bars."""
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _start_worker() -> None:
    """Set up a process of the pool, which ends when the process that started it is killed."""
    start_process()
    end_with_parent()


def end_with_parent() -> None:
    """End this process when the process that started it is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _outcomes(cells: Sequence[Cell], run: Run, jobs: int) -> Iterator[tuple[Cell, Row | Exception]]:
    """Yield each cell with its row, or with what it raised, in the order they finish."""
    if jobs == 1:
        for cell in cells:
            yield cell, _attempt(run, cell)
        return
    with _pool(jobs) as pool:
        waiting = {pool.submit(run, cell): cell for cell in cells}
        for future in as_completed(waiting):
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield waiting[future], future.result() if error is None else error


def _attempt(run: Run, cell: Cell) -> Row | Exception:
    try:
        return run(cell)
    except Exception as error:
        return error


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Open fresh processes of one thread each; on an interrupt, cells that have not started are dropped."""
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def parse_device(options: argparse.Namespace) -> torch.device:
    """Return the device asked for; an accelerator is not shared between processes."""
    device = torch.device(options.device)
    if device.type != "cpu":
        options.jobs = 1
    return device


def run_timed(
    name: str,
    description: str,
    protocols: Sequence[str],
    cells: Callable[[str], Sequence[Cell]],
    run: Callable[..., Row],
    write_report: Callable[[Rows, Path, Sequence[Cell], str], None],
    minutes: int,
    arguments: Sequence[str] | None = None,
    default: Callable[[], str] = default_model,
) -> int:
    """The whole of a script that measures time, one cell after the other with all threads.

    Args:
        name: of the file of rows and in `environment.json`.
        description: for the help text.
        protocols: names to choose from.
        cells: name of a protocol -> what is timed.
        run: cell -> row; also takes `checkpoint`, the encoder's folder or Hub id, and `device`.
        write_report: writes the page, from rows, folder, cells and the protocol's name.
        minutes: that the first protocol takes about.
        arguments: the command line; None reads the process's own.
        default: returns the checkpoint that is used without `--model`.

    Returns:
        How many runs failed.
    """
    parser = base_parser(description, protocols)
    parser.add_argument("--model", default=None, help="folder or Hub id (default: the model that the page names)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    rows, planned = Rows(options.results / f"{name}.jsonl"), cells(options.protocol)
    device = torch.device(options.device)
    if options.list:
        left = sum(cell not in rows for cell in planned)
        print(f"{left} groups left; about {minutes} min on two quiet cores for all of them.")
        return 0
    start_process(options.threads)
    failed = 0
    if not options.report:
        write_environment(options.results / "environment.json", name, device, workers=1)
        one = partial(run, checkpoint=options.model or default(), device=device)
        failed = run_cells(planned, rows, one, jobs=1, title=name)
    write_report(rows, options.results, planned, options.protocol)
    return failed


def run_script(
    name: str,
    description: str,
    cells: Sequence[Cell],
    run: Callable[..., Row],
    report: Callable[[Rows], str],
    arguments: Sequence[str] | None = None,
    *,
    checkpoint: bool = False,
) -> int:
    """The whole of a small script: run what has no row, then write `<name>.md`.

    Args:
        name: of the files of rows and of the report.
        description: for the help text.
        cells: everything that is measured.
        run: cell -> row; with `checkpoint`, also takes the encoder's folder or Hub id as `checkpoint`.
        report: rows -> the page.
        arguments: the command line; None reads the process's own.
        checkpoint: whether the script has an option `--model`.

    Returns:
        How many runs failed.
    """
    parser = base_parser(description)
    if checkpoint:
        parser.add_argument("--model", default=None, help="encoder: folder or Hub id (default: the installed MiniLM)")
    options = parser.parse_args(arguments)
    rows = Rows(options.results / f"{name}.jsonl")
    if options.list:
        print(f"{sum(cell not in rows for cell in cells)} runs left; a few minutes at most.")
        return 0
    start_process(threads=1)
    failed = 0
    if not options.report:
        one = partial(run, checkpoint=options.model or default_model()) if checkpoint else run
        write_environment(options.results / "environment.json", name, torch.device("cpu"), workers=1)
        failed = run_cells(cells, rows, one, jobs=1, title=name)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{name}.md").write_text(report(rows), encoding="utf-8")
    return failed
