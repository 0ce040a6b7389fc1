"""`peft-lntune export`: writes an adapter in PEFT's own format, for use without this package."""

from pathlib import Path

import click

from peft_lntune.cli.models import adapter_to_folder, load_adapted
from peft_lntune.interop.peft_ln_tuning import to_stock
from peft_lntune.storage.atomic import new_folder

__all__ = ["command", "export_peft_ln_tuning"]


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


@click.command("export", short_help="Write an adapter in PEFT's own LN_TUNING format.")
@adapter_to_folder
def command(adapter: str, out: Path, model: str | None) -> None:
    """Write ADAPTER into the new folder OUT in PEFT's own LN_TUNING format.

    The result loads with PEFT alone. The format holds whole norms in the dtype of the model, so small deltas over a
    bfloat16 model are lost to rounding. It cannot hold parts other than norms.

    \b
    Example:
      peft-lntune export ./my-adapter ./my-adapter-for-peft --model ./bert-base
    """
    click.echo(f"The adapter in PEFT's format is in {export_peft_ln_tuning(adapter, out, model)}.")
