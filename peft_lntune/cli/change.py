"""Which components training moved."""

from pathlib import Path

from peft_lntune.analysis import Table, match_tensors, parameter_change
from peft_lntune.cli.models import load_adapted

__all__ = ["change_between"]


def change_between(before: str, after: str, *, layers: bool = True, shared: bool = False) -> Table:
    """Measure how far training moved each component, from two saved models or from a model and an adapter.

    Args:
        before: checkpoint of a model: a safetensors file, the index of a sharded checkpoint, or a folder.
        after: checkpoint of a model in the same forms, or the folder of an adapter for `before`. Heads saved with the
            adapter are only compared if `before` has them in the same shape.
        layers: one row per component and layer; False: one row per component.
        shared: compare only the tensors that both have in the same shape.

    Returns:
        The table of `peft_lntune.analysis.parameter_change`.

    Raises:
        ConfigError: names or shapes differ, and `shared` is False.
        AdapterFileError: a file is missing or damaged.
    """
    if Path(after, "adapter_config.json").is_file():
        # A head that is not in the folder starts at random, so its change means nothing.
        return parameter_change(*match_tensors(before, load_adapted(after, before), shared=True), layers=layers)
    return parameter_change(*match_tensors(before, after, shared=shared), layers=layers)
