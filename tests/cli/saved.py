"""What the commands are run on: tiny models in folders, adapters for them, and the runner."""

import json
from pathlib import Path

import torch
import transformers as hf
from click.testing import CliRunner, Result
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from peft_lntune import LNTuningConfig, UnifiedConfig
from peft_lntune.cli import main
from tests import adapted

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "the", "a", "is"]


def run(*arguments: object) -> Result:
    """Run a command on a wide terminal; only errors that it does not expect come through."""
    return run_at(1000, *arguments)


def run_at(width: int, *arguments: object) -> Result:
    """Run a command with lines of this many characters."""
    runner = CliRunner(env={"COLUMNS": str(width)})
    result = runner.invoke(main, [str(argument) for argument in arguments], prog_name="peft-lntune")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result: Result, said: str) -> bool:
    """Whether a command ended with one message, this one, and exit code 1."""
    *_, message = f"\n{result.stderr}".rpartition("\nError: ")  # bars of what was loaded may stand above it
    return result.exit_code == 1 and said in message and "Traceback" not in result.stderr


def save_model(folder: Path, labels: int | None = 3, **options: int) -> Path:
    """A tiny BERT with a tokenizer; `labels=None`: without a head."""
    torch.manual_seed(0)
    sizes = {**adapted._SIZES, **options}
    if labels is None:
        hf.BertModel(hf.BertConfig(**sizes)).save_pretrained(folder)
    else:
        hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=labels)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: Path, labels: int = 3, config=None, masks=None) -> Path:
    """An adapter for the model of a folder, with random deltas and a head of its own."""
    base = hf.AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels)
    peft_model = get_peft_model(base, config or LNTuningConfig(task_type="SEQ_CLS"))
    if masks is not None:
        peft_model.set_masks(masks)
    adapted.fill(peft_model, "default")
    peft_model.save_pretrained(folder)
    return folder


def combined() -> UnifiedConfig:
    return UnifiedConfig(task_type="SEQ_CLS", preset="prefix+mha-adapter+ln+lora")


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return file


def task(count: int = 12) -> list[dict]:
    return [{"text": f"the film is {('bad', 'good')[row % 2]}", "label": row % 2} for row in range(count)]
