"""Times that can be compared on a machine that is not quiet: the candidates take turns, ratios are taken by turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], object]
LEAST = 3  # counted rounds, however little time there is: fewer have no quartiles


def take_turns(
    calls: Mapping[str, Call], rounds: int, device: torch.device, warm_up: int = 2, box: float | None = None
) -> dict[str, list[float]]:
    """Time every call once in each round, starting each round with another one.

    Args:
        calls: name -> what is timed.
        rounds: how often.
        device: on CUDA, the time is that between two events of its stream; the device is idle before the first.
        warm_up: rounds that are not counted.
        box: seconds after which no round begins, once there are `LEAST`; None: all rounds are run.

    Returns:
        The seconds of each call, one a round.
    """
    begun = time.monotonic()
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        if box is not None and number >= warm_up + LEAST and time.monotonic() - begun > box:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = _seconds(calls[name], device)
            if number >= warm_up:
                seconds[name].append(taken)
    return seconds


def summary(seconds: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Return for each name the quartiles of its seconds, and of its ratios to the reference in the same round.

    Returns:
        name -> `seconds` and `ratio`, each a list of first quartile, median and third quartile.
    """
    found = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[reference], strict=True)]
        found[name] = {"seconds": _quartiles(values), "ratio": _quartiles(ratios)}
    return found


def _quartiles(values: list[float]) -> list[float]:
    return [round(value, 5) for value in statistics.quantiles(values, n=4, method="inclusive")]


def _seconds(call: Call, device: torch.device) -> float:
    """Time one call from an idle device until the device has finished, launching included."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1000
