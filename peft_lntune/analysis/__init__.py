"""What the methods' papers look at: which components move, where scores are high, what tasks share. Torch only."""

from peft_lntune.analysis.change import parameter_change
from peft_lntune.analysis.checkpoints import Checkpoint, match_tensors, open_tensors
from peft_lntune.analysis.distances import closeness
from peft_lntune.analysis.overlap import overlap_matrix
from peft_lntune.analysis.plots import (
    plot_change,
    plot_closeness,
    plot_magnitude,
    plot_overlap,
    plot_score_map,
    plot_sparsity,
)
from peft_lntune.analysis.score_maps import score_map
from peft_lntune.analysis.sizes import find_outliers, magnitude, outlier_overlap, outliers
from peft_lntune.analysis.supermasks import off_overlap, sparsity
from peft_lntune.analysis.tables import Table

__all__ = [
    "Checkpoint",
    "Table",
    "closeness",
    "find_outliers",
    "magnitude",
    "match_tensors",
    "off_overlap",
    "open_tensors",
    "outlier_overlap",
    "outliers",
    "overlap_matrix",
    "parameter_change",
    "plot_change",
    "plot_closeness",
    "plot_magnitude",
    "plot_overlap",
    "plot_score_map",
    "plot_sparsity",
    "score_map",
    "sparsity",
]
