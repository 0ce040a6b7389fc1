"""`peft-lntune export`: writes an adapter in another format, for use without this package."""

from pathlib import Path

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import adapter_to_folder, check_out

__all__ = ["FORMATS", "command"]

FORMATS = {"ln_tuning": ("export_peft_ln_tuning", "The adapter in PEFT's format is in")}
"""For each format, the function `(adapter, out, model)` in `peft_lntune.cli.export`, and what the command prints."""


@make("export", "Write an adapter in PEFT's own LN_TUNING format.", check_out)
@adapter_to_folder
@click.option("--ln-tuning", "kind", flag_value="ln_tuning", help="PEFT's own LN_TUNING format, the default.")
def command(adapter: str, out: Path, model: str | None, kind: str | None) -> None:
    """Write ADAPTER into the new folder OUT in PEFT's own LN_TUNING format.

    The result loads with PEFT alone. The format holds whole norms in the dtype of the model, so small deltas over a
    bfloat16 model are lost to rounding. It cannot hold parts other than norms.

    \b
    Example:
      peft-lntune export ./my-adapter ./my-adapter-for-peft --model ./bert-base
    """
    from peft_lntune.cli import export

    function, said = FORMATS[kind or "ln_tuning"]
    click.echo(f"{said} {getattr(export, function)(adapter, out, model)}.")
