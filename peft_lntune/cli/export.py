"""`peft-lntune export`: an adapter in PEFT's own format, for people without this package."""

from pathlib import Path

import click

from peft_lntune.cli.models import adapter_to_folder, load_adapted
from peft_lntune.cli.output import new_folder
from peft_lntune.interop.peft_ln_tuning import to_peft_ln_tuning

__all__ = ["command", "export_peft_ln_tuning"]


def export_peft_ln_tuning(adapter: str, out: str | Path, model: str | None = None) -> Path:
    """Write a saved adapter in PEFT's own LN_TUNING format; see `to_peft_ln_tuning`.

    Args:
        adapter: directory of the adapter.
        out: folder to make; it appears when all is written.
        model: folder of the base model; None: the one that the adapter's config names. Its norms are needed, since
            PEFT's format holds whole norms, not deltas.

    Returns:
        The folder.

    Raises:
        ConfigError: there is something at `out`, or no model is named.
        AdapterFileError: the adapter is damaged, or one of another model.
        UnsupportedError: the adapter has parts that are no norms.
    """
    with new_folder(Path(out)) as made:
        to_peft_ln_tuning(load_adapted(adapter, model), made)
    return Path(out)


@click.command("export", short_help="Write an adapter in PEFT's own LN_TUNING format.")
@adapter_to_folder
def command(adapter: str, out: Path, model: str | None) -> None:
    """Write ADAPTER into the new folder OUT in PEFT's own LN_TUNING format.

    It then loads by PEFT alone. That format holds whole norms in the dtype of the model, so over a bf16 model small
    deltas are rounded away; and it has no place for parts that are no norms.

    \b
    Example:
      peft-lntune export ./my-adapter ./my-adapter-for-peft --model ./bert-base
    """
    click.echo(f"The adapter in PEFT's format is in {export_peft_ln_tuning(adapter, out, model)}.")
