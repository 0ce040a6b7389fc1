"""Early stopping per task."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft_lntune.errors import ConfigError

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """Tracks the best value of each task, and the number of evaluations since.

    Args:
        names: names of the tasks.
        patience: number of evaluations without a better value after which a task stops; None: no task stops.
        value: name of the evaluated value to track.
        greater_is_better: whether larger values are better.

    Raises:
        ConfigError: the patience is not a positive number.

    Example:
        >>> stopping = EarlyStopping(["a", "b"], patience=1)
        >>> stopping.look({"eval_a_loss": 1.0, "eval_b_loss": 1.0}, "eval", ["a", "b"])
        []
        >>> stopping.look({"eval_a_loss": 0.9, "eval_b_loss": 1.0}, "eval", ["a", "b"])
        ['b']
    """

    def __init__(
        self, names: Sequence[str], patience: int | None, value: str = "loss", greater_is_better: bool = False
    ) -> None:
        if patience is not None and (type(patience) is not int or patience < 1):
            raise ConfigError(f"patience={patience!r} should be a number of evaluations, at least 1.")
        self.patience, self.value, self.greater_is_better = patience, value, greater_is_better
        self.best: dict[str, float] = {}
        self.worse: dict[str, int] = dict.fromkeys(names, 0)

    def look(self, metrics: Mapping[str, float], prefix: str, active: Sequence[str]) -> list[str]:
        """Record an evaluation.

        Args:
            metrics: evaluated values by name, `<prefix>_<task>_<value>` among them.
            prefix: prefix of the names.
            active: names of the tasks that still train.

        Returns:
            Names of the active tasks that have run out of patience.

        Raises:
            ConfigError: a task was evaluated, but without this value.
        """
        if self.patience is None:
            return []
        for name in active:
            key = f"{prefix}_{name}_{self.value}"
            if key not in metrics:
                if any(other.startswith(f"{prefix}_{name}_") for other in metrics):
                    raise ConfigError(f"stop_on={self.value!r}, but the evaluation has {', '.join(metrics)}.")
                continue
            value = metrics[key]
            best = self.best.get(name)
            if best is None or (value > best if self.greater_is_better else value < best):
                self.best[name], self.worse[name] = value, 0
            else:
                self.worse[name] += 1
        return [name for name in active if self.worse[name] >= self.patience]

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to resume."""
        return {"best": dict(self.best), "worse": dict(self.worse)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state.

        Args:
            state: a result of `state_dict`.
        """
        self.best, self.worse = dict(state["best"]), dict(state["worse"])
