"""NormDoctor in transformers' Trainer, what it costs, and when it looks."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from peft_lntune import LNTuningConfig, UnifiedConfig
from peft_lntune.doctor import NormDoctor, NormWatch
from peft_lntune.errors import ConfigError
from tests import adapted
from tests.doctor.runs import Net, adam, net


def classifier(dtype: torch.dtype = torch.float32, **options: int) -> nn.Module:
    torch.manual_seed(0)
    config = hf.BertConfig(**{**adapted._SIZES, **options}, num_labels=3, hidden_dropout_prob=0.0)
    return hf.BertForSequenceClassification(config).to(dtype)


def rows(count: int = 64, length: int = 8) -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, adapted._SIZES["vocab_size"], (count, length), generator=drawn)
    return [{"input_ids": own, "labels": int(own.sum()) % 3} for own in ids]


def fit(model: nn.Module, folder: Path, doctor: NormDoctor, data: Any = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 12, "learning_rate": 1e-3, "per_device_train_batch_size": 4, **options}
    args = TrainingArguments(
        str(folder), use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, seed=1, **settings
    )
    trainer = Trainer(model, args, train_dataset=data or rows(), callbacks=[doctor])
    trainer.train()
    return trainer


def kinds(doctor: NormDoctor) -> set[str]:
    assert doctor.report is not None
    return {finding.kind for finding in doctor.report.findings}


def test_a_fault_is_said_early_and_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    doctor = NormDoctor(every=10)
    with caplog.at_level(logging.WARNING, logger="peft_lntune.doctor.callback"):
        fit(classifier(torch.bfloat16), tmp_path, doctor, learning_rate=1e-4, lr_scheduler_type="constant")
    said = [record.getMessage() for record in caplog.records if "NormDoctor" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("NormDoctor, step 8: too_coarse: the dtype is too coarse for the learning rate")
    assert kinds(doctor) == {"too_coarse"}
    assert doctor.report.looks == 5  # steps 1, 2, 4, 8 and 10
    assert all(name.endswith("LayerNorm.weight") for name in doctor.report.findings[0].parameters)


@pytest.mark.end_to_end
def test_ours_over_the_same_model_is_sound(tmp_path: Path) -> None:
    doctor = NormDoctor(every=4)
    model = get_peft_model(classifier(torch.bfloat16), LNTuningConfig(task_type="SEQ_CLS"))
    fit(model, tmp_path, doctor, learning_rate=1e-4, weight_decay=0.1)
    assert kinds(doctor) == set(), doctor.report
    weights, biases = doctor.report.summary.rows
    assert (weights[1], weights[4], weights[5]) == (biases[1], biases[4], biases[5]) == ("float32", 1.0, 1.0)


def lora(model: nn.Module) -> nn.Module:
    names = [name for name in adapted.norm_names(model) if "layer.1" in name]
    return get_peft_model(
        model,
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier", *names]),
    )


def lora_alone(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))


def unified(model: nn.Module) -> nn.Module:
    return get_peft_model(model, UnifiedConfig(task_type="SEQ_CLS", preset="prefix+mha-adapter+ln+lora"))


def inference(model: nn.Module, folder: Path) -> nn.Module:
    """A saved adapter, loaded without `is_trainable`, and a head that is trained."""
    get_peft_model(model, LNTuningConfig(task_type="SEQ_CLS")).save_pretrained(folder)
    made = PeftModel.from_pretrained(classifier(), folder)
    made.base_model.model.classifier.requires_grad_(True)
    return made


SOUND: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "full": (classifier, {}),
    "full, decay by Trainer": (classifier, {"weight_decay": 0.1}),
    "full, linear schedule to zero": (classifier, {"lr_scheduler_type": "linear", "warmup_steps": 6}),
    "full, autocast": (classifier, {"bf16": True, "learning_rate": 1e-5}),
    "full, accumulated": (classifier, {"gradient_accumulation_steps": 4}),
    "full, sgd": (classifier, {"optim": "sgd", "learning_rate": 1e-2}),
    "full, adafactor": (classifier, {"optim": "adafactor"}),
    "full, bfloat16 at a large rate": (lambda: classifier(torch.bfloat16), {"learning_rate": 2e-2}),
    "lora and norms": (lambda: lora(classifier()), {}),
    "lora alone": (lambda: lora_alone(classifier(torch.bfloat16)), {}),
    "unified": (lambda: unified(classifier()), {}),
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_of_trainer_is_not_accused(name: str, tmp_path: Path) -> None:
    make, options = SOUND[name]
    doctor = NormDoctor(every=5)
    fit(make(), tmp_path, doctor, **options)
    assert kinds(doctor) == set(), doctor.report
    assert bool(doctor.report.tuned) == (name != "lora alone")


@pytest.mark.end_to_end
def test_copies_in_modules_to_save_over_bfloat16(tmp_path: Path) -> None:
    """PEFT trains LoRA's own matrices in float32, and copies of norms in the dtype of the model."""
    doctor = NormDoctor(every=5)
    fit(lora(classifier(torch.bfloat16)), tmp_path, doctor, learning_rate=1e-4)
    assert kinds(doctor) == {"too_coarse"}
    assert all("modules_to_save" in name for name in doctor.report.findings[0].parameters)


@pytest.mark.end_to_end
def test_an_adapter_loaded_for_inference(tmp_path: Path) -> None:
    doctor = NormDoctor(every=5)
    fit(inference(classifier(), tmp_path / "adapter"), tmp_path, doctor)
    assert kinds(doctor) == {"frozen"}


def test_when_it_looks() -> None:
    assert [step for step in range(1, 320) if NormDoctor(100).is_look(step)] == [
        *(1, 2, 4, 8, 16, 32, 64),
        *(100, 200, 300),
    ]
    assert [step for step in range(1, 5) if NormDoctor(1).is_look(step)] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="at least 1, but is 0"):
        NormDoctor(0)


class Counting(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Net() for _ in range(layers))


def operations(layers: int) -> int:
    """Operations of one look at `4 * layers` parameters, apart from views of them and zeros for absent gradients."""
    model = Deep(layers)
    watch = NormWatch(model, adam(model.parameters()))
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    views = 2 * 4 * layers  # detach and reshape, which torch may dispatch as a view or not at all
    with Counting() as counter:
        watch.before_step()
        watch.after_step()
    return counter.operations - views


def test_the_operations_of_a_look_are_views_beside_a_constant() -> None:
    few, many = operations(1), operations(5)
    # Each look reads gradients once and values twice; per parameter nothing but views of these three.
    assert many - few <= 3 * 2 * 4 * 4
    assert few < 120


@pytest.mark.end_to_end
def test_it_takes_at_most_a_hundredth_of_the_time(tmp_path: Path) -> None:
    from time import perf_counter

    spent = 0.0
    doctor = NormDoctor(every=100)

    def timed(method: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            nonlocal spent
            begin = perf_counter()
            method(*args, **kwargs)
            spent += perf_counter() - begin

        return call

    for name in ("on_pre_optimizer_step", "on_optimizer_step"):
        setattr(doctor, name, timed(getattr(doctor, name)))
    begin = perf_counter()
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    fit(classifier(**sizes), tmp_path, doctor, rows(64, 64), max_steps=200, per_device_train_batch_size=8)
    share = spent / (perf_counter() - begin)
    assert doctor.report is not None
    assert doctor.report.looks == 9
    print(f"share of the time: {share:.5f}")
    assert share < 0.01


def test_parameters_replaced_in_the_run_are_found_again() -> None:
    model = net()
    optimizer = adam(model.parameters())
    watch = NormWatch(model, optimizer)
    for _ in range(2):
        watch.before_step()
        watch.after_step()
    model.norm1.weight = nn.Parameter(model.norm1.weight.detach().clone())
    for _ in range(3):
        model(torch.randn(4, 8)).square().sum().backward()
        watch.before_step()
        optimizer.step()
        watch.after_step()
        model.zero_grad()
    report = watch.report()
    assert report.looks == 3
    assert [(f.kind, list(f.parameters)) for f in report.findings] == [("stale_parameter", ["norm1.weight"])]


def test_the_look_after_needs_the_look_before() -> None:
    model = net()
    with pytest.raises(RuntimeError, match="call before_step first"):
        NormWatch(model, adam(model.parameters())).after_step()
