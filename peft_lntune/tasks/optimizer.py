"""One optimizer per task, over the task's rows of the tensors that hold all tasks."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_lntune.core.groups import HEAD, Member, group_members
from peft_lntune.errors import ConfigError
from peft_lntune.tasks.parameters import TaskParameters

__all__ = ["TaskOptimizer", "clip_rows_"]

_NORMS = "ln"


@dataclass(eq=False)
class _Task:
    """The optimizer of one task, and its tensors by the numbers of the `TaskParameters` and of the stack in it."""

    optimizer: torch.optim.Optimizer
    schedule: Any
    rows: dict[tuple[int, int], nn.Parameter]
    steps: int = 0
    stopped: bool = False


class TaskOptimizer:
    """One optimizer per task; created by `ManyTasks.optimizer`.

    A task steps if a backward pass has reached its rows since the last `zero_grad`. The others do not change, including
    their moments and step counts. All tensors of a task with the same shape are one tensor. So an optimizer that treats
    each entry separately, such as SGD or Adam, behaves as if the task trained alone; one that uses statistics of whole
    tensors, such as Adafactor, does not.

    Args:
        parameters: the trained parameters: of the norms, and of each layer of a head.
        names: names of the tasks.
        optimizer_class: a torch optimizer class, or one with the same interface.
        max_grad_norm: largest norm of a task's gradient, or a dict of one per task; None: no limit.
        options: options of the class by name; a dict by task as a value gives each task its own.
        free: stacks without weight decay, by the numbers of the parameters and of the stack in them.
        head_lr: learning rate of the heads, or a dict of one per task; None: that of the norms.

    Raises:
        ConfigError: a dict lacks a task or names an unknown one.
    """

    def __init__(
        self,
        parameters: Sequence[TaskParameters],
        names: Sequence[str],
        optimizer_class: Callable[..., torch.optim.Optimizer],
        max_grad_norm: float | Mapping[str, float | None] | None,
        options: Mapping[str, Any],
        free: Collection[tuple[int, int]] = (),
        head_lr: float | Mapping[str, float] | None = None,
    ) -> None:
        self._parameters, self._names = parameters, list(names)
        for option, value in {"max_grad_norm": max_grad_norm, "head_lr": head_lr, **options}.items():
            _check_option(option, value, self._names)
        limits = [_own(max_grad_norm, name) for name in names]
        self._clips = any(limit is not None for limit in limits)
        self._limits = torch.tensor([float("inf") if limit is None else limit for limit in limits])
        self._norms: Tensor | None = None
        self._tasks: dict[str, _Task] = {}
        for slot, name in enumerate(names):
            rows = {
                (group, number): nn.Parameter(values.detach()[slot])
                for group, each in enumerate(parameters)
                for number, (_, values) in enumerate(each.stacks)
                if each.owns(number, slot)
            }
            rate = _own(head_lr, name)
            groups = group_members(
                (
                    # Without a rate of their own, heads are in the groups of the norms.
                    Member(name, row, HEAD if key[0] > 0 and rate is not None else _NORMS, decays=key not in free)
                    for key, row in rows.items()
                ),
                {_NORMS: None, HEAD: rate},  # the norms first: their rate is what `learning_rates` gives
                {_NORMS: None, HEAD: None},
            )
            own = {key: _own(value, name) for key, value in options.items()}
            optimizer = optimizer_class(groups, **own)
            self._tasks[name] = _Task(optimizer, None, rows)

    def set_schedule(self, schedule: Any) -> None:
        """Set the learning-rate schedule of each task.

        Args:
            schedule: function from a task's optimizer to its schedule, or a dict of one per task; None: no schedules.

        Raises:
            ConfigError: a dict lacks a task or names an unknown one.
        """
        _check_option("schedule", schedule, self._names)
        for name, task in self._tasks.items():
            make = _own(schedule, name)
            task.schedule = None if make is None else make(task.optimizer)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizer of each task. Its tensors share memory with the stacks of all tasks."""
        return {name: task.optimizer for name, task in self._tasks.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all tasks, task by task."""
        return [group for task in self._tasks.values() for group in task.optimizer.param_groups]

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each task now."""
        return {name: float(task.optimizer.param_groups[0]["lr"]) for name, task in self._tasks.items()}

    @property
    def steps(self) -> dict[str, int]:
        """The number of steps that each task has made."""
        return {name: task.steps for name, task in self._tasks.items()}

    @property
    def active(self) -> list[str]:
        """The tasks that are not stopped."""
        return [name for name, task in self._tasks.items() if not task.stopped]

    def grad_norms(self) -> dict[str, float]:
        """Return the norm of each task's gradient before clipping in the latest step; empty without clipping."""
        if self._norms is None:
            return {}
        return dict(zip(self._names, self._norms.tolist(), strict=True))

    def step(self) -> None:
        """Step the optimizer, after clipping, and the schedule of each task that had rows and is not stopped."""
        grads = [values.grad for each in self._parameters for _, values in each.stacks if values.grad is not None]
        if self._clips and grads:
            self._limits = self._limits.to(grads[0].device)
            self._norms = clip_rows_(grads, self._limits)
        for slot, task in enumerate(self._tasks.values()):
            reached = False
            for (group, number), row in task.rows.items():
                each = self._parameters[group]
                grad = each.stacks[number].values.grad
                found = grad is not None and slot in each.reached[number] and not task.stopped
                row.grad = grad[slot] if found and grad is not None else None
                reached |= found
            if reached:
                task.optimizer.step()
                task.steps += 1
                if task.schedule is not None:
                    task.schedule.step()

    def zero_grad(self) -> None:
        """Drop the gradients of all tasks, and forget which tasks had rows."""
        for each in self._parameters:
            each.forget()
        for task in self._tasks.values():
            for row in task.rows.values():
                row.grad = None

    def stop(self, name: str) -> None:
        """Stop training a task. Its rows may still be routed.

        Args:
            name: name of the task.

        Raises:
            ConfigError: no task has this name.
        """
        if name not in self._tasks:
            raise ConfigError(f"no task {name!r}; there are {', '.join(self._names)}.")
        self._tasks[name].stopped = True

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return for each task the state of its optimizer and schedule, its steps, and whether it is stopped."""
        return {
            name: {
                "optimizer": task.optimizer.state_dict(),
                "schedule": None if task.schedule is None else task.schedule.state_dict(),
                "steps": task.steps,
                "stopped": task.stopped,
            }
            for name, task in self._tasks.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Resume from a saved state.

        Args:
            state: a result of `state_dict`.

        Raises:
            ConfigError: the state is of other tasks. Nothing has changed.
        """
        if state.keys() != self._tasks.keys():
            raise ConfigError(f"the state is of the tasks {', '.join(state)}, but these are {', '.join(self._names)}.")
        for name, task in self._tasks.items():
            task.optimizer.load_state_dict(state[name]["optimizer"])
            if task.schedule is not None:
                task.schedule.load_state_dict(state[name]["schedule"])
            task.steps, task.stopped = state[name]["steps"], state[name]["stopped"]


def _own(value: Any, name: str) -> Any:
    return value[name] if isinstance(value, Mapping) else value


def _check_option(option: str, value: Any, names: Sequence[str]) -> None:
    if not isinstance(value, Mapping):
        return
    wrong = sorted(set(names) ^ value.keys())
    if wrong:
        what = "lacks" if wrong[0] in names else "has"
        raise ConfigError(f"{option} {what} {wrong[0]!r}. As a dict it has a value for each of {', '.join(names)}.")


@torch.no_grad()
def clip_rows_(grads: Sequence[Tensor], limits: Tensor) -> Tensor:
    """Clip the gradient of each task to its own largest norm, as `torch.nn.utils.clip_grad_norm_` does for one task.

    Args:
        grads: gradients, `(tasks, ...)` each, changed in place.
        limits: largest norm of all rows of a task together, `(tasks,)`; infinite for no limit.

    Returns:
        The norms before clipping, `(tasks,)`.

    Example:
        >>> grads = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
        >>> clip_rows_([grads], torch.tensor([1.0, 10.0]))
        tensor([5., 5.])
        >>> grads
        tensor([[0.6000, 0.8000],
                [3.0000, 4.0000]])
    """
    each = [torch.linalg.vector_norm(grad.flatten(1), dim=1).to(limits.device) for grad in grads]
    norms = torch.linalg.vector_norm(torch.stack([norm.to(limits.dtype) for norm in each]), dim=0)
    scale = (limits / (norms + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.device, grad.dtype).view(-1, *(1,) * (grad.dim() - 1)))
    return norms
