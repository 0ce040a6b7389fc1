"""Supervised fine-tuning of a language model through its norms, by TRL's SFTTrainer.

    python examples/sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara                    # from the Hub
    python examples/sft.py --model DIR --data-dir DIR           # train and validation files, columns as TRL knows them
    python examples/sft.py --model DIR --density 0.2            # the demo's reviews; Fisher scores choose the entries

SFTTrainer takes the config as `peft_config`, as it takes LoRA's. Where a Fisher mask is wanted it is fitted between
making the trainer and training, since the optimizer is made when training begins.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from demo_data import LABEL_NAMES, PARTS, sentences
from peft import PeftModel
from task_data import DataError, load_parts
from training import load_tokenizer, quiet
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from peft_lntune import FisherLNConfig, LNTuningConfig, fit_fisher_masks

COLUMNS = (("messages",), ("prompt", "completion"), ("text",))  # what SFTTrainer tells apart by itself


def demo_parts(seed: int) -> dict[str, datasets.Dataset]:
    """The demo's sentences as questions with an answer: whether they praise or blame."""
    return {
        part: datasets.Dataset.from_list(
            [
                {"prompt": row["sentence"] + " =>", "completion": " " + LABEL_NAMES["sentiment"][row["sentiment"]]}
                for row in sentences(part, count, seed)
            ]
        )
        for part, count in zip(PARTS, (800, 100), strict=True)
    }


def read_rows(data_dir: Path | None, dataset: str | None, seed: int) -> dict[str, datasets.Dataset]:
    """Both parts; where the Hub's data set has no validation, its last hundredth is taken."""
    if data_dir is None and dataset is None:
        return demo_parts(seed)
    if data_dir is not None:
        _, parts = load_parts(data_dir, "")
    else:
        try:
            rows = datasets.load_dataset(dataset, split="train")
        except (ConnectionError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise DataError(f"cannot load {dataset}: {error}. Give --data-dir, a folder on this machine.") from error
        split = rows.train_test_split(test_size=0.01, seed=seed)
        parts = {"train": split["train"], "validation": split["test"]}
    present = parts["train"].column_names
    if not any(set(names) <= set(present) for names in COLUMNS):
        wanted = " or ".join(", ".join(names) for names in COLUMNS)
        raise DataError(f"{data_dir or dataset} has the columns {', '.join(present)}; wanted are {wanted}")
    return parts


def make_trainer(args: argparse.Namespace, parts: dict[str, datasets.Dataset]) -> SFTTrainer:
    """What TRL's guides write for LoRA, with another config and its learning rate."""
    if args.density is None:
        config = LNTuningConfig(task_type="CAUSAL_LM")
    else:
        config = FisherLNConfig(task_type="CAUSAL_LM", density=args.density, num_samples=args.num_samples)
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=SFTConfig(
            output_dir=str(args.out),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            warmup_steps=0.1,  # a share of all steps
            max_length=args.max_length,
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        processing_class=load_tokenizer(args.model),
        peft_config=config,
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal LM: its folder with tokenizer, or its name on the Hub")
    parser.add_argument("--dataset", help="a data set on the Hub, with messages, prompts and completions, or text")
    parser.add_argument("--data-dir", type=Path, help="local train and validation files: .jsonl, .csv or .parquet")
    parser.add_argument("--density", type=float, help="tune this share of the norms, chosen by Fisher information")
    parser.add_argument("--num-samples", type=int, default=128, help="rows that Fisher scores look at; default 128")
    parser.add_argument("--max-steps", type=int, default=100, help="default 100")
    parser.add_argument("--batch-size", type=int, default=8, help="default 8")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row; default 512")
    parser.add_argument("--lr", type=float, default=5e-3, help="default 5e-3")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/sft"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, measure, save, reload."""
    args = parse_args(argv)
    quiet()
    try:
        trainer = make_trainer(args, read_rows(args.data_dir, args.dataset, args.seed))
    except DataError as error:
        raise SystemExit(f"error: {error}") from error
    if args.density is not None:
        print(fit_fisher_masks(trainer.model, trainer.get_train_dataloader()))
    trainer.model.print_trainable_parameters()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss of the validation rows: {before:.3f} before, {after:.3f} after")
    trainer.save_model(str(args.out))  # the adapter and the tokenizer

    base = AutoModelForCausalLM.from_pretrained(args.model).to(trainer.model.device)
    models = [trainer.model.eval(), PeftModel.from_pretrained(base, str(args.out)).eval()]
    ids = next(iter(trainer.get_eval_dataloader()))["input_ids"]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in models]
    if not torch.equal(*logits):
        raise RuntimeError(f"what {args.out} holds answers differently after reloading")
    print(f"reloaded {args.out}: logits are bit-equal to those after training")


if __name__ == "__main__":
    main()
