"""The values that settings may take, and defaults that the library shares with the command line.

This module imports next to nothing, so that `peft-lntune COMMAND --help` lists the values without importing torch.
"""

from typing import Literal, get_args

__all__ = [
    "BY",
    "DEVIATIONS",
    "DISTANCES",
    "FISHER_KINDS",
    "MEASURES",
    "ROLES",
    "SCOPES",
    "SIZES",
    "FisherKind",
    "Role",
    "Scope",
]

BY = ("component", "layer", "tensor")
"""What a row of `closeness` pools."""

DISTANCES = ("mean_l1", "relative_l1", "angle")
"""Measures of `closeness`."""

MEASURES = ("mean_change", "relative_to_mean", "relative_to_std")
"""Measures of `parameter_change`."""

SIZES = ("mean_magnitude", "std", "largest", "over_others")
"""Measures of `magnitude`."""

DEVIATIONS = 3.0
"""Outliers are more than this many standard deviations from the mean of their own vector."""

FisherKind = Literal["empirical", "mc", "exact"]
FISHER_KINDS: tuple[FisherKind, ...] = get_args(FisherKind)
"""Where the labels of Fisher information come from."""

Scope = Literal["global", "tensor", "layer"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What the budget of `select` applies to."""

Role = Literal["attention", "cross_attention", "ffn", "mixer", "qk", "embedding", "final"]
ROLES: dict[Role, str] = {
    "attention": "feeds or closes self-attention",
    "cross_attention": "feeds or closes attention over an encoder's output",
    "ffn": "feeds or closes the feed-forward layer, experts included",
    "mixer": "feeds, closes or lies in a token mixer that is not attention: a state space, a convolution",
    "qk": "normalizes the queries or keys inside attention, or the latents that both are made of",
    "embedding": "lies in or closes the embeddings, before the first block",
    "final": "stands after the last block: the body's last norm, or one in the head on top of it",
}
"""Roles of norms: the sub-layer that a norm feeds or closes."""
