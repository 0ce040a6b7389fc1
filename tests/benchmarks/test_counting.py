"""The counters count what they say."""

import torch

from benchmarks.harness.counting import count_operations, peak_bytes
from benchmarks.harness.timing import summary, take_turns

CPU = torch.device("cpu")
ROW = 1000 * 4  # bytes of 1000 float32 numbers


def test_operations_are_counted_forward_and_backward() -> None:
    x = torch.ones(4, requires_grad=True)
    assert count_operations(lambda: x * 2 + 1) == 2
    assert count_operations(lambda: (x * 2).sum().backward()) > 2


def test_freed_tensors_do_not_add_up() -> None:
    x = torch.ones(1000)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(10):
            y = y + 1
        return y

    assert peak_bytes(chain, CPU) == 2 * ROW


def test_views_and_tensors_from_before_are_not_counted() -> None:
    x = torch.ones(1000)
    assert peak_bytes(lambda: x.view(10, 100).t().add_(1), CPU) == 0


def test_what_autograd_saves_is_counted() -> None:
    x = torch.ones(1000, requires_grad=True)

    def keep() -> None:
        y = x
        for _ in range(10):
            y = y.sin()  # saves its input
        y.sum().backward()

    assert peak_bytes(keep, CPU) >= 10 * ROW


def test_every_call_has_its_turn_and_the_reference_has_ratio_one() -> None:
    order: list[str] = []
    seconds = take_turns({name: (lambda name=name: order.append(name)) for name in "abc"}, 3, CPU, warm_up=1)
    assert order == list("abcbcacababc")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert summary(seconds, "a")["a"]["ratio"] == [1.0, 1.0, 1.0]
