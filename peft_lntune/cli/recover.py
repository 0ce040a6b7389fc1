"""Repairs a quantized or pruned language model: from folders and a file of texts to the folder of an adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_lntune.analysis import Table
from peft_lntune.cli.data import TEXT_COLUMNS, find_columns, read_table, read_texts, token_rows
from peft_lntune.cli.fisher import find_device
from peft_lntune.cli.models import is_gguf, load_gguf, load_model, load_processor, load_tokenizer
from peft_lntune.errors import ConfigError, DataError
from peft_lntune.recover import Quality, check_pair, logits_of, quality, recover, recovery_config
from peft_lntune.storage.folders import new_folder

__all__ = ["Repair", "read_rows", "recover_model"]

_COLUMNS = ("model", "perplexity", "divergence")
_OWN_COLUMN = "Name yours: --text-column."


@dataclass(frozen=True)
class Repair:
    """The result of `recover_model`.

    Attributes:
        model: the damaged model, as it was named.
        teacher: quality of the undamaged model on the rows held out.
        before: quality of the damaged model there.
        after: quality of the repaired model there.
        entries: number of tuned entries.
        rows: number of rows trained on.
        held_out: number of rows held out.
        steps: number of batches trained on.
        adapter: folder of the adapter.
    """

    model: str
    teacher: Quality
    before: Quality
    after: Quality
    entries: int
    rows: int
    held_out: int
    steps: int
    adapter: Path

    @property
    def table(self) -> Table:
        """Perplexity and divergence from the teacher, of the teacher, the damaged and the repaired model."""
        found = {"teacher": self.teacher, "damaged": self.before, "repaired": self.after}
        return Table(_COLUMNS, [(name, *one) for name, one in found.items()])

    @property
    def summary(self) -> str:
        """What was done, and what to do with the adapter."""
        merging = (
            f"peft-lntune export {self.adapter} --gguf {self.model} --out NEW.gguf"
            if is_gguf(self.model)
            else f"peft-lntune merge {self.adapter} NEW_FOLDER --model {self.model}"
        )
        return (
            f"{self.entries:,} entries tuned in {self.steps} steps, on {self.rows:,} rows; measured on {self.held_out} "
            f"others. The adapter is in {self.adapter}.\nTo put it into the model: {merging}"
        )

    def to_data(self) -> Mapping[str, Any]:
        """The result as JSON has it."""
        names = ("entries", "rows", "held_out", "steps", "adapter")
        return {"table": self.table, **{name: getattr(self, name) for name in names}}


def recover_model(
    model: str,
    teacher: str,
    data: Path,
    out: Path,
    *,
    text_columns: Sequence[str] = (),
    encoding: str = "utf-8-sig",
    biases: bool = False,
    steps: int = 100,
    batch_size: int = 4,
    length: int = 128,
    learning_rate: float = 3e-3,
    held_out: int = 16,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> Repair:
    """Repair a quantized or pruned language model, and save the adapter.

    Args:
        model: folder of the damaged model, its name on the Hub, or a GGUF file.
        teacher: folder of the undamaged model, with its tokenizer, or a name on the Hub.
        data: file of texts: `.txt`, or a table.
        out: folder to make; it appears when everything is written.
        text_columns: columns of a table, which are joined by line breaks; none: the usual names.
        encoding: of a text file.
        biases: also tune the biases of linear maps.
        steps: number of batches to train on.
        batch_size: rows per batch.
        length: tokens per row.
        learning_rate: the largest of the run.
        held_out: number of rows to measure on, drawn at random, and not trained on.
        seed: seed of the order of rows.
        device: of both models.
        progress: show a progress bar.

    Returns:
        The quality of all three models on the rows held out, and what was tuned.

    Raises:
        ConfigError: `out` cannot be made; there is no such model; the two differ in vocabulary, tokenizer or norms; or
            the repaired model is not nearer to the teacher.
        DataError: the file has too few tokens, or a divergence is not finite.
    """
    place = find_device(device)
    tokenizer = load_tokenizer(teacher)
    _check_tokenizers(model, teacher, tokenizer)
    rows = read_rows(data, tokenizer, length, text_columns, encoding)
    if len(rows) < held_out + batch_size:
        raise DataError(
            f"{data} gives {len(rows)} rows of {length} tokens, and {held_out + batch_size} are needed: {held_out} "
            f"held out, and one batch of {batch_size}. Give more text, or lower --held-out, --batch-size or --length."
        )
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].to(place)
    kept, used = rows[:held_out].split(batch_size), rows[held_out:][: steps * batch_size].split(batch_size)
    student, known = (load_gguf(model) if is_gguf(model) else load_model(model)), load_model(teacher)
    student, known = student.to(place).eval(), known.to(place).eval()
    check_pair(student, known)
    measured, batches = [{"input_ids": one} for one in kept], [{"input_ids": one} for one in used]

    def answer(batch: Mapping[str, Any]) -> Tensor:
        return logits_of(known, batch)

    with new_folder(out) as made:
        best, before = (quality(one, answer, measured) for one in (known, student))
        found = recover(
            student,
            known,
            batches,
            config=recovery_config(student, biases=biases),
            steps=steps,
            learning_rate=learning_rate,
            progress=progress,
        )
        after = quality(found.model, answer, measured)
        if not after.divergence < before.divergence:
            raise ConfigError(
                f"the repaired model is not nearer to the teacher: the divergence on the rows held out is "
                f"{after.divergence:.4g}, and was {before.divergence:.4g}. Nothing is written. Lower --learning-rate, "
                "give more text, or keep the model as it is."
            )
        # Embeddings are never tuned here; to find out, PEFT would look for a config.json beside a GGUF file.
        found.model.save_pretrained(str(made), save_embedding_layers=False)
    return Repair(model, best, before, after, found.entries, sum(map(len, used)), held_out, steps, out)


def read_rows(
    data: Path, tokenizer: Any, length: int, text_columns: Sequence[str] = (), encoding: str = "utf-8-sig"
) -> Tensor:
    """Read the texts of a file as rows of tokens.

    Args:
        data: a `.txt` file, which is one text, or a table, with one text per row.
        tokenizer: of the model.
        length: tokens per row.
        text_columns: columns of a table, joined by line breaks; none: the usual names.
        encoding: of a text file.

    Returns:
        `(rows, length)`, int64.

    Raises:
        DataError: the file cannot be read, has no such column, or fewer tokens than one row has.
    """
    if data.suffix.lower() == ".txt":
        try:
            texts = [data.read_text(encoding=encoding)]
        except UnicodeError as error:
            raise DataError(
                f"{data} is not {encoding}: {error}. Name its encoding, such as --encoding cp1252."
            ) from error
    else:
        table = read_table(data, encoding)
        choices = [tuple(text_columns)] if text_columns else TEXT_COLUMNS
        columns = find_columns(table.column_names, choices, str(data), _OWN_COLUMN)
        each = [read_texts(table[column], column, str(data)) for column in columns]
        texts = ["\n".join(row) for row in zip(*each, strict=True)]
    return token_rows(tokenizer, texts, length, str(data))


def _check_tokenizers(model: str, teacher: str, tokenizer: Any) -> None:
    """Refuse a damaged model whose own tokenizer is another one. A GGUF file is compared by its vocabulary's size."""
    own = None if is_gguf(model) else load_processor(model)
    if own is not None and own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the tokenizers of {model} and {teacher} have different vocabularies, so the two models read other "
            "tokens. Give the model that the damaged one was made from."
        )
