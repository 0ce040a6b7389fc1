"""transformers' Trainer for many tasks: as each alone, per task logs and stops, checkpoints that go on bit for bit."""

import math
import re

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from peft_lntune import ManyTasks
from peft_lntune.errors import AdapterFileError, ConfigError, DataError
from peft_lntune.tasks.batches import TaskBatches
from peft_lntune.tasks.trainer import TaskTrainer
from tests.tasks.tasked import CLOSE, build, labelled, tasked, trained

FAMILY = "bert-classifier"
SIZES = {"a": 6, "b": 3, "c": 5}


def dataset(sizes=SIZES, numbers=False, seed=0):
    rows = []
    for number, (name, size) in enumerate(sizes.items()):
        batch = labelled(FAMILY, size, seed + number)
        for row in range(size):
            own = {key: value[row].tolist() for key, value in batch.items()}
            rows.append({**own, "task": number if numbers else name, "extra": "not for the model"})
    return Dataset.from_list(rows)


def arguments(folder, **options):
    fixed = {"learning_rate": 1e-2, "num_train_epochs": 2, "logging_steps": 1, "report_to": "none", "seed": 3}
    fixed |= {"disable_tqdm": True, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True}
    return TrainingArguments(str(folder), **{**fixed, **options})


def train(folder, tasks=None, resume=None, arguments_of=None, **options):
    tasks = ManyTasks(tasked(FAMILY)) if tasks is None else tasks
    options = {"train_dataset": dataset(), "rows_per_task": 2} | options
    trainer = TaskTrainer(tasks, arguments(folder, **(arguments_of or {})), **options)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def alone(folder, name, model, rate=1e-2, **options):
    """The task by itself, with Trainer as it is, on the batches that it has among the others."""
    model.set_adapter(name)
    own = dataset().filter(lambda row: row["task"] == name)
    batches = TaskBatches(own["task"], 2, seed=3)

    class OwnBatches(Trainer):
        def get_train_dataloader(self):
            rows = own.remove_columns(["task", "extra"])
            loader = torch.utils.data.DataLoader(rows, batch_sampler=batches, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    trainer = OwnBatches(model, arguments(folder, learning_rate=rate, **options), train_dataset=own)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.end_to_end),
        {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 1},
    ],
    ids=str,
)
def test_each_task_is_as_alone_with_trainer(tmp_path, options):
    rates = {"a": 1e-2, "b": 3e-2, "c": 1e-3}
    trainer = train(tmp_path, learning_rates=rates, arguments_of={**options, "max_grad_norm": 0.2})
    trainer.tasks.close()
    found, model = trained(trainer.tasks.model), tasked(FAMILY)
    logs = trainer.state.log_history
    for name, rate in rates.items():
        losses = alone(tmp_path, name, model, rate, max_grad_norm=0.2, **options)
        # Trainer rounds what it logs.
        own = [entry[f"loss/{name}"] for entry in logs if f"loss/{name}" in entry]
        torch.testing.assert_close(torch.tensor(own), torch.tensor(losses), rtol=1e-3, atol=1e-3)
    for key, value in trained(model).items():
        torch.testing.assert_close(found[key], value, **CLOSE)


@pytest.mark.end_to_end
def test_logs_bars_and_learning_rates(tmp_path, capfd):
    trainer = train(tmp_path, arguments_of={"disable_tqdm": False})
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["loss"] == pytest.approx(sum(first[f"loss/{name}"] for name in "abc"), rel=1e-3)
    assert "learning_rate" not in first
    assert "grad_norm" not in first
    # Six rows by two a batch are three steps an epoch; three are two.
    assert trainer.task_optimizer.steps == {"a": 6, "b": 4, "c": 6}
    assert [last[f"learning_rate/{name}"] for name in "abc"] == [0, 0, 0]
    bars = capfd.readouterr().err
    assert re.search(r"a: 100%.*6/6", bars)
    assert re.search(r"b: 100%.*4/4", bars)
    train(tmp_path)
    assert "6/6" not in capfd.readouterr().err


@pytest.mark.end_to_end
def test_batches_of_trainers_own_and_numbers_as_tasks(tmp_path):
    trainer = train(tmp_path, train_dataset=dataset(numbers=True), rows_per_task=None)
    assert trainer.state.global_step == 2 * math.ceil(14 / 4)
    steps = trainer.task_optimizer.steps
    assert all(0 < count <= 8 for count in steps.values())
    assert trainer.steps_of_tasks(8)["b"] == math.ceil(8 * (1 - math.comb(11, 4) / math.comb(14, 4)))


@pytest.mark.end_to_end
def test_gradient_accumulation(tmp_path):
    trainer = train(tmp_path, arguments_of={"gradient_accumulation_steps": 2})
    assert trainer.state.global_step == 4
    assert trainer.task_optimizer.steps == {"a": 4, "b": 2, "c": 4}


@pytest.mark.parametrize("rows_per_task", [2, pytest.param(None, marks=pytest.mark.end_to_end)])
def test_going_on_is_bit_equal_to_not_having_stopped(tmp_path, rows_per_task):
    def tasks():
        model = tasked(FAMILY)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        return ManyTasks(model)

    saving = {"save_strategy": "steps", "save_steps": 2}
    evaluated = {"eval_dataset": dataset(seed=7), "patience": 2, "rows_per_task": rows_per_task}
    saving |= {"eval_strategy": "steps", "eval_steps": 1}
    whole = train(tmp_path / "whole", tasks(), arguments_of=saving, **evaluated)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = train(tmp_path / "again", tasks(), str(checkpoint), arguments_of=saving, **evaluated)
    first, second = whole.tasks.state_dict(), again.tasks.state_dict()
    assert all(torch.equal(first[name][key], second[name][key]) for name in first for key in first[name])
    assert whole.stopping.state_dict() == again.stopping.state_dict()
    assert whole.task_optimizer.steps == again.task_optimizer.steps
    assert sorted(place.name for place in checkpoint.iterdir() if place.is_dir()) == ["a", "b", "c"]
    loaded = PeftModel.from_pretrained(build(FAMILY), checkpoint / "b", adapter_name="b")
    start = trained(tasked(FAMILY), ["b"])
    assert any(not torch.equal(value, start[key]) for key, value in trained(loaded, ["b"]).items())


def test_evaluation_is_of_each_task(tmp_path):
    rows = dataset(seed=7)
    trainer = train(tmp_path, eval_dataset=rows, compute_metrics=lambda found: {"rows": len(found.label_ids)})
    metrics = trainer.evaluate()
    assert [metrics[f"eval_{name}_rows"] for name in "abc"] == [6, 3, 5]
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_{name}_loss"] for name in "abc") / 3)
    trainer.tasks.close()
    model = trainer.tasks.model.eval()
    model.set_adapter("b")
    batch = labelled(FAMILY, 3, 8)
    with torch.no_grad():
        assert metrics["eval_b_loss"] == pytest.approx(model(**batch).loss.item(), abs=1e-5)


@pytest.mark.end_to_end
def test_several_evaluation_sets(tmp_path):
    sets = {"near": dataset(seed=7), "far": dataset({"a": 2, "b": 2}, seed=9)}
    trainer = train(tmp_path, eval_dataset=sets, arguments_of={"eval_strategy": "epoch", "num_train_epochs": 1})
    (logged,) = (entry for entry in trainer.state.log_history if "eval_near_a_loss" in entry)
    metrics = trainer.evaluate()
    assert metrics["eval_near_a_loss"] == logged["eval_near_a_loss"]
    by_set = {name: trainer.evaluate(rows, metric_key_prefix=name) for name, rows in sets.items()}
    assert by_set["near"]["near_c_loss"] == metrics["eval_near_c_loss"]
    assert by_set["far"]["far_loss"] == metrics["eval_far_loss"]
    assert "eval_far_c_loss" not in metrics
    assert trainer.evaluate("far", metric_key_prefix="x")["x_b_loss"] == metrics["eval_far_b_loss"]
    given = trainer.evaluate({"own": sets["near"]})
    assert given["eval_own_loss"] == metrics["eval_near_loss"]
    assert "eval_near_loss" not in given
    with pytest.raises(ConfigError, match="eval_dataset='none' is not among the evaluation sets near, far"):
        trainer.evaluate("none")
    with pytest.raises(DataError, match="evaluation set has no rows"):
        trainer.evaluate([])


@pytest.mark.parametrize(("seeds", "same"), [((0, 0), True), ((0, 1), False), ((None, None), False)], ids=str)
def test_data_seed_is_a_seed(seeds, same, tmp_path):
    orders = []
    for seed, data_seed in enumerate(seeds):
        own = arguments(tmp_path, seed=seed, data_seed=data_seed)
        tasks = ManyTasks(tasked(FAMILY))
        trainer = TaskTrainer(tasks, own, train_dataset=dataset({"a": 40}), rows_per_task=40)
        orders.append([batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()])
        tasks.close()
    assert (orders[0] == orders[1]) is same


@pytest.mark.end_to_end
def test_columns_that_are_not_for_the_model_are_left_out(tmp_path):
    """As Trainer does it, of rows that come as dicts too; this collator would stop at text."""
    seen = []

    def collator(rows):
        seen.append(set(rows[0]))
        return transformers.default_data_collator(rows)

    for rows in (dataset(), [*dataset()]):
        train(tmp_path, train_dataset=rows, data_collator=collator, arguments_of={"max_steps": 1})
    assert all("extra" not in names and "input_ids" in names for names in seen)


def test_a_task_that_no_longer_improves_stops_and_the_rest_goes_on(tmp_path):
    seen = []

    def worse_for_b(found):
        seen.append(len(found.label_ids))
        return {"score": -len(seen) if len(found.label_ids) == 3 else len(seen)}

    options = {"eval_dataset": dataset(seed=7), "compute_metrics": worse_for_b, "patience": 1, "stop_on": "score"}
    each_step = {"eval_strategy": "steps", "eval_steps": 1}
    trainer = train(tmp_path, greater_is_better=True, arguments_of=each_step, **options)
    assert trainer.task_optimizer.active == ["a", "c"]
    assert trainer.task_optimizer.steps == {"a": 6, "b": 2, "c": 6}
    trainer = train(tmp_path, greater_is_better=False, arguments_of=each_step, **options)
    assert trainer.task_optimizer.active == ["b"]
    with pytest.raises(ConfigError, match="stop_on='none', but the evaluation has eval_a_loss"):
        train(tmp_path, arguments_of=each_step, **{**options, "stop_on": "none"})


def test_when_all_have_stopped_training_ends(tmp_path):
    options = {"eval_dataset": dataset(seed=7), "compute_metrics": lambda found: {"score": 0}, "patience": 1}
    trainer = train(tmp_path, stop_on="score", arguments_of={"eval_strategy": "steps", "eval_steps": 1}, **options)
    assert trainer.task_optimizer.active == []
    assert trainer.state.global_step == 2


def test_prediction_is_by_the_task_of_each_row(tmp_path):
    trainer = train(tmp_path)
    found = trainer.predict(dataset(seed=7)).predictions
    with trainer.tasks.route("c"), torch.no_grad():
        own = trainer.tasks.model.eval()(**labelled(FAMILY, 5, 9)).logits
    torch.testing.assert_close(torch.tensor(found[9:]), own, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments_of": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor=0.1 has no meaning"),
        ({"arguments_of": {"train_sampling_strategy": "group_by_length"}}, "no meaning with rows_per_task"),
        ({"arguments_of": {"dataloader_drop_last": True}}, "dataloader_drop_last=True has no meaning"),
        ({"arguments_of": {"auto_find_batch_size": True}}, "auto_find_batch_size=True has no meaning"),
        (
            {"arguments_of": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}},
            "follows one evaluated value for all tasks",
        ),
        ({"arguments_of": {"metric_for_best_model": "loss"}}, "metric_for_best_model='loss' has no meaning"),
        (
            {"arguments_of": {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}},
            "dataloader_persistent_workers=True has no meaning",
        ),
        ({"patience": 1, "eval_dataset": {"x": dataset(), "y": dataset()}}, "looks at one evaluation set"),
        ({"model_init": None}, "model_init is not for TaskTrainer"),
        ({"patience": 0}, "patience=0 should be a number of evaluations"),
        ({"rows_per_task": 0}, "rows=0 should be a number of rows"),
        ({"learning_rates": {"a": 1.0}}, "lr lacks 'b'"),
        ({"train_dataset": None}, "training needs a train_dataset"),
    ],
    ids=str,
)
def test_what_it_refuses(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, **options)


def test_data_it_refuses(tmp_path):
    with pytest.raises(DataError, match="no column 'which'; there are input_ids"):
        train(tmp_path, task_column="which")
    with pytest.raises(DataError, match="a row is of task 'x'; there are a, b, c"):
        train(tmp_path, train_dataset=dataset({"x": 2}))
    with pytest.raises(DataError, match="a row is of task 3"):
        train(tmp_path, train_dataset=dataset(numbers=True).map(lambda row: {"task": 3}))
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ConfigError, match=r"is not a checkpoint of a TaskTrainer: no tasks\.safetensors found"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-1" / "tasks.safetensors").touch()
    with pytest.raises(AdapterFileError, match=r"tasks\.safetensors is damaged or cut off"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-1"))
    trainer = train(tmp_path)
    with pytest.raises(ConfigError, match="evaluation needs an eval_dataset"):
        trainer.evaluate()


class TestBatches:
    def test_each_task_sees_what_it_would_see_alone(self):
        tasks = ["a", "b", "a", "a", "b", "a", "a", "c"]
        for epoch in range(2):
            mixed = TaskBatches(tasks, 2, seed=5)
            mixed.set_epoch(epoch)
            own = [[row for row in batch if tasks[row] == "a"] for batch in mixed]
            places = [row for row, task in enumerate(tasks) if task == "a"]
            single = TaskBatches(["a"] * 5, 2, seed=5)
            single.set_epoch(epoch)
            assert own == [[places[row] for row in batch] for batch in single]
            assert sorted(row for batch in mixed for row in batch) == list(range(8))
        orders = {str(list(TaskBatches(["a"] * 9, 9, seed))) for seed in range(4)}
        assert len(orders) == 4

    def test_it_needs_rows(self):
        with pytest.raises(ConfigError, match="the data set has no rows"):
            TaskBatches([], 2)
