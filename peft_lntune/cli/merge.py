"""Merges an adapter into its model; the result needs neither PEFT nor this package."""

from pathlib import Path

from peft_lntune.cli.models import load_adapted, load_processor
from peft_lntune.interop.norm_deltas import NormMerge, folder_of
from peft_lntune.interop.safetensors_files import is_quantized, merge_into_safetensors, norms_alone
from peft_lntune.storage.folders import new_folder
from peft_lntune.storage.saved_adapter import SavedAdapter

__all__ = ["merge_adapter", "merge_quantized"]


def merge_adapter(adapter: str, out: str | Path, model: str | None = None) -> Path:
    """Merge an adapter into its model, and save the model with its tokenizer or processor.

    The tokenizer or processor is the one saved with the adapter, as trainers save it; otherwise that of the model.

    `merge_quantized` is used where it can be.

    Args:
        adapter: folder of the adapter.
        out: folder to make; it appears when everything is written.
        model: folder of the base model, or a name on the Hub; None: the one that the adapter's config names.

    Returns:
        The folder.

    Raises:
        ConfigError: `out` exists and is not an empty folder, no model is named, the model lacks weights, or its
            tokenizer does not load.
        AdapterFileError: the adapter is damaged, or from another model.
        UnsupportedError: the adapter has bottlenecks or prefixes, which cannot be merged.
    """
    if merge_quantized(adapter, out, model) is not None:
        return Path(out)
    with new_folder(Path(out)) as made:
        adapted = load_adapted(adapter, model)
        config = adapted.peft_config["default"]
        base = str(model or config.base_model_name_or_path)
        # Before merging, because a tokenizer that does not load is an error.
        processor = load_processor(adapter) or load_processor(base, None if model else config.revision)
        adapted.merge_and_unload().save_pretrained(str(made))
        if processor is not None:
            processor.save_pretrained(str(made))
    return Path(out)


def merge_quantized(adapter: str, out: str | Path, model: str | None = None) -> NormMerge | None:
    """Merge an adapter of norms alone into the files of a quantized model. No model is loaded; other bytes are kept.

    Args:
        adapter: folder of the adapter.
        out: folder to make; it appears when everything is written.
        model: folder of the base model; None: the one that the adapter's config names.

    Returns:
        What was changed; None if the model is not quantized, has no safetensors, or the adapter holds more than deltas
        of norms. Then nothing was written.

    Raises:
        ConfigError: `out` exists and is not an empty folder.
        AdapterFileError: the adapter is damaged, or from another model.
        UnsupportedError: a tuned tensor is quantized.
    """
    base = folder_of(model or SavedAdapter(adapter, {}).own_fields.get("base_model_name_or_path"))
    if base is None or not is_quantized(base) or not norms_alone(adapter):
        return None
    return merge_into_safetensors(adapter, base, out)
