"""Masked arms with a number of entries: gains or biases of norms, or weights of other modules, by size or at random.

Entries are chosen from the pretrained model; no data is used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.harness.arms import ALONE, tune_modules
from benchmarks.harness.masked import Named, Source, masked_arm, random_seed
from peft_lntune import LNTuningConfig, ModuleTuningConfig, plan, select
from peft_lntune.core.delta import PARAMETERS
from peft_lntune.selection import magnitude_scores, median_distance_scores, random_scores

COUNT = 768  # entries of the runs that search a rate; other counts and ways take it
LARGEST, OTHER_LARGEST = "norm-largest", "other-largest"
# What the entries of the arms other-... are drawn from: the weights of every module of the layers but norms.
OTHERS: dict[str, Any] = {"components": [name for name in ALONE if name != "embedding"], "tune": "weight"}
Score = Callable[[nn.Module, list[str]], dict[str, Tensor]]


def planned_names(model: nn.Module, config: LNTuningConfig | ModuleTuningConfig) -> list[str]:
    """Return the names of the parameters that a config tunes."""
    return [f"{name}.{parameter}" for name, part in plan(model, config).parts.items() for parameter in part.entries]


def mean_magnitude(model: Any) -> float:
    """Return the mean |w| that the tuned entries of a model with an adapter have in its base."""
    total, count = 0.0, 0
    for layer in model.base_model.tuner_layers():
        for parameter in PARAMETERS:
            for delta in layer.deltas(parameter).values():
                chosen = layer.base_parameter(parameter)[delta.tuned()]
                total, count = total + float(chosen.abs().double().sum()), count + chosen.numel()
    return total / count


def _of_norms(source: Source, score: Score, largest: bool = True) -> Named:
    """Choose among all gains or all biases of norms."""
    return _choose(source, LNTuningConfig(tune=source.cell["parameter"]), score, largest)


def _choose(source: Source, config: Any, score: Score, largest: bool = True) -> Named:
    model = source.model()
    return select(score(model, planned_names(model, config)), count=source.cell["count"], largest=largest)


@masked_arm(LARGEST, searched_at={"count": COUNT, "parameter": "weight"})
def norm_largest(source: Source) -> Named:
    """The entries of the largest absolute value."""
    return _of_norms(source, magnitude_scores)


@masked_arm("norm-smallest", rates=(), rate_of=LARGEST)
def norm_smallest(source: Source) -> Named:
    """The entries of the smallest absolute value."""
    return _of_norms(source, magnitude_scores, largest=False)


@masked_arm("norm-random", rates=(), rate_of=LARGEST)
def norm_random(source: Source) -> Named:
    """Any entries."""
    return _of_norms(source, partial(random_scores, seed=random_seed(source)))


@masked_arm("norm-farthest", rates=(), rate_of=LARGEST)
def norm_farthest(source: Source) -> Named:
    """The entries farthest from the median of their own vector, on either side."""
    return _of_norms(source, median_distance_scores)


_tune_others = partial(tune_modules, **OTHERS)


@masked_arm(OTHER_LARGEST, searched_at={"count": COUNT}, tune=_tune_others)
def other_largest(source: Source) -> Named:
    """The weights of the largest absolute value in all modules of the layers but norms."""
    return _choose(source, ModuleTuningConfig(**OTHERS), magnitude_scores)


@masked_arm("other-random", rates=(), rate_of=OTHER_LARGEST, tune=_tune_others)
def other_random(source: Source) -> Named:
    """Any weights of these modules."""
    return _choose(source, ModuleTuningConfig(**OTHERS), partial(random_scores, seed=random_seed(source)))
