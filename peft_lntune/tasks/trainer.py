"""transformers' Trainer for many tasks at once. No other module imports this one: the Trainer is slow to import."""

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
    """Trainer for `ManyTasks`.

    Each task has its own learning rate, schedule, clipping, evaluation, early stopping and progress bar;
    `args.max_grad_norm` is the limit of each task. Logs have `loss/<task>` and `learning_rate/<task>`; their `loss` is
    the sum. Evaluation gives `eval_<task>_...` per task and the mean of the losses as `eval_loss`; for a dict of
    evaluation sets, `eval_<set>_<task>_...` and `eval_<set>_loss`. A checkpoint holds each task as an ordinary adapter,
    and the state from which training resumes bit for bit.

    Weight decay is that of Trainer: none for norms and for biases of heads.

    Args:
        tasks: the tasks to train, whose model is the Trainer's.
        args: arguments for one process and one device, without fp16 and without `load_best_model_at_end`.
        task_column: column of the data sets with the task of each row, as a name or as a number in `tasks.names`.
        learning_rates: learning rate per task; None: `args.learning_rate` for all.
        head_learning_rate: learning rate of the heads, or a dict of one per task; None: that of the norms.
        rows_per_task: number of rows per task and batch, in batches from `TaskBatches`; None: Trainer's own batches.
        loss: `(outputs, batch) -> scalar`, called once per task with its rows; None: the model's own loss.
        patience: number of evaluations without improvement after which a task stops; None: no task stops.
        stop_on: the evaluated value that must improve, such as `"loss"` or one from `compute_metrics`.
        greater_is_better: whether larger values of it are better.
        **kwargs: arguments of Trainer, such as `train_dataset`, `eval_dataset`, `data_collator`, `compute_metrics`.

    Raises:
        ConfigError: an argument has no meaning for many tasks, or a required one is missing.
        UnsupportedError: there are several processes or devices.
    """

    def __init__(
        self,
        tasks: ManyTasks,
        args: TrainingArguments,
        *,
        task_column: str = "task",
        learning_rates: Mapping[str, float] | None = None,
        head_learning_rate: float | Mapping[str, float] | None = None,
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
        self.head_learning_rate = head_learning_rate
        self.rows_per_task, self.row_loss = rows_per_task, loss
        self.stopping = EarlyStopping(tasks.names, patience, stop_on, greater_is_better)
        collator: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = partial(_collate, collator, task_column, tasks)
        # Each loss is a mean over its own rows, so accumulated batches have equal weight.
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
            dataset: a data set with the task column, or a sequence of rows with such a key.

        Returns:
            The name of the task of each row.

        Raises:
            DataError: the data set has no task column, or the task of a row is unknown.
        """
        column = getattr(dataset, "column_names", None)
        if column is not None and self.task_column not in column:
            raise DataError(f"no column {self.task_column!r}; there are {', '.join(column)}. Give task_column.")
        # The slice reads the column at once; without it, datasets decodes row by row.
        values = dataset[self.task_column][:] if column is not None else [row[self.task_column] for row in dataset]
        return [_name(self.tasks, value) for value in values]

    def get_train_dataloader(self) -> DataLoader:
        """See `transformers.Trainer.get_train_dataloader`; with `rows_per_task`, batches are from `TaskBatches`."""
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
        """The number of steps of each task in a run.

        Args:
            steps: number of steps of the whole run.

        Returns:
            Steps by task; expected numbers where batches are drawn at random.
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
        """Create the optimizers of all tasks, of the class that `args.optim` names.

        Args:
            model: ignored; see `transformers.Trainer.create_optimizer`.

        Returns:
            The `TaskOptimizer`.
        """
        if self.task_optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = options["lr"] if self.learning_rates is None else self.learning_rates
            self.task_optimizer = self.tasks.optimizer(
                optimizer_class,
                max_grad_norm=self.args.max_grad_norm or None,
                decayed=self._is_decayed,
                head_lr=self.head_learning_rate,
                **{**options, "lr": rates, "weight_decay": self.args.weight_decay},
            )
        self.optimizer = self.task_optimizer
        return self.optimizer

    def _is_decayed(self, name: str) -> bool:
        return name.rpartition(".")[0] not in self.tasks.norms and not name.endswith("bias")

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create one schedule per task, of the kind that `args.lr_scheduler_type` names, over the task's own steps.

        Args:
            num_training_steps: number of steps of the whole run.
            optimizer: ignored; see `transformers.Trainer.create_scheduler`.

        Returns:
            The stand-in for Trainer's single schedule.
        """
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
        """The sum of the losses of the tasks with rows in the batch.

        Args:
            model: the model; see `transformers.Trainer.compute_loss` for all arguments.
            inputs: the batch, with the task column.
            return_outputs: whether to return the outputs too.
            num_items_in_batch: ignored.

        Returns:
            The loss, or the loss and the outputs.
        """
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
        """Predict a batch with the adapters of its rows.

        Args:
            model: the model; see `transformers.Trainer.prediction_step` for all arguments.
            inputs: the batch, with the task column.
            *args: further arguments of Trainer's method.
            **kwargs: further keyword arguments of Trainer's method.

        Returns:
            Loss, logits and labels, as Trainer's method returns them.
        """
        own = {name: value for name, value in inputs.items() if name != self.task_column}
        with self.tasks.route(inputs[self.task_column]):
            return super().prediction_step(model, own, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with loss and learning rate per task.

        Args:
            logs: values to log; see `transformers.Trainer.log`.
            start_time: start of training.
        """
        if "loss" in logs and self.task_optimizer is not None:
            means = {f"loss/{name}": torch.stack(each).mean().item() for name, each in self._task_losses.items()}
            rates = {f"learning_rate/{name}": rate for name, rate in self.task_optimizer.learning_rates.items()}
            # Trainer's single gradient norm and learning rate belong to no task.
            logs = {key: value for key, value in logs.items() if key not in ("grad_norm", "learning_rate")}
            logs |= means | rates
            self._task_losses = {}
        super().log(logs, start_time)

    # Evaluation.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate each task on its rows, and stop tasks that no longer improve.

        Args:
            eval_dataset: a data set, a dict of data sets, or the name of one of those given to TaskTrainer; None: the
                data set or data sets given to TaskTrainer.
            ignore_keys: keys of the model's outputs to ignore; see `transformers.Trainer.evaluate`.
            metric_key_prefix: prefix of all names, followed by the name of the data set where there are several.

        Returns:
            `<prefix>_<task>_<value>` for each task, and the mean of the tasks' losses as `<prefix>_loss`.

        Raises:
            ConfigError: there is no data set, or none of this name.
            DataError: the data set has no rows, or the task of a row is unknown.
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
        """Save each task as an ordinary adapter in a folder of its name, and all values bit for bit, to resume from.

        Args:
            output_dir: folder to save to; None: `args.output_dir`.
            _internal_call: ignored; see `transformers.Trainer.save_model`.
        """
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
            raise ConfigError(f"{resume_from_checkpoint} is not a checkpoint of a TaskTrainer: no {VALUES_FILE} found.")
        state: dict[str, dict[str, Tensor]] = {name: {} for name in self.tasks.names}
        for key, value in read_tensors(file).items():
            name, _, own = key.rpartition("/")
            state.setdefault(name, {})[own] = value
        self.tasks.load_state_dict(state)


class _Schedules:
    """Stands in for Trainer's single schedule. The schedules of tasks step with their tasks, not with this one."""

    def __init__(self, optimizer: TaskOptimizer, stopping: EarlyStopping) -> None:
        self._optimizer, self._stopping = optimizer, stopping

    def step(self) -> None:
        """Do nothing, since `TaskOptimizer.step` steps the schedules."""

    def get_last_lr(self) -> list[float]:
        return list(self._optimizer.learning_rates.values())

    def state_dict(self) -> dict[str, Any]:
        return self._stopping.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stopping.load_state_dict(state)


class _ZeroGrad(TrainerCallback):
    """Clears the gradients of tasks, which Trainer's `model.zero_grad()` does not reach."""

    def __init__(self, trainer: TaskTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
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
    """The probability that `size` of `rows` rows include at least one of `own` rows."""
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
    if by_task:  # options for Trainer's own batches
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
    """One progress bar per task, with its latest loss.

    Args:
        steps: function from the number of steps of the whole run to that of each task.
        names: names of the tasks.
    """

    def __init__(self, steps: Callable[[int], Mapping[str, int]], names: Sequence[str]) -> None:
        self._steps, self._names = steps, names
        self.bars: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bars; see `transformers.TrainerCallback.on_train_begin`."""
        totals = self._steps(state.max_steps)
        made = kwargs["optimizer"].steps
        self.bars = {
            name: tqdm(total=totals[name], initial=made[name], desc=name, unit="step", position=position)
            for position, name in enumerate(self._names)
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bars; see `transformers.TrainerCallback.on_step_end`."""
        for name, steps in kwargs["optimizer"].steps.items():
            self.bars[name].update(steps - self.bars[name].n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Show the latest losses; see `transformers.TrainerCallback.on_log`."""
        for name, bar in self.bars.items():
            if f"loss/{name}" in (logs or {}):
                bar.set_postfix(loss=f"{(logs or {})[f'loss/{name}']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bars; see `transformers.TrainerCallback.on_train_end`."""
        for bar in self.bars.values():
            bar.close()
