"""A run that may be killed: it goes on from the last whole checkpoint in its folder, and ends with the folder `final`.

Runs are forked off a server that has imported everything once, so that a run takes about as long as its steps do.
"""

import multiprocessing
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset

from peft_lntune import FisherLNConfig, LNTuningConfig, ManyTasks, SupermaskConfig, UnifiedConfig, fit_fisher_masks
from peft_lntune.interop import last_whole_checkpoint
from peft_lntune.tasks.trainer import TaskTrainer

ROWS, BATCH, EPOCHS, EVERY = 16, 4, 3, 2  # 12 steps, with checkpoints within epochs and at their ends
ERROR_FILE = "error.txt"
STEPS = ROWS // BATCH * EPOCHS
LAST, BEFORE = f"checkpoint-{STEPS}", f"checkpoint-{STEPS - EVERY}"

CONFIGS: dict[str, Callable[[], Any]] = {
    "ln": lambda: LNTuningConfig(task_type="SEQ_CLS"),
    "fisher": lambda: FisherLNConfig(task_type="SEQ_CLS", density=0.3, num_samples=8),
    "supermask": lambda: SupermaskConfig(task_type="SEQ_CLS", components=["query", "ffn_up"], save_scores=True),
    "unified": lambda: UnifiedConfig(task_type="SEQ_CLS", preset="prefix+mha-adapter+ln+lora"),
}
TASKS = ("a", "b", "c")
CASES = (*CONFIGS, "tasks")


class Sentences(Dataset):
    """Sentences of random tokens, each with its label and its task."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, 50, (ROWS, 6), generator=drawn)
        self.labels = torch.randint(3, (ROWS,), generator=drawn)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.ids[row], "labels": self.labels[row], "task": row % len(TASKS)}


def build_base() -> nn.Module:
    """The same tiny model in every run, with dropout: how it goes on depends on the state of the generator."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes, vocab_size=50, num_labels=3))


def build(case: str) -> PeftModel:
    """The model of a case as it starts."""
    names = TASKS if case == "tasks" else ("default",)
    config = CONFIGS["ln" if case == "tasks" else case]
    model = get_peft_model(build_base(), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    if case == "fisher":
        rows = Sentences()
        fit_fisher_masks(model, [{"input_ids": rows.ids[:8], "labels": rows.labels[:8]}])
    return model


def train(case: str, folder: Path) -> None:
    """What a user's script does, from its first line to its last."""
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=0.02,
        weight_decay=0.01,
        save_strategy="steps",
        save_steps=EVERY,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=1,
    )
    model = build(case)
    last = last_whole_checkpoint(folder)
    if case == "tasks":
        with ManyTasks(model) as tasks:
            TaskTrainer(tasks, arguments, train_dataset=Sentences()).train(resume_from_checkpoint=last)
    else:
        trainer = hf.Trainer(model, arguments, train_dataset=Sentences(), data_collator=_collate)
        trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(str(folder / "final"))


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return hf.default_data_collator([{key: value for key, value in row.items() if key != "task"} for row in rows])


def _run(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        train(case, folder)
    except BaseException:
        (folder / ERROR_FILE).write_text(traceback.format_exc())
        raise


def run(case: str, folder: Path, seconds: float | None = None) -> tuple[bool, float]:
    """Run a case to its end, or kill it with SIGKILL after so many seconds.

    Returns:
        Whether it was killed, and how long it ran.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(case, folder))
    process.start()  # it waits for the server
    begin = time.perf_counter()
    process.join(seconds)
    process.kill()
    process.join()
    killed = process.exitcode == -signal.SIGKILL
    if not killed and process.exitcode:
        raise RuntimeError((folder / ERROR_FILE).read_text())
    return killed, time.perf_counter() - begin
