"""Writes an adapter in another format, for use without this package: PEFT's own, or into a GGUF file."""

from pathlib import Path

from peft_lntune.cli.models import load_adapted
from peft_lntune.interop.gguf_file import edit_gguf, restore_gguf, to_gguf
from peft_lntune.interop.peft_ln_tuning import to_stock
from peft_lntune.storage.folders import new_folder

__all__ = ["edit_gguf", "export_peft_ln_tuning", "restore_gguf", "to_gguf"]


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
