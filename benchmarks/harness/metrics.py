"""The metric of each task: the figure in its rows that chooses learning rates and is reported in tables."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        name: in rows.
        said: in tables.
        factor: from a row's figure to a table's.
        smaller: whether a smaller figure is the better one.
    """

    name: str
    said: str
    factor: float = 100.0
    smaller: bool = False

    def shown(self, metrics: Mapping[str, float]) -> float:
        """Return the figure as tables show it."""
        return self.factor * metrics[self.name]

    def gain(self, difference: float) -> float:
        """Return a difference of figures as how much better the first is.

        Example:
            >>> metric_of("e2e_nlg").gain(-2.0), metric_of("sst2").gain(-2.0)
            (2.0, -2.0)
        """
        return -difference if self.smaller else difference

    @property
    def along(self) -> str:
        """Return the name of the figure at the axis of a plot."""
        return f"{self.said} (smaller is better)" if self.smaller else self.said

    def held_out(self, metrics: Mapping[str, float]) -> float:
        """Return how good a run of the search was; more is better."""
        return self.gain(metrics[f"held_out_{self.name}"])


ACCURACY = Metric("accuracy", "accuracy, %")
PERPLEXITY = Metric("perplexity", "perplexity", factor=1.0, smaller=True)
METRICS = {
    "stsb": Metric("spearmanr", "Spearman correlation, %"),
    "wnut_17": Metric("overall_f1", "F1 of entities, %"),
    "squad_small": Metric("f1", "F1 of answers, %", factor=1.0),
    "tinyshakespeare": PERPLEXITY,
    "e2e_nlg": PERPLEXITY,
    "gsm8k": PERPLEXITY,
}
WORST_LOSS = 20.0  # nats a token; beyond lies what has diverged, and its exponential may be no number


def metric_of(task: str) -> Metric:
    """Return the metric of a task; of a classification it is accuracy, also where GLUE uses another."""
    return METRICS.get(task, ACCURACY)


def perplexity(loss: float) -> float:
    """Return the exponential of a loss in nats a token, at most that of `WORST_LOSS`.

    Example:
        >>> perplexity(0.0), perplexity(float("nan")) == perplexity(1e9)
        (1.0, True)
    """
    return math.exp(WORST_LOSS if math.isnan(loss) else min(loss, WORST_LOSS))
