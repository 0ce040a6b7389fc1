"""Tune the LayerNorms and the head of a vision transformer to classify images, with transformers' Trainer.

    python examples/image_classification.py                                  # a tiny random ViT, drawings made here
    python examples/image_classification.py --model google/vit-base-patch16-224-in21k --dataset uoft-cs/cifar10
    python examples/image_classification.py --model DIR --data-dir my_images       # train/CLASS/*.png, validation/...

The saved deltas and head are loaded into a fresh model, whose predictions must equal the trained model's bit for bit.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from image_data import add_image_options, read_images
from methods import HEAD_LR, find_head
from metrics import score
from peft import PeftModel, get_peft_model
from task_data import entropy, errors_as_text, metrics_of
from training import ProgressBar, check_equal, head_rate, quiet, warn_of_chance
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from peft_lntune import LNTuningConfig
from peft_lntune.errors import DataError

TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def load_model(model: str | None, classes: list[str], seed: int) -> tuple[Any, Any]:
    """The checkpoint with a fresh head for these classes, the same for equal seeds; and what makes its inputs."""
    transformers.set_seed(seed)
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    if model is None:
        config = ViTConfig(**TINY, intermediate_size=96, num_labels=len(classes), **names)
        return ViTForImageClassification(config), ViTImageProcessorPil(size={"height": 32, "width": 32})
    try:
        processor = AutoImageProcessor.from_pretrained(model)
        base = AutoModelForImageClassification.from_pretrained(
            model, num_labels=len(classes), ignore_mismatched_sizes=True, **names
        )
    except OSError as error:
        raise DataError(f"no model {model!r}: {error} Or give --model a folder on this machine.") from error
    return base, processor


def collator(processor: Any) -> Callable[[list[dict]], dict]:
    """Rows to a batch: pixels (B, 3, height, width) and labels (B,)."""

    def collate(rows: list[dict]) -> dict:
        images = [row["image"].convert("RGB") for row in rows]
        labels = torch.tensor([row["label"] for row in rows])
        return {**processor(images=images, return_tensors="pt"), "labels": labels}

    return collate


def make_trainer(args: argparse.Namespace, model: Any, parts: dict, processor: Any) -> Trainer:
    """Trainer as for any model, with a learning rate of its own for the head."""
    counts = np.bincount(parts["train"]["label"][:], minlength=len(parts["train"].features["label"].names))
    kind = metrics_of(counts)
    arguments = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=2 * args.batch_size,
        learning_rate=args.lr,
        warmup_steps=0.1,  # a share of all steps
        seed=args.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,  # the collator reads the images
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collator(processor),
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        compute_metrics=lambda found: score(kind, found.predictions.argmax(-1).tolist(), found.label_ids.tolist()),
        callbacks=[ProgressBar("ln")],
        optimizer_cls_and_kwargs=head_rate(arguments, model, args.head_learning_rate),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's name or folder; without it, a tiny random ViT")
    add_image_options(parser)
    parser.add_argument("--max-steps", type=int, default=200, help="default 200")
    parser.add_argument("--batch-size", type=int, default=16, help="default 16")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the norms; default 1e-3")
    parser.add_argument("--head-learning-rate", type=float, default=HEAD_LR, help=f"default {HEAD_LR:g}")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/image_classification"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, measure, save, reload."""
    args = parse_args(argv)
    quiet()
    with errors_as_text():
        parts = read_images(args.data_dir, args.dataset, seed=args.seed)
        classes = parts["train"].features["label"].names
        base, processor = load_model(args.model, classes, args.seed)
    model = get_peft_model(base, LNTuningConfig(modules_to_save=find_head(base)))
    model.print_trainable_parameters()

    trainer = make_trainer(args, model, parts, processor)
    before = trainer.evaluate()
    trainer.train()
    labels = parts["train"]["label"][:]
    warn_of_chance("ln", args.lr, entropy(np.bincount(labels) / len(labels)), trainer)
    after = trainer.evaluate()
    for name in ("loss", *(name for name in ("accuracy", "macro_f1", "majority") if f"eval_{name}" in after)):
        figures = [figure[f"eval_{name}"] for figure in (before, after)]
        print("{} of the validation images: {:.3f} before, {:.3f} after".format(name, *figures))

    model.save_pretrained(str(args.out))
    fresh, _ = load_model(args.model, classes, args.seed)
    again = make_trainer(args, PeftModel.from_pretrained(fresh, str(args.out)), parts, processor)
    trained, reloaded = (np.asarray(t.predict(parts["validation"]).predictions) for t in (trainer, again))
    check_equal(reloaded, trained, args.out, f"all {len(trained)} logits")


if __name__ == "__main__":
    main()
