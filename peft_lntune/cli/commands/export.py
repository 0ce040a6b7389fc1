"""`peft-lntune export`: writes an adapter in another format, for use without this package."""

from pathlib import Path

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import OutFile, check_out, refuse_without

__all__ = ["FORMATS", "command"]

FORMATS = {"ln_tuning": ("export_peft_ln_tuning", "The adapter in PEFT's format is in")}
"""For each format, the function `(adapter, out, model)` in `peft_lntune.cli.export`, and what the command prints."""


def check(
    adapter: str | None,
    out: Path | None,
    model: str | None,
    kind: str | None,
    gguf: Path | None,
    gguf_out: Path | None,
    in_place: bool,
    undo: bool,
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

    Raises:
        click.UsageError: something is missing, or there is too much.
        ConfigError: OUT exists and is not an empty folder, or cannot be made.
    """
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


@make("export", "Write an adapter in PEFT's own LN_TUNING format, or into a GGUF file.", check)
@click.argument("adapter", required=False)
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--model", help="Folder of the base model.  [default: the one that the adapter's config names]")
@click.option("--ln-tuning", "kind", flag_value="ln_tuning", help="PEFT's own LN_TUNING format, the default.")
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
    gguf: Path | None,
    gguf_out: Path | None,
    in_place: bool,
    undo: bool,
) -> None:
    """Write ADAPTER into the new folder OUT in PEFT's own LN_TUNING format, or into a GGUF file.

    A folder loads with PEFT alone. The format holds whole norms in the dtype of the model, so small deltas over a
    bfloat16 model are lost to rounding. It cannot hold parts other than norms.

    A GGUF file has its norms in float32, also if it is quantized. They take the deltas, and nothing is requantized. If
    the base model is on this machine, its norms are first compared with those of the file.

    \b
    Examples:
      peft-lntune export ./my-adapter ./my-adapter-for-peft --model ./bert-base
      peft-lntune export ./my-adapter --gguf model.gguf --out tuned.gguf
      peft-lntune export ./my-adapter --gguf model.gguf --in-place
      peft-lntune export --gguf model.gguf --undo
    """
    from peft_lntune.cli import export

    if gguf is None:
        function, said = FORMATS[kind or "ln_tuning"]
        click.echo(f"{said} {getattr(export, function)(adapter, out, model)}.")
    elif undo:
        click.echo(f"{gguf} is restored; {export.restore_gguf(gguf)} was taken out.")
    elif in_place:
        click.echo(str(export.edit_gguf(adapter, gguf, model)))
        click.echo(f"To restore it: peft-lntune export --gguf {gguf} --undo")
    else:
        click.echo(str(export.to_gguf(adapter, gguf, gguf_out, model)))
