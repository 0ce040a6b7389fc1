"""What the methods' papers look at: which components move, where scores are high, what tasks share. Torch only."""

from peft_lntune.analysis.change import parameter_change, rank_flips
from peft_lntune.analysis.overlap import overlap_matrix
from peft_lntune.analysis.plots import plot_change, plot_overlap, plot_score_map
from peft_lntune.analysis.score_map import score_map
from peft_lntune.analysis.tables import Table

__all__ = [
    "Table",
    "overlap_matrix",
    "parameter_change",
    "plot_change",
    "plot_overlap",
    "plot_score_map",
    "rank_flips",
    "score_map",
]
