"""What a config would do to a model, before anything is changed; and what each method does then, in `methods/`."""

from peft_lntune.planning.types import Plan, PlannedModule

__all__ = ["Plan", "PlannedModule"]
