"""`peft-lntune export`: writes an adapter in another format, for use without this package."""

from pathlib import Path
from typing import Any

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import OutFile, check_out, refuse_without

__all__ = ["FORMATS", "command"]

FORMATS = {
    "ln_tuning": ("export_peft_ln_tuning", "The adapter in PEFT's format is in {}."),
    "lora": ("export_lora", "{}"),
}
"""For each format, the function `(adapter, out, model, **options)` in `peft_lntune.cli.export`, and what is printed."""


def check(
    adapter: str | None,
    out: Path | None,
    model: str | None,
    kind: str | None,
    gguf: Path | None,
    gguf_out: Path | None,
    in_place: bool,
    undo: bool,
    **_: Any,
) -> None:
    """Refuse arguments and options that do not go together.

    Args:
        adapter: the argument ADAPTER.
        out: the argument OUT.
        model: the option `--model`.
        kind: the format of a folder; None if no option names one.
        gguf: the option `--gguf`.
        gguf_out: the option `--out`.
        in_place: the option `--in-place`.
        undo: the option `--undo`.
        **_: options of `--lora`.

    Raises:
        click.UsageError: something is missing, or there is too much.
        ConfigError: OUT exists and is not an empty folder, or cannot be made.
    """
    if kind != "lora":
        refuse_without("--lora", "rank", "texts", "drop", "every_layer")
    if gguf is None:
        refuse_without("--gguf", "gguf_out", "in_place", "undo")
        if adapter is None or out is None:
            raise click.UsageError(f"Missing argument '{'ADAPTER' if adapter is None else 'OUT'}'.")
        check_out(out)
        return
    if kind is not None:
        raise click.UsageError("--gguf writes a GGUF file, and the format of a folder was named too. Give one of them.")
    if out is not None:
        raise click.UsageError("--gguf takes no argument OUT: name the new file with --out, or give --in-place.")
    if undo:
        if adapter is not None or gguf_out is not None or model is not None:
            raise click.UsageError("--undo takes --gguf FILE alone: the original bytes are in a file beside it.")
        return
    if adapter is None:
        raise click.UsageError("Missing argument 'ADAPTER'.")
    if in_place == (gguf_out is not None):
        raise click.UsageError("--gguf needs either --out FILE, for a changed copy, or --in-place.")


@make("export", "Write an adapter in PEFT's own LN_TUNING format, as LoRA, or into a GGUF file.", check)
@click.argument("adapter", required=False)
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--model", help="Folder of the base model.  [default: the one that the adapter's config names]")
@click.option("--ln-tuning", "kind", flag_value="ln_tuning", help="PEFT's own LN_TUNING format, the default.")
@click.option("--lora", "kind", flag_value="lora", help="LoRA on the linear maps that read the norms, for servers.")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="With --lora: the rank.  [default: the smallest of 8, 16, 32, ... 512 at which it is exact]",
)
@click.option(
    "--texts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --lora: a text file like what the model will read; a truncation keeps what matters on it.",
)
@click.option("--drop", is_flag=True, help="With --lora: leave out norms that LoRA cannot hold; the cost is printed.")
@click.option(
    "--every-layer/--tuned-layers",
    default=True,
    show_default=True,
    help="With --lora: also write zeros for layers that are not tuned, which LoRAX needs; or leave them out.",
)
@click.option(
    "--gguf",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Add the deltas to the norms of this GGUF file, quantized or not. All other bytes are kept.",
)
@click.option("--out", "gguf_out", type=OutFile(), help="With --gguf: the new file.")
@click.option("--in-place", is_flag=True, help="With --gguf: change the file; its original bytes go to one beside it.")
@click.option("--undo", is_flag=True, help="With --gguf: restore a file that --in-place changed, bit for bit.")
def command(
    adapter: str | None,
    out: Path | None,
    model: str | None,
    kind: str | None,
    rank: int | None,
    texts: Path | None,
    drop: bool,
    every_layer: bool,
    gguf: Path | None,
    gguf_out: Path | None,
    in_place: bool,
    undo: bool,
) -> None:
    """Write ADAPTER into the new folder OUT in PEFT's own LN_TUNING format or as LoRA, or into a GGUF file.

    A folder loads with PEFT alone. LN_TUNING holds whole norms in the dtype of the model, so small deltas over a
    bfloat16 model are lost to rounding. It cannot hold parts other than norms.

    LoRA is what vLLM and other servers take. It is exact where no norm has more tuned entries than the rank, and
    truncated otherwise. The errors are printed. An adapter of norms and LoRA becomes one LoRA.

    A GGUF file has its norms in float32, also if it is quantized. They take the deltas, and nothing is requantized. If
    the base model is on this machine, its norms are first compared with those of the file.

    \b
    Examples:
      peft-lntune export ./my-adapter ./my-adapter-for-peft --model ./bert-base
      peft-lntune export --lora ./my-adapter ./my-lora
      peft-lntune export --lora --rank 64 --texts texts.txt ./my-adapter ./my-lora
      peft-lntune export ./my-adapter --gguf model.gguf --out tuned.gguf
      peft-lntune export ./my-adapter --gguf model.gguf --in-place
      peft-lntune export --gguf model.gguf --undo
    """
    from peft_lntune.cli import export

    if gguf is None:
        function, said = FORMATS[kind or "ln_tuning"]
        given = {"rank": rank, "texts": texts, "drop": drop, "every_layer": every_layer}
        options = given if kind == "lora" else {}
        click.echo(said.format(getattr(export, function)(adapter, out, model, **options)))
    elif undo:
        click.echo(f"{gguf} is restored; {export.restore_gguf(gguf)} was taken out.")
    elif adapter is not None and gguf_out is not None:  # as `check` has seen to
        click.echo(str(export.to_gguf(adapter, gguf, gguf_out, model)))
    elif adapter is not None:
        click.echo(str(export.edit_gguf(adapter, gguf, model)))
        click.echo(f"To restore it: peft-lntune export --gguf {gguf} --undo")
