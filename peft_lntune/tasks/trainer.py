"""transformers' Trainer for many tasks at once. Nobody imports it but its users: the Trainer takes long to import."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from peft_lntune.errors import ConfigError, DataError, UnsupportedError
from peft_lntune.storage.adapter_file import read_tensors
from peft_lntune.storage.atomic import new_file
from peft_lntune.tasks.batches import TaskBatches
from peft_lntune.tasks.losses import RowLoss
from peft_lntune.tasks.many_tasks import ManyTasks
from peft_lntune.tasks.optimizer import TaskOptimizer
from peft_lntune.tasks.stopping import EarlyStopping

__all__ = ["TaskBars", "TaskTrainer"]

VALUES_FILE = "tasks.safetensors"


class TaskTrainer(Trainer):
    """Trainer for `ManyTasks`: what is one thing there is one a task here.

    Learning rate, schedule, clipping, evaluation, early stop and progress bar are a task's own; `args.max_grad_norm` is
    the limit of each. Logs have `loss/<task>` and `learning_rate/<task>`, and their `loss` is the sum. Evaluation gives
    `eval_<task>_...` for each task, and as `eval_loss` the mean of their losses; of a dict of evaluation sets,
    `eval_<set>_<task>_...` and `eval_<set>_loss`. Checkpoints hold each task as an
    ordinary adapter, and what going on bit for bit needs.

    Weight decay is what Trainer does: none on norms and on biases of heads.

    Args:
        tasks: what is trained; its model is the Trainer's.
        args: for one process and one device, without fp16 and without `load_best_model_at_end`.
        task_column: the column of the data sets that names the task of each row, or gives its number in `tasks.names`.
        learning_rates: of each task; None: `args.learning_rate` for all.
        rows_per_task: batches are made by `TaskBatches` with so many rows of each task; None: as Trainer makes them.
        loss: as in `ManyTasks.losses`.
        patience: a task that did not improve in so many evaluations stops; None: none does.
        stop_on: by which of its evaluated values, such as `"loss"` or one of `compute_metrics`.
        greater_is_better: whether that value should grow.
        **kwargs: of Trainer, such as `train_dataset`, `eval_dataset`, `data_collator`, `compute_metrics`.

    Raises:
        ConfigError: an argument that has no meaning for many tasks, or one that is missing.
        UnsupportedError: several processes or devices.
    """

    def __init__(
        self,
        tasks: ManyTasks,
        args: TrainingArguments,
        *,
        task_column: str = "task",
        learning_rates: Mapping[str, float] | None = None,
        rows_per_task: int | None = None,
        loss: RowLoss | None = None,
        patience: int | None = None,
        stop_on: str = "loss",
        greater_is_better: bool = False,
        **kwargs: Any,
    ) -> None:
        _check(args, kwargs, rows_per_task is not None)
        if patience is not None and isinstance(kwargs.get("eval_dataset"), dict):
            raise ConfigError(
                f"patience={patience} looks at one evaluation set, but eval_dataset is a dict of "
                f"{len(kwargs['eval_dataset'])}. Give one of them, and evaluate the others by trainer.evaluate."
            )
        super().__init__(tasks.model, args, **kwargs)
        self.tasks, self.task_column, self.learning_rates = tasks, task_column, learning_rates
        self.rows_per_task, self.row_loss = rows_per_task, loss
        self.stopping = EarlyStopping(tasks.names, patience, stop_on, greater_is_better)
        collator: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = partial(_collate, collator, task_column, tasks)
        # Losses are means of their rows' own, so accumulated batches count alike, as for models that take no number.
        self.model_accepts_loss_kwargs = False
        self.task_optimizer: TaskOptimizer | None = None
        self._task_losses: dict[str, list[Tensor]] = {}
        self.add_callback(_ZeroGrad(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TaskBars(self.steps_of_tasks, tasks.names))

    # Data.

    def tasks_of(self, dataset: Any) -> list[str]:
        """The task of each row of a data set.

        Args:
            dataset: with a column that names the task, or a sequence of rows with such a key.

        Returns:
            Names of tasks.

        Raises:
            DataError: the data set has no such column, or a row is of no task.
        """
        column = getattr(dataset, "column_names", None)
        if column is not None and self.task_column not in column:
            raise DataError(f"no column {self.task_column!r}; there are {', '.join(column)}. Give task_column.")
        # The slice reads the column at once; without it datasets decodes a row at a time.
        values = dataset[self.task_column][:] if column is not None else [row[self.task_column] for row in dataset]
        return [_name(self.tasks, value) for value in values]

    def get_train_dataloader(self) -> DataLoader:
        if self.rows_per_task is None:
            return super().get_train_dataloader()
        if self.train_dataset is None:
            raise ConfigError("training needs a train_dataset. Give one to TaskTrainer.")
        dataset: Any = self.train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batches = TaskBatches(self.tasks_of(dataset), self.rows_per_task, seed)
        collator: Any = self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def steps_of_tasks(self, steps: int) -> dict[str, int]:
        """How many steps each task makes in so many of all.

        Args:
            steps: of the whole run.

        Returns:
            Steps by task; expected ones, where batches are mixed by chance.
        """
        counts = dict.fromkeys(self.tasks.names, 0)
        for name in self.tasks_of(self.train_dataset):
            counts[name] += 1
        rows = sum(counts.values())
        if self.rows_per_task is not None:
            batches = {name: -(-count // self.rows_per_task) for name, count in counts.items()}
            epochs, rest = divmod(steps * self.args.gradient_accumulation_steps, max(batches.values()))
            own = {name: epochs * each + min(rest, each) for name, each in batches.items()}
            return {name: -(-each // self.args.gradient_accumulation_steps) for name, each in own.items()}
        size = min(rows, self.args.train_batch_size * self.args.gradient_accumulation_steps)
        return {name: math.ceil(steps * _chance(rows, count, size)) for name, count in counts.items()}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.task_column not in self._signature_columns:
            self._signature_columns.append(self.task_column)

    # Steps.

    def create_optimizer(self, model: Any = None) -> Any:
        """An optimizer of the class that `args.optim` names for each task."""
        if self.task_optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = options["lr"] if self.learning_rates is None else self.learning_rates
            self.task_optimizer = self.tasks.optimizer(
                optimizer_class,
                max_grad_norm=self.args.max_grad_norm or None,
                decayed=self._is_decayed,
                **{**options, "lr": rates, "weight_decay": self.args.weight_decay},
            )
        self.optimizer = self.task_optimizer
        return self.optimizer

    def _is_decayed(self, name: str) -> bool:
        return name.rpartition(".")[0] not in self.tasks.norms and not name.endswith("bias")

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule of the kind that `args.lr_scheduler_type` names for each task, over the task's own steps."""
        if self.lr_scheduler is None:  # type: ignore[has-type]
            assert self.task_optimizer is not None
            own = self.steps_of_tasks(num_training_steps)
            self.task_optimizer.set_schedule({name: partial(self._schedule, steps) for name, steps in own.items()})
            self.lr_scheduler = _Schedules(self.task_optimizer, self.stopping)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _schedule(self, steps: int, optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=self.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the losses of the tasks that have rows in the batch."""
        own = {name: value for name, value in inputs.items() if name != self.task_column}
        index = inputs.get(self.task_column)
        with nullcontext() if index is None else self.tasks.route(index):
            outputs = model(**own)
        losses = self.tasks.losses(outputs, own, self.row_loss)
        if model.training:
            for name, loss in losses.items():
                self._task_losses.setdefault(name, []).append(loss.detach())
        total = torch.stack(list(losses.values())).sum()
        return (total, outputs) if return_outputs else total

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        own = {name: value for name, value in inputs.items() if name != self.task_column}
        with self.tasks.route(inputs[self.task_column]):
            return super().prediction_step(model, own, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.task_optimizer is not None:
            means = {f"loss/{name}": torch.stack(each).mean().item() for name, each in self._task_losses.items()}
            rates = {f"learning_rate/{name}": rate for name, rate in self.task_optimizer.learning_rates.items()}
            # Trainer knows of one norm and one rate, which are none of ours.
            logs = {key: value for key, value in logs.items() if key not in ("grad_norm", "learning_rate")}
            logs |= means | rates
            self._task_losses = {}
        super().log(logs, start_time)

    # Evaluation.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate each task on its rows, and stop those that no longer improve.

        Args:
            eval_dataset: a data set, several by name, or the name of one of those that TaskTrainer was given; None:
                what it was given.
            ignore_keys: as in Trainer.
            metric_key_prefix: before all names; of several data sets, that of each comes behind it.

        Returns:
            `<prefix>_<task>_<value>` for each task, and the mean of the tasks' losses as `<prefix>_loss`.

        Raises:
            ConfigError: there is no data set, or none of that name.
            DataError: the data set has no rows, or a row is of no task.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in known:
                raise ConfigError(f"eval_dataset={dataset!r} is not among the evaluation sets {', '.join(known)}.")
            dataset = known[dataset]
        if dataset is None or dataset == {}:
            raise ConfigError("evaluation needs an eval_dataset. Give one to TaskTrainer, or to evaluate.")
        found: dict[str, float] = {}
        if isinstance(dataset, dict):
            for name, own in dataset.items():
                found |= self.evaluate(own, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        places: dict[str, list[int]] = {}
        for place, name in enumerate(self.tasks_of(dataset)):
            places.setdefault(name, []).append(place)
        if not places:
            raise DataError("the evaluation set has no rows.")
        for name, own in places.items():
            rows = dataset.select(own) if hasattr(dataset, "select") else Subset(dataset, own)
            found |= super().evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
        losses = [found[f"{metric_key_prefix}_{name}_loss"] for name in places]
        found[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        if self.is_in_train and eval_dataset is None and self.task_optimizer is not None:
            for name in self.stopping.look(found, metric_key_prefix, self.task_optimizer.active):
                self.task_optimizer.stop(name)
            if not self.task_optimizer.active:
                self.control.should_training_stop = True
        return found

    # Files.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save each task as an ordinary adapter, in a folder of its name; and all values bit for bit, to go on from."""
        folder = output_dir or self.args.output_dir
        assert folder is not None
        os.makedirs(folder, exist_ok=True)
        self.tasks.save(folder)
        state = self.tasks.state_dict()
        tensors = {f"{name}/{key}": value.contiguous() for name, own in state.items() for key, value in own.items()}
        with new_file(Path(folder, VALUES_FILE)) as written:
            save_file(tensors, written)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        file = Path(resume_from_checkpoint, VALUES_FILE)
        if not file.is_file():
            raise ConfigError(f"{resume_from_checkpoint} is no checkpoint of a TaskTrainer: it has no {VALUES_FILE}.")
        state: dict[str, dict[str, Tensor]] = {name: {} for name in self.tasks.names}
        for key, value in read_tensors(file).items():
            name, _, own = key.rpartition("/")
            state.setdefault(name, {})[own] = value
        self.tasks.load_state_dict(state)


class _Schedules:
    """What Trainer takes for its one schedule. The schedules move on with the steps of their tasks, not with it."""

    def __init__(self, optimizer: TaskOptimizer, stopping: EarlyStopping) -> None:
        self._optimizer, self._stopping = optimizer, stopping

    def step(self) -> None:
        """Nothing: see above."""

    def get_last_lr(self) -> list[float]:
        return list(self._optimizer.learning_rates.values())

    def state_dict(self) -> dict[str, Any]:
        return self._stopping.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stopping.load_state_dict(state)


class _ZeroGrad(TrainerCallback):
    """Trainer sets the gradients of its model to zero after a step, and here they are elsewhere."""

    def __init__(self, trainer: TaskTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.task_optimizer is not None:
            self._trainer.task_optimizer.zero_grad()


def _collate(collator: Callable[..., Any], column: str, tasks: ManyTasks, rows: Sequence[Any]) -> dict[str, Any]:
    if any(column not in row for row in rows):
        raise DataError(f"rows have no {column!r}, but {', '.join(rows[0])}. Give task_column.")
    names = [_name(tasks, row[column]) for row in rows]
    batch = collator([{key: value for key, value in row.items() if key != column} for row in rows])
    return {**batch, column: tasks.index(names)}


def _name(tasks: ManyTasks, value: Any) -> str:
    if isinstance(value, str) and value in tasks.names:
        return value
    number = None if isinstance(value, (str, bool)) else int(value)
    if number is None or not 0 <= number < len(tasks):
        raise DataError(f"a row is of task {value!r}; there are {', '.join(tasks.names)}. Use a name, or its place.")
    return tasks.names[number]


def _chance(rows: int, own: int, size: int) -> float:
    """How likely it is that `size` of `rows` have at least one of `own` among them."""
    if not own:
        return 0.0
    return 1 - math.comb(rows - own, size) / math.comb(rows, size)


def _check(args: TrainingArguments, kwargs: Mapping[str, Any], by_task: bool) -> None:
    if args.lr_scheduler_type == "reduce_lr_on_plateau":
        raise ConfigError(
            "lr_scheduler_type='reduce_lr_on_plateau' follows one evaluated value for all tasks. Use a schedule by "
            "steps, such as 'cosine', and patience."
        )
    refused = {
        "fp16": "one task that overflows would scale the steps of all. Use bf16",
        "load_best_model_at_end": "there is no best of all tasks. Use patience, or save what you evaluate",
        "use_liger_kernel": "it skips the forward of norms",
        "label_smoothing_factor": "it smooths all rows alike in one loss. Pass loss",
        "metric_for_best_model": "there is no best of all tasks. Use patience and stop_on",
        "dataloader_persistent_workers": "each task is evaluated on rows of its own, and the workers keep those of one",
        "deepspeed": "its optimizer steps all parameters at once, and each task has its own",
        "fsdp": "it cuts parameters in pieces, and a task is a row of one",
    }
    if by_task:  # what Trainer's own batches follow
        refused |= {
            "group_by_length": "rows_per_task says what is in a batch",
            "dataloader_drop_last": "rows_per_task ends a task with what it has left",
            "auto_find_batch_size": "rows_per_task says how large a batch is",
        }
    for option, why in refused.items():
        if getattr(args, option, False):
            raise ConfigError(f"{option}={getattr(args, option)!r} has no meaning for many tasks: {why}.")
    order = getattr(args, "train_sampling_strategy", "random")  # older versions of transformers have group_by_length
    if by_task and order != "random":
        raise ConfigError(
            f"train_sampling_strategy={order!r} has no meaning with rows_per_task, which says what a batch "
            "holds. Leave one of the two out."
        )
    own = {"model", "optimizers", "compute_loss_func", "model_init", "optimizer_cls_and_kwargs"} & kwargs.keys()
    if own:
        raise ConfigError(f"{min(own)} is not for TaskTrainer, which takes tasks, learning_rates and loss.")
    if args.world_size > 1 or args.n_gpu > 1:
        raise UnsupportedError("TaskTrainer runs in one process on one device. Set CUDA_VISIBLE_DEVICES to one.")


class TaskBars(TrainerCallback):
    """Bars one below the other, each with the latest loss of its task.

    Args:
        steps: from the steps of the whole run to those of each task.
        names: the tasks.
    """

    def __init__(self, steps: Callable[[int], Mapping[str, int]], names: Sequence[str]) -> None:
        self._steps, self._names = steps, names
        self.bars: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        totals = self._steps(state.max_steps)
        made = kwargs["optimizer"].steps
        self.bars = {
            name: tqdm(total=totals[name], initial=made[name], desc=name, unit="step", position=position)
            for position, name in enumerate(self._names)
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, steps in kwargs["optimizer"].steps.items():
            self.bars[name].update(steps - self.bars[name].n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        for name, bar in self.bars.items():
            if f"loss/{name}" in (logs or {}):
                bar.set_postfix(loss=f"{(logs or {})[f'loss/{name}']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for bar in self.bars.values():
            bar.close()
