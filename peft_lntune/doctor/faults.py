"""The faults that keep norms from learning: a title and one sentence of advice for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["FAULTS", "Fault", "Finding"]


class Fault(NamedTuple):
    """A kind of fault.

    Attributes:
        title: what is wrong, in a few words.
        advice: one sentence: what to do.
    """

    title: str
    advice: str


FAULTS = {
    "too_coarse": Fault(
        "the dtype is too coarse for the learning rate",
        "Keep these norms in float32 (load the model in float32 with autocast, or tune them with LNTuningConfig), or "
        "use an optimizer with float32 master weights or stochastic rounding; a larger learning rate helps only above "
        "half the spacing.",
    ),
    "one_way_rounding": Fault(
        "rounding lets entries move towards zero only",
        "Keep these norms in float32, because at a power of two the dtype is twice as fine below as above, and steps "
        "of this size round back on one side.",
    ),
    "frozen": Fault(
        "norms that should be trained are frozen",
        "Set requires_grad to True before the optimizer is created, after prepare_model_for_kbit_training or any other "
        "call that freezes parameters; load an adapter for training with is_trainable=True.",
    ),
    "not_in_optimizer": Fault(
        "the optimizer does not hold norms that require a gradient",
        "Create the optimizer after the last call that adds, replaces or unfreezes parameters (get_peft_model, "
        "set_adapter, requires_grad_), or add these norms to one of its groups.",
    ),
    "stale_parameter": Fault(
        "the optimizer holds other tensors than the model",
        "Create the optimizer after set_masks, fit_fisher_masks, get_peft_model and any other call that replaces "
        "parameters.",
    ),
    "inactive_adapter": Fault(
        "the optimizer trains norms of an adapter that is not active",
        "Activate the adapter with set_adapter before the optimizer is created, and leave no disable_adapter block or "
        "disable_adapters() on during training.",
    ),
    "no_gradient": Fault(
        "no gradient reaches the norms",
        "Find out what computes in place of the norm's forward: a fused kernel may give its weight no gradient, and a "
        "detach(), no_grad() or unused branch cuts it off.",
    ),
    "zero_gradient": Fault(
        "the gradient of the norms is exactly zero",
        "Find out what computes in place of the norm's forward: a fused kernel may return zeros for its weight, or the "
        "norm's output is multiplied by zero, and in float16 small gradients become zero without a GradScaler.",
    ),
    "nonfinite_gradient": Fault(
        "gradients of the norms are NaN or infinite",
        "Stop the run, divide the learning rate by three, and look at the loss of single batches; in float16 use a "
        "GradScaler.",
    ),
    "nonfinite_value": Fault(
        "norms hold NaN or infinite values",
        "Go back to the last checkpoint with finite values, divide the learning rate by three, and clip gradients.",
    ),
    "vanishing_gradient": Fault(
        "gradients are too small for any step",
        "Scale the loss (a GradScaler in float16), or check for a loss divided twice: with such gradients, steps round "
        "to nothing.",
    ),
    "clipped_away": Fault(
        "gradient clipping leaves no step",
        "Raise max_grad_norm (1.0 is common): the gradients that are left make steps that round to nothing.",
    ),
    "zero_learning_rate": Fault(
        "the learning rate of the norms is zero",
        "Give the group that holds the norms a learning rate, and check its schedule.",
    ),
    "scaled_to_nothing": Fault(
        "the optimizer scales its steps by the size of values that start at zero",
        "Use AdamW, or transformers' Adafactor with scale_parameter=False as Trainer does: biases and deltas start at "
        "zero and hardly move otherwise.",
    ),
    "weight_decay": Fault(
        "weight decay pulls gains towards zero",
        "Put the norms into a group with weight_decay=0, as Trainer does: a gain is near 1, not near 0.",
    ),
    "decay_drift": Fault(
        "all gains shrank by one factor, as weight decay alone does",
        "Put the norms into a group with weight_decay=0, and check that a gradient reaches them.",
    ),
    "overwritten": Fault(
        "something sets the norms back after each step",
        "Look for code that writes to them: a tied copy, an average of weights, a load_state_dict or copy_.",
    ),
    "steps_skipped": Fault(
        "the optimizer skips every step",
        "Check the GradScaler: every gradient is infinite or NaN, so lower the scale or train in bfloat16 or float32.",
    ),
    "did_not_move": Fault(
        "the norms did not move",
        "If they were frozen on purpose, all is well; otherwise run the training with NormDoctor for a few steps: it "
        "tells a coarse dtype from a missing gradient and from an optimizer that does not hold them.",
    ),
    "few_moved": Fault(
        "only some entries moved",
        "Train these norms in float32 (master weights, or LNTuningConfig): small moves of few entries follow the "
        "spacing of the dtype, not the gradient, unless a mask chose the entries.",
    ),
}
"""Every kind of fault, by the name that `Finding.kind` has."""


@dataclass(frozen=True)
class Finding:
    """One fault, and the norm parameters that have it.

    Attributes:
        kind: a key of `FAULTS`.
        parameters: names of the norm parameters.
        evidence: what was seen, with numbers.
    """

    kind: str
    parameters: Sequence[str]
    evidence: str

    @property
    def title(self) -> str:
        """What is wrong, in a few words."""
        return FAULTS[self.kind].title

    @property
    def advice(self) -> str:
        """What to do, in one sentence."""
        return FAULTS[self.kind].advice

    def __str__(self) -> str:
        names = ", ".join(self.parameters[:2]) + (", ..." if len(self.parameters) > 2 else "")
        where = f" ({len(self.parameters)} parameters: {names})" if self.parameters else ""
        return f"{self.kind}: {self.title}{where}. {self.evidence} {self.advice}"

    def to_data(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {
            "kind": self.kind,
            "title": self.title,
            "parameters": list(self.parameters),
            "evidence": self.evidence,
            "advice": self.advice,
        }
