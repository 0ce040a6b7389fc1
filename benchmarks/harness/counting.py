"""Figures that do not depend on the machine: dispatched operations, and bytes of tensors alive at the peak."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach the dispatcher below autograd, views included.

    Attributes:
        counts: operation name -> times.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and run it."""
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode):
    """Adds up the storages made inside the context while they are alive.

    What kernels use for themselves is not seen; what autograd saves, gradients and temporaries are.

    Attributes:
        alive: bytes alive now.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and add the storages that are new."""
        known = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in known | self._seen:
                self._add(key, tensor.untyped_storage())
        return found

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def count_operations(run: Callable[[], object]) -> int:
    """Return how many operations a call dispatches."""
    with OperationCounter() as counter:
        run()
    return counter.counts.total()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak of memory a call needs beside what was there before.

    On CUDA by the allocator's own figure, elsewhere by `PeakBytes`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with PeakBytes() as counter:
        run()
    return counter.peak


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
