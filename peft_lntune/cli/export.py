"""Writes an adapter in another format, for use without this package: PEFT's own, LoRA, or into a GGUF file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peft_lntune.cli.models import load_adapted
from peft_lntune.errors import ConfigError
from peft_lntune.interop.gguf_file import edit_gguf, restore_gguf, to_gguf
from peft_lntune.interop.lora_report import LoraExport
from peft_lntune.interop.peft_ln_tuning import to_stock
from peft_lntune.interop.peft_lora import to_lora
from peft_lntune.storage.folders import new_folder

__all__ = ["edit_gguf", "export_lora", "export_peft_ln_tuning", "restore_gguf", "to_gguf"]

_ROW = 256  # tokens of a row of texts


def export_peft_ln_tuning(adapter: str, out: str | Path, model: str | None = None) -> Path:
    """Write a saved adapter in PEFT's own LN_TUNING format, which loads without this package.

    Args:
        adapter: folder of the adapter.
        out: folder to make; it appears when everything is written.
        model: folder of the base model; None: the one that the adapter's config names. The model is needed because
            PEFT's format holds whole norms, not deltas.

    Returns:
        The folder.

    Raises:
        ConfigError: `out` exists and is not an empty folder, or no model is named.
        AdapterFileError: the adapter is damaged, or from another model.
        UnsupportedError: the adapter has parts other than norms.
    """
    with new_folder(Path(out)) as made:
        to_stock(load_adapted(adapter, model), made)
    return Path(out)


def export_lora(
    adapter: str,
    out: str | Path,
    model: str | None = None,
    *,
    rank: int | None = None,
    texts: str | Path | None = None,
    drop: bool = False,
    every_layer: bool = True,
) -> LoraExport:
    """Write a saved adapter as LoRA on the linear maps that read its norms.

    Args:
        adapter: folder of the adapter.
        out: folder to make; it appears when everything is written.
        model: folder of the base model; None: the one that the adapter's config names.
        rank: rank of the LoRA; None: the smallest one that servers offer at which it is exact.
        texts: text file like what the model will read, of which the first 4,096 tokens calibrate a truncation; None:
            every direction counts alike.
        drop: leave out norms that LoRA cannot hold; False: refuse them.
        every_layer: write zeros for linear maps whose counterpart in another layer is tuned, which LoRAX needs.

    Returns:
        What was written, and how near it is to the adapter.

    Raises:
        ConfigError: `out` exists and is not an empty folder, no model is named, the texts are empty, or no rank is
            exact and none was given.
        AdapterFileError: the adapter is damaged, or from another model.
        UnsupportedError: the adapter holds something that LoRA cannot hold.
    """
    with new_folder(Path(out)) as made:
        adapted = load_adapted(adapter, model)
        base = str(model or adapted.peft_config["default"].base_model_name_or_path)
        batches = None if texts is None else _rows(Path(texts), base)
        unfoldable = "drop" if drop else "refuse"
        report = to_lora(adapted, made, rank=rank, batches=batches, unfoldable=unfoldable, every_layer=every_layer)
    return replace(report, directory=Path(out))


def _rows(file: Path, model: str) -> list[dict[str, Any]]:
    """The first tokens of a text file, in rows of equal length."""
    tokens = AutoTokenizer.from_pretrained(model)(file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    if not len(tokens):
        raise ConfigError(f"{file} holds no text. Give a file of a thousand words or more.")
    rows = tokens[: 16 * _ROW].split(_ROW)
    return [{"input_ids": row[None]} for row in rows if len(row) == len(rows[0])]
