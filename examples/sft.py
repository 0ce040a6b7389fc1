"""Supervised fine-tuning of a language model through its norms, by TRL's SFTTrainer.

    python examples/sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara                    # from the Hub
    python examples/sft.py --model DIR --data-dir DIR           # train and validation files, columns as TRL knows them
    python examples/sft.py --model DIR --density 0.2            # the demo's reviews; Fisher scores choose the entries

Rows hold `messages` (a chat, which needs a chat template), `prompt` and `completion`, or `text`.

SFTTrainer takes the config as `peft_config`, like LoRA's. A Fisher mask is fitted after creating the trainer and before
training, since the optimizer is created when training begins.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from demo_data import LABEL_NAMES, PARTS, sentences
from jinja2 import TemplateError
from peft import PeftModel
from task_data import ENCODING, add_data_options, errors_as_text, hub_parts, load_parts, say
from training import check_equal, load_tokenizer, quiet
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from peft_lntune import FisherLNConfig, LNTuningConfig, fit_fisher_masks
from peft_lntune.cli.data import find_columns
from peft_lntune.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
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


def check_value(value: Any, where: str, *, chat: bool, answer: bool) -> None:
    """Refuse what is neither text nor a chat, what is empty, and an answer that is not the assistant's."""
    if not chat:
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where} is empty or no text: {value!r:.80}. Fill it in or remove the row.")
        return
    if not isinstance(value, list) or not value:
        raise DataError(f'{where} has to be a list of turns {{"role": ..., "content": ...}}, and is {value!r:.80}')
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise DataError(f'{where} has to hold turns {{"role": ..., "content": ...}}, and one is {turn!r:.80}')
        if turn["role"] not in ROLES:
            raise DataError(f"{where} has the role {turn['role']!r}; a role is one of {', '.join(ROLES)}")
        content = turn["content"]
        empty = not content.strip() if isinstance(content, str) else not isinstance(content, list) or not content
        if empty and not turn.get("tool_calls"):
            raise DataError(f"{where} has a turn without text: {turn!r:.80}. Fill it in or remove the row.")
    if answer and value[-1]["role"] != "assistant":
        raise DataError(f"{where} has no last turn of the assistant, so there is nothing to learn from it")


def read_rows(
    data_dir: Path | None, dataset: str | None, seed: int, encoding: str = ENCODING
) -> dict[str, datasets.Dataset]:
    """Both parts; where the Hub's data set has no validation, its last hundredth is taken."""
    if data_dir is None and dataset is None:
        return demo_parts(seed)
    if data_dir is not None:
        sources, parts = load_parts(data_dir, "", encoding=encoding)
    else:

        def load() -> Any:
            return datasets.load_dataset(dataset, split="train").train_test_split(test_size=0.01, seed=seed)

        sources, parts = hub_parts(load, str(dataset), "test")
    columns = find_columns(parts["train"].column_names, COLUMNS, sources["train"])
    chat = columns == ("messages",) or any(isinstance(parts["train"][column][0], list) for column in columns)
    for part, rows in parts.items():
        find_columns(rows.column_names, [columns], sources[part])
        for column in columns:
            for i, value in enumerate(rows[column]):
                check_value(value, f"{sources[part]}: {column} of row {i}", chat=chat, answer=column != "prompt")
    return {part: rows.select_columns(list(columns)) for part, rows in parts.items()}


def make_trainer(args: argparse.Namespace, parts: dict[str, datasets.Dataset]) -> SFTTrainer:
    """What TRL's guides write for LoRA, with another config and its learning rate; says what was understood."""
    tokenizer = load_tokenizer(args.model)
    first = parts["train"][0]
    chat = any(isinstance(value, list) for value in first.values())
    if chat and not tokenizer.chat_template and args.chat_template is None:
        raise DataError(
            f"the rows are chats, and the tokenizer of {args.model} has no chat template. Give --chat-template FILE, "
            "or rows of prompt and completion, or text."
        )
    if args.density is None:
        config = LNTuningConfig(task_type="CAUSAL_LM")
    else:
        config = FisherLNConfig(task_type="CAUSAL_LM", density=args.density, num_samples=args.num_samples)
    if chat:
        check_template(tokenizer, args.chat_template, parts)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model),
        args=SFTConfig(
            output_dir=str(args.out),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            warmup_steps=0.1,  # a share of all steps
            max_length=args.max_length,
            chat_template_path=args.chat_template,
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        processing_class=tokenizer,
        peft_config=config,
    )
    full = sum(len(ids) >= args.max_length for ids in trainer.train_dataset["input_ids"])
    lost = len(parts["train"]) - len(trainer.train_dataset)
    counts = " and ".join(f"{len(rows):,} {part} rows" for part, rows in parts.items())
    if not len(trainer.train_dataset):
        raise DataError(
            f"{counts}: each prompt alone fills all {args.max_length} tokens, so no completion is left to learn. Raise "
            "--max-length."
        )
    say(
        f"data: {counts} of {', '.join(first)}{' (chats)' if chat else ''}; {full:,} training rows fill all "
        f"{args.max_length} tokens and may be cut"
        f"{f'; {lost:,} more are left out, because their prompt fills them' if lost else ''}"
    )
    return trainer


def check_template(tokenizer: Any, file: str | None, parts: dict[str, datasets.Dataset]) -> None:
    """Write every chat by the template once, since many refuse some: two turns of one role, or a system's."""
    template = Path(file).read_text(encoding="utf-8") if file else None
    for part, rows in parts.items():
        for i, row in enumerate(rows):
            turns = [turn for value in row.values() for turn in value]
            try:
                tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
            except TemplateError as error:
                raise DataError(f"{part} row {i} does not fit the chat template: {error}") from error


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal LM: its folder with tokenizer, or its name on the Hub")
    parser.add_argument("--dataset", help="a data set on the Hub, with messages, prompts and completions, or text")
    add_data_options(parser, "a folder of local files")
    parser.add_argument("--chat-template", help="a Jinja file, if the tokenizer has no chat template")
    parser.add_argument("--density", type=float, help="tune this share of the norms, chosen by Fisher information")
    parser.add_argument("--num-samples", type=int, default=128, help="rows for Fisher scores; default 128")
    parser.add_argument("--max-steps", type=int, default=100, help="default 100")
    parser.add_argument("--batch-size", type=int, default=8, help="default 8")
    parser.add_argument("--max-length", type=int, default=512, help="longest row in tokens; default 512")
    parser.add_argument("--lr", type=float, default=3e-3, help="default 3e-3, see docs/hyperparameters.md")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/sft"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, measure, save, reload."""
    args = parse_args(argv)
    quiet()
    with errors_as_text():
        trainer = make_trainer(args, read_rows(args.data_dir, args.dataset, args.seed, args.encoding))
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
        trained, reloaded = (model(input_ids=ids).logits.float().cpu().numpy() for model in models)
    check_equal(reloaded, trained, args.out, "logits")


if __name__ == "__main__":
    main()
