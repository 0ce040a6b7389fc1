"""`peft-lntune recover`: repairs a quantized or pruned model by its norms."""

import sys
from pathlib import Path
from typing import Any

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import check_encoding, check_out, json_option

__all__ = ["command"]


def _check(out: Path, encoding: str, **_: Any) -> None:
    check_encoding(encoding)
    check_out(out)


@make("recover", "Repair a quantized or pruned language model by tuning its norms.", _check)
@click.argument("model")
@click.option("--teacher", required=True, help="The undamaged model: folder with its tokenizer, or a name on the Hub.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Texts like what the model will read: .txt, .csv, .tsv, .jsonl or .parquet.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make, for the adapter.")
@click.option(
    "--text-column",
    "text_columns",
    multiple=True,
    metavar="NAME",
    help="Column of texts; those of a row are joined by line breaks.  [default: text, sentence, ...]",
)
@click.option("--encoding", default="utf-8-sig", show_default=True, help="Encoding of a text file, such as latin-1.")
@click.option("--biases", is_flag=True, help="Also tune the biases of linear maps, in models that have some.")
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True, help="Batches to train on.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Rows per batch.")
@click.option("--length", type=click.IntRange(2), default=128, show_default=True, help="Tokens per row.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=3e-3,
    show_default=True,
    help="Largest of the run; it decays to 0.",
)
@click.option(
    "--held-out", type=click.IntRange(1), default=16, show_default=True, help="Rows to measure on, not trained on."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the order of the rows.")
@click.option("--device", default="cpu", show_default=True, help="Device of both models, such as cuda.")
@json_option
def command(
    model: str, teacher: str, data: Path, out: Path, text_columns: tuple[str, ...], as_json: bool, **settings: Any
) -> None:
    """Tune the norms of MODEL, a quantized or pruned copy of the teacher, until it answers as the teacher does.

    MODEL is a folder, a name on the Hub, or a GGUF file. The result is an adapter of norms, which goes into the
    quantized files without quantizing anything again: by `peft-lntune merge`, or into a GGUF file by `peft-lntune
    export`. Zeros of a pruned model stay zeros. Both models are in memory during the repair. If the repaired model is
    not nearer to the teacher on the rows held out, nothing is written.

    \b
    Examples:
      peft-lntune recover ./llama-gptq --teacher ./llama --data texts.jsonl \\
        --out ./repair
      peft-lntune merge ./repair ./llama-gptq-repaired --model ./llama-gptq
      peft-lntune recover llama-Q2_K.gguf --teacher ./llama --data texts.txt \\
        --out ./repair
      peft-lntune export ./repair --gguf llama-Q2_K.gguf --out repaired.gguf
    """
    from peft_lntune.cli.printing import print_result
    from peft_lntune.cli.recover import recover_model

    found = recover_model(
        model, teacher, data, out, text_columns=text_columns, progress=sys.stderr.isatty(), **settings
    )
    print_result(as_json, found.to_data(), found.table, found.summary)
