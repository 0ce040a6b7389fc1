"""Batches with rows of every task, in which each task sees the same batches as alone."""

from collections.abc import Iterator, Sequence

import torch

from peft_lntune.errors import ConfigError

__all__ = ["TaskBatches"]


class TaskBatches:
    """A batch sampler with the same number of rows of each task in every batch, until a task has no rows left.

    A task without rows left is absent from the rest of the epoch. The order of a task's rows depends only on the seed,
    the epoch and the number of its rows. So it would see the same batches if it trained alone, and tasks with the same
    rows see them in the same order.

    Args:
        tasks: the task of each row of the data set.
        rows: number of rows per task and batch; the last batch of a task may have fewer.
        seed: seed of the order.
        shuffle: whether to shuffle the rows, again in each epoch.

    Raises:
        ConfigError: `rows` is not a positive number, or the data set is empty.

    Example:
        >>> list(TaskBatches(["a", "b", "a", "a"], rows=2, shuffle=False))
        [[0, 2, 1], [3]]
        >>> TaskBatches(["a", "b", "a", "a"], rows=2).steps
        {'a': 2, 'b': 1}
    """

    def __init__(self, tasks: Sequence[str], rows: int, seed: int = 0, shuffle: bool = True) -> None:
        if type(rows) is not int or rows < 1:
            raise ConfigError(f"rows={rows!r} should be a number of rows of each task, at least 1.")
        self.rows, self.seed, self.shuffle, self.epoch = rows, seed, shuffle, 0
        self._places: dict[str, list[int]] = {}
        for place, task in enumerate(tasks):
            self._places.setdefault(task, []).append(place)
        if not self._places:
            raise ConfigError("the data set has no rows, so there are no batches.")

    @property
    def steps(self) -> dict[str, int]:
        """For each task the number of batches of an epoch in which it has rows."""
        return {task: -(-len(places) // self.rows) for task, places in self._places.items()}

    @property
    def sampler(self) -> "TaskBatches":
        """The object whose `set_epoch` accelerate calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass.

        Args:
            epoch: number of the epoch, from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return max(self.steps.values())

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = [self._shuffled(places) for places in self._places.values()]
        for start in range(0, len(self) * self.rows, self.rows):
            yield [place for places in shuffled for place in places[start : start + self.rows]]

    def _shuffled(self, places: list[int]) -> list[int]:
        if not self.shuffle:
            return places
        # Not seed + epoch: the second epoch of one seed would equal the first of the next seed.
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        return [places[place] for place in torch.randperm(len(places), generator=generator).tolist()]
