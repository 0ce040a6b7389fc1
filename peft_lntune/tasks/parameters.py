"""The trained values of all tasks: leaf tensors `(tasks, k, *shape)`, and which of their entries each task trains."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from peft_lntune.routing.gather import gather_rows
from peft_lntune.routing.stacks import Stack, Stacks, as_rows, one_dtype

__all__ = ["TaskParameters"]


class TaskParameters:
    """Named tensors of many tasks in stacks with gradients, one row per task.

    Args:
        base: for each name the tensor of tasks that do not train it.
        own: for each task its own tensors by name.
        tuned: for each task bool masks by name, True for entries that it trains; tensors without a mask are not
            trained. None: each task trains all its own tensors.

    Attributes:
        stacks: leaf tensors, whose `values.grad` sums the gradients of backward passes.
        reached: for each stack the tasks whose rows a backward pass has reached since the last `forget`.

    Example:
        >>> own = {"a.bias": torch.tensor([1.0, 2.0])}
        >>> masks = [{"a.bias": torch.tensor([True, False])}, {}]
        >>> parameters = TaskParameters({"a.bias": torch.zeros(2)}, [own, {}], masks)
        >>> [rows] = parameters.gather([0, 1, 0], torch.tensor([0, 1, 0]))
        >>> rows.values.sum().backward()
        >>> parameters.stacks[0].values.grad.tolist(), parameters.reached
        ([[[2.0, 0.0]], [[0.0, 0.0]]], [{0, 1}])
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        own: Sequence[Mapping[str, Tensor]],
        tuned: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        # The widest dtype of any task, since the deltas of a base in half precision are in float32.
        like = {
            name: one_dtype([task[name].detach() for task in own if name in task] or [tensor])[0].to(tensor.device)
            for name, tensor in base.items()
        }
        self._stacks = Stacks(like, len(own))
        self._stacks.write(range(len(own)), as_rows(self._stacks, [{**base, **task} for task in own]))
        self._own = [set(task) for task in own]
        if tuned is None:
            tuned = [{name: torch.ones(value.shape, dtype=torch.bool) for name, value in task.items()} for task in own]
        self._outside = [self._untuned(stack, tuned) for stack in self._stacks]
        self.reached: list[set[int]] = [set() for _ in self._stacks]
        self._require_grad()

    def owns(self, number: int, slot: int) -> bool:
        """Whether a task has its own tensors in a stack.

        Args:
            number: number of the stack.
            slot: slot of the task.

        Returns:
            True where it has.
        """
        return not self._own[slot].isdisjoint(self.stacks[number].names)

    def gather(self, slots: Sequence[int], index: Tensor, reached: Callable[[], None] | None = None) -> list[Stack]:
        """The rows of a batch, with gradients.

        Args:
            slots: slot of the task of each row.
            index: the slots as a tensor, `(B,)` int64.
            reached: called in each backward pass that reaches the rows.

        Returns:
            Stacks with values `(B, k, *shape)`.
        """
        gathered = []
        for number, (names, values) in enumerate(self.stacks):
            mark = partial(self._mark, number, frozenset(slots), reached)
            one_each = list(slots) == list(range(len(values)))
            rows = gather_rows(values, None if one_each else index.to(values.device), self._outside[number], mark)
            gathered.append(Stack(names, rows))
        return gathered

    def read(self, slot: int) -> dict[str, Tensor]:
        """Copy the own tensors of a task.

        Args:
            slot: slot of the task.

        Returns:
            Copies by name.
        """
        return {
            name: value.detach().clone()
            for names, values in self.stacks
            for name, value in zip(names, values[slot], strict=True)
            if name in self._own[slot]
        }

    @torch.no_grad()
    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the own tensors of a task in place.

        Args:
            slot: slot of the task.
            tensors: the values by name.
        """
        for names, values in self.stacks:
            for name, place in zip(names, values[slot], strict=True):
                if name in self._own[slot]:
                    place.copy_(tensors[name])

    def forget(self) -> None:
        """Drop all gradients, and mark no task as reached."""
        for (_, values), reached in zip(self.stacks, self.reached, strict=True):
            values.grad = None
            reached.clear()

    def follow(self, like: Mapping[str, Tensor]) -> bool:
        """Move to the devices of other tensors.

        Args:
            like: tensors with the names of the stacks.

        Returns:
            Whether any stack was moved.
        """
        if all(values.device == like[names[0]].device for names, values in self.stacks):
            return False
        with torch.no_grad():
            self._stacks.follow(like)
        self._require_grad()
        self._outside = [
            None if outside is None else outside.to(stack.values.device)
            for outside, stack in zip(self._outside, self.stacks, strict=True)
        ]
        return True

    def _require_grad(self) -> None:
        self.stacks = list(self._stacks)
        for _, values in self.stacks:
            values.requires_grad_()

    def _untuned(self, stack: Stack, tuned: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
        """Bool, True for entries of a stack that their task does not train; None where all are trained."""
        outside = torch.ones(stack.values.shape, dtype=torch.bool)
        for row, masks in zip(outside, tuned, strict=True):
            for place, name in zip(row, stack.names, strict=True):
                if name in masks:
                    place.copy_(~masks[name])
        return outside.to(stack.values.device) if outside.any() else None

    def _mark(self, number: int, slots: frozenset[int], then: Callable[[], None] | None) -> None:
        self.reached[number] |= slots
        if then is not None:
            then()
