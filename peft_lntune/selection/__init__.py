"""Scores of parameters and masks within a budget: pure functions on named tensors, torch only."""

from peft_lntune.selection.fisher import FisherState, fisher_scores
from peft_lntune.selection.masks import check_masks, combine_masks, mask_density, mask_overlap
from peft_lntune.selection.scores import (
    change_scores,
    find_score,
    magnitude_scores,
    median_distance_scores,
    random_scores,
    register_score,
)
from peft_lntune.selection.select import select

__all__ = [
    "FisherState",
    "change_scores",
    "check_masks",
    "combine_masks",
    "find_score",
    "fisher_scores",
    "magnitude_scores",
    "mask_density",
    "mask_overlap",
    "median_distance_scores",
    "random_scores",
    "register_score",
    "select",
]
