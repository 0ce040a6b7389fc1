"""Tune a sentence encoder through its LayerNorms, by sentence-transformers' own trainer.

    python examples/sentence_embeddings.py                         # an installed all-MiniLM-L6-v2, the demo's sentences
    python examples/sentence_embeddings.py --stsb --model sentence-transformers/all-mpnet-base-v2          # the Hub
    python examples/sentence_embeddings.py --data-dir my_data     # sentence1, sentence2, label: similarity from 0 to 5

`SentenceTransformer.add_adapter` takes the config; training, saving and loading are as without. The figure is the rank
correlation of cosine similarities with the labels.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from demo_data import PARTS, sentences
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from task_data import DataError, read_data
from training import ProgressBar, default_model, quiet

from peft_lntune import LNTuningConfig

MOST = 5.0  # the highest similarity, as in STS-B


def demo_pairs(part: str, count: int, seed: int) -> datasets.Dataset:
    """Pairs of the demo's sentences: a score of 1 where topic and mood are the same, 0.5 where one of them is."""
    rows = [*sentences(part, count, seed)]
    pairs = [*zip(rows, random.Random(seed).sample(rows, count), strict=True)]
    return datasets.Dataset.from_dict(
        {
            "sentence1": [one["sentence"] for one, _ in pairs],
            "sentence2": [other["sentence"] for _, other in pairs],
            "score": [sum(one[name] == other[name] for name in ("topic", "sentiment")) / 2 for one, other in pairs],
        }
    )


def read_pairs(data_dir: Path | None, stsb: bool, seed: int) -> dict[str, datasets.Dataset]:
    """Both parts, with two sentences and a score from 0 to 1."""
    if data_dir is None and not stsb:
        return {part: demo_pairs(part, count, seed) for part, count in zip(PARTS, (2000, 200), strict=True)}
    data = read_data("stsb", data_dir)
    parts = {"train": data.train, "validation": data.validation}
    return {
        part: datasets.Dataset.from_dict(
            {
                "sentence1": rows["sentence1"][:],
                "sentence2": rows["sentence2"][:],
                "score": [label / MOST for label in rows["label"]],
            }
        )
        for part, rows in parts.items()
    }


def load_encoder(model: str | None) -> SentenceTransformer:
    """The checkpoint, or an installed all-MiniLM-L6-v2."""
    try:
        return SentenceTransformer(model or default_model())
    except OSError as error:
        raise DataError(f"no model {model!r}: {error} Or give --model a folder on this machine.") from error


def make_trainer(
    args: argparse.Namespace, model: SentenceTransformer, rows: datasets.Dataset
) -> SentenceTransformerTrainer:
    """The trainer as for any sentence encoder."""
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(args.out),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        warmup_steps=0.1,  # a share of all steps
        seed=args.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=rows, loss=CoSENTLoss(model), callbacks=[ProgressBar("ln")]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an encoder's name or folder; without it, an installed all-MiniLM-L6-v2")
    parser.add_argument("--stsb", action="store_true", help="the STS-B pairs of GLUE, from the Hub")
    parser.add_argument("--data-dir", type=Path, help="local train and validation files: .jsonl, .csv or .parquet")
    parser.add_argument("--max-steps", type=int, default=100, help="default 100")
    parser.add_argument("--batch-size", type=int, default=16, help="default 16")
    parser.add_argument("--lr", type=float, default=2e-3, help="default 2e-3")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/sentence_embeddings"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, measure, save, reload."""
    args = parse_args(argv)
    quiet()
    transformers.set_seed(args.seed)
    try:
        parts = read_pairs(args.data_dir, args.stsb, args.seed)
        model = load_encoder(args.model)
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    model.add_adapter(LNTuningConfig(task_type="FEATURE_EXTRACTION"))
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{tuned:,} of {sum(p.numel() for p in model.parameters()):,} parameters are tuned")

    held_out = parts["validation"]
    evaluator = EmbeddingSimilarityEvaluator(
        held_out["sentence1"][:], held_out["sentence2"][:], held_out["score"][:], write_csv=False
    )
    before = evaluator(model)["spearman_cosine"]
    make_trainer(args, model, parts["train"]).train()
    after = evaluator(model)["spearman_cosine"]
    print(f"rank correlation on the validation pairs: {before:.3f} before, {after:.3f} after")

    model.save_pretrained(str(args.out))  # the adapter, and what sentence-transformers needs around it
    again = SentenceTransformer(str(args.out))
    texts = held_out["sentence1"][:64]
    if not np.array_equal(model.encode(texts), again.encode(texts)):
        raise RuntimeError(f"what {args.out} holds answers differently after reloading")
    print(f"reloaded {args.out}: embeddings are bit-equal to those after training")


if __name__ == "__main__":
    main()
