"""Tune the LayerNorms of a sentence encoder with sentence-transformers' own trainer.

    python examples/sentence_embeddings.py                         # an installed all-MiniLM-L6-v2, the demo's sentences
    python examples/sentence_embeddings.py --stsb --model sentence-transformers/all-mpnet-base-v2          # the Hub
    python examples/sentence_embeddings.py --data-dir my_data     # two sentences and a label, or pairs, or triplets

Local files have sentence1, sentence2 and label (or score), on any scale; or anchor and positive, two texts that mean
the same; or anchor, positive and negative. `SentenceTransformer.add_adapter` takes the config; training, saving and
loading do not change. The score is the rank correlation of cosine similarities with the labels; for pairs, how often
the right text is the nearest; for triplets, how often it is nearer than the wrong one.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from demo_data import PARTS, sentences
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    TranslationEvaluator,
    TripletEvaluator,
)
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss
from task_data import ENCODING, add_data_options, errors_as_text, load_parts, say
from training import ProgressBar, check_equal, default_model, quiet

from peft_lntune import LNTuningConfig
from peft_lntune.cli.data import class_names, count_cut, find_columns, find_labels, read_texts
from peft_lntune.errors import DataError

COLUMNS = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("sentence1", "sentence2", "score"),
    ("sentence1", "sentence2", "label"),
)


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


def read_pairs(data_dir: Path | None, stsb: bool, seed: int, encoding: str = ENCODING) -> dict[str, datasets.Dataset]:
    """Both parts: two sentences and a score from 0 to 1, or pairs, or triplets."""
    if data_dir is None and not stsb:
        return {part: demo_pairs(part, count, seed) for part, count in zip(PARTS, (2000, 200), strict=True)}
    sources, parts = load_parts(data_dir, "nyu-mll/glue", "stsb", encoding=encoding)
    columns = find_columns(parts["train"].column_names, COLUMNS, sources["train"])
    read: dict[str, dict[str, Any]] = {}
    for part, rows in parts.items():
        find_columns(rows.column_names, [columns], sources[part])
        texts = [column for column in columns if column not in ("score", "label")]
        read[part] = {column: read_texts(rows[column], column, sources[part]) for column in texts}
        if len(texts) < len(columns):
            if names := class_names(rows, columns[-1]):
                problem = f"{columns[-1]} holds the classes {', '.join(names)}. Write scores, which grow with likeness"
                raise DataError(f"{sources[part]}: {problem}, or pairs and triplets.")
            raw = rows[columns[-1]][:]
            read[part]["score"] = find_labels(raw, sources[part], regression=True).encode(raw, sources[part])
        elif columns == ("anchor", "positive") and len(rows) < 2:
            raise DataError(
                f"{sources[part]} has one row, and the wrong answers to an anchor are the other rows' texts."
            )
        answers = (read[part].get(column, []) for column in ("positive", "negative"))
        for i, (right, wrong) in enumerate(zip(*answers, strict=False)):
            if right == wrong:
                raise DataError(f"{sources[part]}: in row {i} positive and negative are the same text, {right!r:.60}")
    if "score" in read["train"]:  # the order counts alone, so any scale will do
        low, high = min(read["train"]["score"]), max(read["train"]["score"])
        for part in PARTS:
            read[part]["score"] = [(score - low) / (high - low) for score in read[part]["score"]]
        say(f"data: scores from {low:g} to {high:g} in the training rows become 0 to 1")
    return {part: datasets.Dataset.from_dict(columns) for part, columns in read.items()}


def make_evaluator(rows: datasets.Dataset) -> tuple[str, str, Any]:
    """What is measured on the validation rows, the name of the figure, and what measures it."""
    columns: Any = [rows[column][:] for column in rows.column_names]
    if "score" in rows.column_names:
        evaluator: Any = EmbeddingSimilarityEvaluator(*columns)
        return "rank correlation on the validation pairs", "spearman_cosine", evaluator
    if len(columns) == 2:
        evaluator = TranslationEvaluator(*columns)
        return "nearest texts that are right, of the validation pairs", "mean_accuracy", evaluator
    return "right order of the validation triplets", "cosine_accuracy", TripletEvaluator(*columns)


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
    loss = CoSENTLoss if "score" in rows.column_names else MultipleNegativesRankingLoss
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=rows, loss=loss(model), callbacks=[ProgressBar("ln")]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an encoder's name or folder; without it, an installed all-MiniLM-L6-v2")
    parser.add_argument("--stsb", action="store_true", help="the STS-B pairs of GLUE, from the Hub")
    add_data_options(parser, "a folder of local files")
    parser.add_argument("--max-length", type=int, help="tokens of a text; default: the encoder's own")
    parser.add_argument("--max-steps", type=int, default=100, help="default 100")
    parser.add_argument("--batch-size", type=int, default=16, help="default 16")
    parser.add_argument("--lr", type=float, default=1e-3, help="default 1e-3")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/sentence_embeddings"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, measure, save, reload."""
    args = parse_args(argv)
    quiet()
    transformers.set_seed(args.seed)
    with errors_as_text():
        parts = read_pairs(args.data_dir, args.stsb, args.seed, args.encoding)
        model = load_encoder(args.model)
    model.max_seq_length = args.max_length or model.max_seq_length
    held_out = parts["validation"]
    counts = " and ".join(f"{len(rows):,} {part} rows" for part, rows in parts.items())
    cut = sum(
        count_cut(model.tokenizer, [rows[column]], model.max_seq_length)
        for rows in parts.values()
        for column in rows.column_names
        if column != "score"
    )
    say(f"data: {counts} of {', '.join(held_out.column_names)}; {cut:,} texts are cut at {model.max_seq_length} tokens")
    model.add_adapter(LNTuningConfig(task_type="FEATURE_EXTRACTION"))
    tuned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{tuned:,} of {sum(p.numel() for p in model.parameters()):,} parameters are tuned")

    what, figure, evaluator = make_evaluator(held_out)
    evaluator.write_csv = False
    before = evaluator(model)[figure]
    make_trainer(args, model, parts["train"]).train()
    after = evaluator(model)[figure]
    print(f"{what}: {before:.3f} before, {after:.3f} after")

    model.save_pretrained(str(args.out))  # the adapter, and what sentence-transformers needs around it
    again = SentenceTransformer(str(args.out))
    texts = held_out[held_out.column_names[0]][:64]
    check_equal(again.encode(texts), model.encode(texts), args.out, "embeddings")


if __name__ == "__main__":
    main()
