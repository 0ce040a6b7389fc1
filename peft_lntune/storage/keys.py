"""Names of tensors in an adapter's file and in a model: which belong to an adapter of ours, and to which one."""

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
"""Prefix of the names of PEFT's containers for LoRA's tensors."""

CONTAINERS = (PREFIX, LORA)
"""Prefixes of the names of all containers for an adapter's tensors: ours, and those of a LoRA part."""

BARE = "lora_embedding_"
"""Prefix of containers that hold tensors by adapter name, instead of modules with a `weight`."""


def is_ours(key: str) -> bool:
    """Whether a key in a file names a tensor of an adapter: `<module>.lntune_<what>.<tensor>`, or LoRA's.

    Args:
        key: name of a tensor in a file.

    Returns:
        True for tensors of the parts of an adapter, False for those of heads.
    """
    *above, last = key.split(".")
    return last.startswith(BARE) or (bool(above) and above[-1].startswith(CONTAINERS))


def is_part(key: str, adapter_name: str) -> bool:
    """Whether a name in a model belongs to a part of this adapter, and not to a head in `modules_to_save`.

    Args:
        key: name of a tensor in a model.
        adapter_name: the adapter.

    Returns:
        True for the tensors of the adapter's parts.

    Example:
        >>> is_part("norm.lntune_weight.default.weight", "default"), is_part("head.bias", "default")
        (True, False)
    """
    return any(name == adapter_name and above.startswith(CONTAINERS) for above, name in pairwise(key.split(".")))


def of_adapter(key: str, adapter_name: str) -> bool:
    """Whether a name in a model belongs to this adapter: to one of its parts, or to a head in `modules_to_save`.

    Args:
        key: name of a tensor in a model.
        adapter_name: the adapter.

    Returns:
        True for all tensors of the adapter.
    """
    return is_part(key, adapter_name) or f".modules_to_save.{adapter_name}." in f".{key}."


def without_adapter_name(key: str, adapter_name: str) -> str:
    """Turn the name of a tensor in a model into its name in a file.

    The container before the adapter's name decides. PEFT's own rule would take `bias` off `classifier.bias` for an
    adapter called `bias`. Layers that other adapters have put around this one's are left out of the name.

    Args:
        key: the name in a model.
        adapter_name: the adapter.

    Returns:
        The name in a file; a name that does not belong to a part of the adapter is returned unchanged.

    Example:
        >>> without_adapter_name("0.base_layer.lora_A.default.weight", "default")
        '0.lora_A.weight'
    """
    parts = key.split(".")
    for place, (container, name) in enumerate(pairwise(parts)):
        whole = place + 2 < len(parts) or container.startswith(BARE)  # else this is a tensor's name, not the adapter's
        if name == adapter_name and container.startswith(CONTAINERS) and whole:
            above = [part for part in parts[:place] if part != "base_layer"]
            return ".".join([*above, container, *parts[place + 2 :]])
    return key


def has_lora(keys: Iterable[str]) -> bool:
    """Whether any of these names in a file belongs to a tensor of LoRA.

    Args:
        keys: names of tensors in a file.

    Returns:
        True if the file has a LoRA part.
    """
    return any(is_ours(key) and f".{LORA}" in f".{key}" for key in keys)


def with_lora_name(key: str, adapter_name: str) -> str:
    """Turn the name of a LoRA tensor in a file into its name in a model.

    Args:
        key: the name in a file.
        adapter_name: name of the adapter in the model.

    Returns:
        The name in a model; any other name is returned unchanged.

    Example:
        >>> with_lora_name("0.lora_A.weight", "default")
        '0.lora_A.default.weight'
    """
    parts = key.split(".")
    for place in range(max(len(parts) - 2, 0), len(parts)):
        if parts[place].startswith(LORA):
            return ".".join([*parts[: place + 1], adapter_name, *parts[place + 1 :]])
    return key
