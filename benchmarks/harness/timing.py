"""Times that can be compared on a machine that is not quiet: the candidates take turns, ratios are taken by turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], object]


def take_turns(
    calls: Mapping[str, Call], rounds: int, device: torch.device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time every call once in each round, starting each round with another one.

    Args:
        calls: name -> what is timed.
        rounds: how often.
        device: waited for before each reading of the clock.
        warm_up: rounds that are not counted.

    Returns:
        The seconds of each call, one a round.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _wait(device)
            begin = time.perf_counter()
            calls[name]()
            _wait(device)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
