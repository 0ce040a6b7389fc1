"""What a config would do to a model, before anything is changed."""

from peft_lntune.planning.types import Plan, PlannedModule

__all__ = ["Plan", "PlannedModule"]
