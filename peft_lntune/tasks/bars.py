"""A progress bar for each task, over its own steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

__all__ = ["TaskBars"]


class TaskBars(TrainerCallback):
    """Bars one below the other, each with the latest loss of its task.

    Args:
        steps: from the steps of the whole run to those of each task.
        names: the tasks.
    """

    def __init__(self, steps: Callable[[int], Mapping[str, int]], names: Sequence[str]) -> None:
        self._steps, self._names = steps, names
        self.bars: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        totals = self._steps(state.max_steps)
        made = kwargs["optimizer"].steps
        self.bars = {
            name: tqdm(total=totals[name], initial=made[name], desc=name, unit="step", position=position)
            for position, name in enumerate(self._names)
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, steps in kwargs["optimizer"].steps.items():
            self.bars[name].update(steps - self.bars[name].n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        for name, bar in self.bars.items():
            if f"loss/{name}" in (logs or {}):
                bar.set_postfix(loss=f"{(logs or {})[f'loss/{name}']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for bar in self.bars.values():
            bar.close()
