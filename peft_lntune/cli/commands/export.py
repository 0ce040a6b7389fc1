"""`peft-lntune export`: writes an adapter in another format, for use without this package."""

from pathlib import Path
from typing import Any

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import adapter_to_folder, check_out, refuse_without

__all__ = ["FORMATS", "command"]

FORMATS = {
    "ln_tuning": ("export_peft_ln_tuning", "The adapter in PEFT's format is in {}."),
    "lora": ("export_lora", "{}"),
}
"""For each format, the function `(adapter, out, model, **options)` in `peft_lntune.cli.export`, and what is printed."""


def check(out: Path, kind: str | None, **_: Any) -> None:
    """Refuse options of another format, and a folder that cannot be made.

    Args:
        out: the argument OUT.
        kind: the format; None: the default.
        **_: other options of the command.

    Raises:
        click.UsageError: an option of `--lora` was given without it.
        ConfigError: the folder exists and is not empty, or cannot be made.
    """
    if kind != "lora":
        refuse_without("--lora", "rank", "texts", "drop")
    check_out(out)


@make("export", "Write an adapter in PEFT's own LN_TUNING format, or as LoRA.", check)
@adapter_to_folder
@click.option("--ln-tuning", "kind", flag_value="ln_tuning", help="PEFT's own LN_TUNING format, the default.")
@click.option(
    "--lora", "kind", flag_value="lora", help="LoRA on the linear maps that read the norms, for LoRA servers."
)
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
@click.option(
    "--drop", is_flag=True, help="With --lora: leave out norms that LoRA cannot hold, and say what that costs."
)
def command(
    adapter: str, out: Path, model: str | None, kind: str | None, rank: int | None, texts: Path | None, drop: bool
) -> None:
    """Write ADAPTER into the new folder OUT in PEFT's own LN_TUNING format, or as LoRA.

    Both load with PEFT alone. LN_TUNING holds whole norms in the dtype of the model, so small deltas over a bfloat16
    model are lost to rounding. It cannot hold parts other than norms.

    LoRA is what vLLM and other servers take. It is exact where no norm has more tuned entries than the rank, and
    truncated otherwise; the errors are printed, and an adapter of LoRA and norms becomes one LoRA.

    \b
    Examples:
      peft-lntune export ./my-adapter ./my-adapter-for-peft --model ./bert-base
      peft-lntune export --lora ./my-adapter ./my-lora
      peft-lntune export --lora --rank 64 --texts texts.txt ./my-adapter ./my-lora
    """
    from peft_lntune.cli import export

    function, said = FORMATS[kind or "ln_tuning"]
    options = {"rank": rank, "texts": texts, "drop": drop} if kind == "lora" else {}
    click.echo(said.format(getattr(export, function)(adapter, out, model, **options)))
