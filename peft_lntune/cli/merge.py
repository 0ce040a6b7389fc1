"""`peft-lntune merge`: an adapter merged into its model, as a folder that needs neither PEFT nor this package."""

import shutil
from pathlib import Path

import click

from peft_lntune.cli.models import adapter_to_folder, load_adapted
from peft_lntune.cli.output import new_folder

__all__ = ["command", "merge_adapter"]

# What a folder holds beside the model that its users want too.
_BESIDE = (
    "added_tokens",
    "chat_template",
    "merges",
    "normalizer",
    "preprocessor_config",
    "processor_config",
    "sentencepiece",
    "special_tokens",
    "spiece",
    "tokenizer",
    "vocab",
)


def merge_adapter(adapter: str, out: str | Path, model: str | None = None) -> Path:
    """Merge an adapter into its model and save that, with the tokenizer of the model's folder.

    Args:
        adapter: directory of the adapter.
        out: folder to make; it appears when all is written.
        model: folder of the base model; None: the one that the adapter's config names.

    Returns:
        The folder.

    Raises:
        ConfigError: there is something at `out`, or no model is named.
        AdapterFileError: the adapter is damaged, or one of another model.
        UnsupportedError: the adapter has parts that cannot be merged: bottlenecks, prefixes.
    """
    with new_folder(Path(out)) as made:
        adapted = load_adapted(adapter, model)
        base = Path(model or adapted.peft_config["default"].base_model_name_or_path or "")
        merged = adapted.merge_and_unload()
        merged.save_pretrained(str(made))
        for file in sorted(base.iterdir()) if base.is_dir() else ():
            if file.is_file() and file.name.startswith(_BESIDE):
                shutil.copy2(file, made)
    return Path(out)


@click.command("merge", short_help="Merge an adapter into its model.")
@adapter_to_folder
def command(adapter: str, out: Path, model: str | None) -> None:
    """Merge ADAPTER into its model and save it in the new folder OUT, with the tokenizer.

    What comes out is a plain model: it loads without PEFT and without this package. Bottlenecks and prefixes cannot be
    merged, and an adapter that has any is refused.

    \b
    Example:
      peft-lntune merge ./my-adapter ./my-model --model ./bert-base
    """
    click.echo(f"The merged model is in {merge_adapter(adapter, out, model)}.")
