"""Many tasks trained in one pass: each row of a batch belongs to the adapter of its task."""

from peft_lntune.tasks.many_tasks import ManyTasks
from peft_lntune.tasks.optimizer import TaskOptimizer

__all__ = ["ManyTasks", "TaskOptimizer"]
