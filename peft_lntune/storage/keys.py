"""The names of tensors in an adapter's file and in a model: which are ours, and of which adapter."""

from collections.abc import Iterable
from itertools import pairwise

from peft_lntune.storage.packing import PREFIX

__all__ = [
    "CONTAINERS",
    "LORA",
    "has_lora",
    "is_ours",
    "is_part",
    "of_adapter",
    "with_lora_name",
    "without_adapter_name",
]


LORA = "lora_"
"""How the names of PEFT's containers of LoRA's tensors begin."""


CONTAINERS = (PREFIX, LORA)
"""How the names of all containers of an adapter's tensors begin: ours, and those of a part that is LoRA."""


BARE = "lora_embedding_"
"""The containers that hold tensors by adapter name, and not modules with a `weight`."""


def is_ours(key: str) -> bool:
    """Whether a key in a file names a tensor of an adapter: `<module>.lntune_<what>.<tensor>`, or LoRA's."""
    *above, last = key.split(".")
    return last.startswith(BARE) or (bool(above) and above[-1].startswith(CONTAINERS))


def is_part(key: str, adapter_name: str) -> bool:
    """Whether a name in a model is of a tensor of this adapter, but not of a head in `modules_to_save`.

    Example:
        >>> is_part("norm.lntune_weight.default.weight", "default"), is_part("head.bias", "default")
        (True, False)
    """
    return any(name == adapter_name and above.startswith(CONTAINERS) for above, name in pairwise(key.split(".")))


def of_adapter(key: str, adapter_name: str) -> bool:
    """Whether a name in a model is of a tensor of this adapter: of one of its parts, or a head in `modules_to_save`."""
    return is_part(key, adapter_name) or f".modules_to_save.{adapter_name}." in f".{key}."


def without_adapter_name(key: str, adapter_name: str) -> str:
    """A tensor's name in a model as it stands in a file; any other name as it is.

    Told by structure: PEFT's own rule takes `bias` off `classifier.bias` where that is the name of the adapter. And
    where another adapter has put a layer around this one's, the file does not say so.

    Args:
        key: the name in a model.
        adapter_name: the adapter that it may be of.

    Returns:
        The name in a file.

    Example:
        >>> without_adapter_name("0.base_layer.lora_A.default.weight", "default")
        '0.lora_A.weight'
    """
    parts = key.split(".")
    for place, (container, name) in enumerate(pairwise(parts)):
        whole = place + 2 < len(parts) or container.startswith(BARE)  # else it is `weight`, and some adapter's name
        if name == adapter_name and container.startswith(CONTAINERS) and whole:
            above = [part for part in parts[:place] if part != "base_layer"]
            return ".".join([*above, container, *parts[place + 2 :]])
    return key


def has_lora(keys: Iterable[str]) -> bool:
    """Whether one of these names in a file is of a tensor of LoRA."""
    return any(is_ours(key) and f".{LORA}" in f".{key}" for key in keys)


def with_lora_name(key: str, adapter_name: str) -> str:
    """The name in a model of a tensor of LoRA; any other name as it is.

    Args:
        key: the name in a file.
        adapter_name: the adapter that it is loaded as.

    Returns:
        The name in a model.

    Example:
        >>> with_lora_name("0.lora_A.weight", "default")
        '0.lora_A.default.weight'
    """
    parts = key.split(".")
    for place in range(max(len(parts) - 2, 0), len(parts)):
        if parts[place].startswith(LORA):
            return ".".join([*parts[: place + 1], adapter_name, *parts[place + 1 :]])
    return key
