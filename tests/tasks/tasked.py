"""Tasks for the tests: tiny models with an adapter a task, batches, and each task trained alone as PEFT would."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_lntune import LNTuningConfig, ManyTasks
from tests import adapted, cases

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {**adapted._SIZES, "num_labels": 3}
MADE: dict[str, Callable[[], nn.Module]] = {
    "tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES)),
    "answers": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**{**SIZES, "num_labels": 2})),
    "values": lambda: hf.BertForSequenceClassification(hf.BertConfig(**{**SIZES, "num_labels": 1})),
    "several": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**SIZES, problem_type="multi_label_classification")
    ),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**SIZES, embedding_size=8)),
}
HEADS = {
    "bert-classifier": ["classifier"],
    "roberta-classifier": ["classifier"],
    "electra": ["classifier"],
    "llama-classifier": ["score"],
    "tokens": ["classifier"],
    "answers": ["qa_outputs"],
    "values": ["classifier"],
    "several": ["classifier"],
}
Batch = dict[str, Tensor]


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny frozen model without dropout."""
    if family in MADE:
        torch.manual_seed(0)
        model = MADE[family]().eval().requires_grad_(False).to(dtype)
    else:
        model = adapted.build(family, dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def tasked(family: str, *names: str, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A model in training mode with an adapter a task, of small random deltas, and with heads where it has one."""
    configs = {"modules_to_save": HEADS.get(family)} | options
    first, *others = names or ("a", "b", "c")
    model = get_peft_model(build(family, dtype), LNTuningConfig(**configs), adapter_name=first)
    for name in others:
        model.add_adapter(name, LNTuningConfig(**configs))
    for seed, name in enumerate((first, *others)):
        adapted.fill(model, name, 0.05, seed)
    return model.train()


def labelled(family: str, rows: int, seed: int) -> Batch:
    """A batch of padded rows with labels, an uneven number of them counted where labels are tokens."""
    torch.manual_seed(seed)
    encoder_only = family in MADE or family in adapted.HEADED
    batch = cases.inputs("bert" if encoder_only else family, rows, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = batch["input_ids"]
    if family in ("tokens", "bert", "llama", "t5"):
        labels = torch.randint(3 if family == "tokens" else cases.VOCAB, ids.shape, generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.5] = -100
        labels[:, -1] = 1  # each row has one at least
        batch.pop("decoder_input_ids", None)
        return {**batch, "labels": labels}
    if family == "answers":
        places = torch.randint(9, (2, rows), generator=generator)  # of 7 tokens: some are outside
        places[:, 0] = 2
        return {**batch, "start_positions": places[0], "end_positions": places[1]}
    if family == "values":
        return {**batch, "labels": torch.randn(rows, generator=generator)}
    if family == "several":
        return {**batch, "labels": torch.randint(2, (rows, 3), generator=generator).float()}
    return {**batch, "labels": torch.randint(3, (rows,), generator=generator)}


PLAN = [["a", "b", "a", "c"], ["b", "b", "a", "a"], ["c", "a", "c", "c"], ["a", "c", "b", "a"]]
"""The tasks of the rows in each step: uneven, and one is absent in some."""


def together(
    model: PeftModel, family: str, plan: Sequence[Sequence[str]], optimizer: Any, **options: Any
) -> dict[str, list[float]]:
    """Train all tasks at once, in place; return their losses."""
    found: dict[str, list[float]] = {}
    with ManyTasks(model) as tasks:
        torch_optimizer = tasks.optimizer(optimizer, **options)
        for step, names in enumerate(plan):
            batch = labelled(family, len(names), step)
            with tasks.route(names):
                losses = tasks.losses(model(**batch), batch)
            sum(losses.values()).backward()
            torch_optimizer.step()
            torch_optimizer.zero_grad()
            for name, loss in losses.items():
                found.setdefault(name, []).append(loss.item())
    return found


def separately(
    model: PeftModel,
    family: str,
    plan: Sequence[Sequence[str]],
    optimizer: Any,
    max_grad_norm: float | None = None,
    schedule: Any = None,
    **options: Any,
) -> dict[str, list[float]]:
    """The slow and obvious way: each task trained alone in PEFT's way, in place, on its rows; return their losses."""
    found: dict[str, list[float]] = {}
    for name in sorted({name for names in plan for name in names}):
        model.set_adapter(name)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        own = {key: value[name] if isinstance(value, dict) else value for key, value in options.items()}
        torch_optimizer = optimizer(parameters, **own)
        scheduler = None if schedule is None else schedule(torch_optimizer)
        for step, names in enumerate(plan):
            rows = [row for row, owner in enumerate(names) if owner == name]
            if not rows:
                continue
            batch = {key: value[rows] for key, value in labelled(family, len(names), step).items()}
            loss = model(**batch).loss
            loss.backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            torch_optimizer.step()
            torch_optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            found.setdefault(name, []).append(loss.item())
    return found


def trained(model: PeftModel, names: Sequence[str] = ("a", "b", "c")) -> dict[str, Tensor]:
    """What the adapters hold, by their names in the model."""
    state = model.state_dict()
    return {key: value.clone() for key, value in state.items() if any(f".{name}." in f"{key}." for name in names)}


def assert_as_alone(model: PeftModel, family: str, optimizer: Any, plan: Any = PLAN, **options: Any) -> None:
    """All at once gives the losses and the values that each task has alone."""
    other = deepcopy(model)
    before = trained(model)
    expected = separately(other, family, plan, optimizer, **options)
    losses = together(model, family, plan, optimizer, **options)
    assert losses.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(losses[name]), torch.tensor(values), **CLOSE)
    found, wanted = trained(model), trained(other)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    moved = [key for key, value in before.items() if not torch.equal(value, found[key])]
    assert len(moved) > len(before) / 2
