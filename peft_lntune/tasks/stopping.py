"""Which tasks no longer improve."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft_lntune.errors import ConfigError

__all__ = ["EarlyStopping"]


class EarlyStopping:
    """The best value of each task, and for how many evaluations it has not been beaten.

    Args:
        names: the tasks.
        patience: how many evaluations without a better value a task has; None: as many as it likes.
        value: which of the evaluated values is looked at.
        greater_is_better: whether it should grow.

    Raises:
        ConfigError: the patience is no positive number.

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
        """Take in an evaluation.

        Args:
            metrics: `<prefix>_<task>_<value>` and others.
            prefix: of the evaluation.
            active: the tasks that still train.

        Returns:
            Those of them that have run out of patience.

        Raises:
            ConfigError: a task was evaluated, but not by this value.
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
        """Return what going on needs."""
        return {"best": dict(self.best), "worse": dict(self.worse)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: what `state_dict` returned.
        """
        self.best, self.worse = dict(state["best"]), dict(state["worse"])
