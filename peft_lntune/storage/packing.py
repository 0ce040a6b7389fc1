"""Packing: all masked deltas as two tensors of a file, and supermasks as bits.

The header of a safetensors file takes about a hundred bytes per tensor. An adapter that tunes a tenth of a model's norm
entries has some fifty masked parameters of a few values each, so two tensors per parameter would be smaller than their
own names.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from peft_lntune.core.delta import PARAMETERS, pack_bits, unpack_bits
from peft_lntune.core.supermask import kept
from peft_lntune.errors import AdapterFileError
from peft_lntune.storage.renaming import old_name

__all__ = [
    "KEEP",
    "PACKED",
    "PREFIX",
    "ROOT",
    "SCORES",
    "counts_of",
    "is_packed",
    "pack",
    "pack_scores",
    "unpack",
    "unpack_scores",
]

PREFIX = "lntune_"
"""Prefix of the names of containers; for a delta, the name of its parameter follows."""

DELTAS = tuple(f"{PREFIX}{parameter}" for parameter in PARAMETERS)
"""Names of the containers of deltas. Other parts of an adapter are never masked."""

ROOT = "base_model.model."
"""Prefix that PEFT puts before every name in a file."""

PACKED = f"{PREFIX}packed"
"""Name of the two tensors that hold all masked deltas, in place of a module and a parameter."""

SCORES, KEEP = f".{PREFIX}supermask.weight", f".{PREFIX}supermask.keep"
"""Endings of the names of a supermask's scores and of its bits."""

_VALUES, _BITS = ".weight", ".mask"


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the masked deltas of an adapter into two tensors. `unpack` is the inverse.

    The two tensors are the values, `lntune_packed.weight` of shape `(k,)`, and the bits, `lntune_packed.mask` in uint8.
    They hold the masked parameters one after the other, sorted by name. Dense deltas and heads stay as they are. If
    values have several dtypes, only those of the most frequent dtype are packed.

    Args:
        tensors: an adapter's state dict without the adapter's name: `<module>.lntune_<parameter>.weight` and, for a
            masked delta, `.mask`. With or without PEFT's `base_model.model.` before all names.

    Returns:
        A new dict; names have the same prefix. A dict that is packed already is returned unchanged.

    Example:
        >>> bits = torch.tensor([3], dtype=torch.uint8)
        >>> pack({"norm.lntune_bias.weight": torch.tensor([0.5, 2.0]), "norm.lntune_bias.mask": bits})
        {'lntune_packed.weight': tensor([0.5000, 2.0000]), 'lntune_packed.mask': tensor([3], dtype=torch.uint8)}
    """
    if is_packed(tensors):
        return dict(tensors)
    masked = sorted(_named(tensors, _BITS), key=lambda name: name.removeprefix(ROOT))
    frequent = Counter(tensors[name + _VALUES].dtype for name in masked).most_common(1)
    names = [name for name in masked if tensors[name + _VALUES].dtype == frequent[0][0]]
    if not names:
        return dict(tensors)
    taken = {name + ending for name in names for ending in (_VALUES, _BITS)}
    packed = {key: value for key, value in tensors.items() if key not in taken}
    root = ROOT if names[0].startswith(ROOT) else ""
    for ending in (_VALUES, _BITS):
        parts = [tensors[name + ending].detach() for name in names]
        packed[root + PACKED + ending] = torch.cat([part.to(parts[0].device) for part in parts])
    return packed


def unpack(tensors: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, torch.Size]], where: str) -> dict[str, Tensor]:
    """Take the masked deltas out of the two tensors that `pack` made.

    Args:
        tensors: the state dict of a file. If nothing is packed, it is returned unchanged.
        sizes: for each masked parameter, by its name `<module>.lntune_<parameter>`, the number of its tuned entries and
            the shape of the base parameter.
        where: the file or adapter, for the message.

    Returns:
        A new dict with `.weight` and `.mask` for each name in `sizes`.

    Raises:
        AdapterFileError: the packed tensors do not fit these parameters.

    Example:
        >>> packed = {"lntune_packed.weight": torch.ones(2), "lntune_packed.mask": torch.tensor([5]).byte()}
        >>> unpack(packed, {"norm.lntune_bias": (2, torch.Size([3]))}, "an example")["norm.lntune_bias.mask"]
        tensor([5], dtype=torch.uint8)
    """
    if not is_packed(tensors):
        return dict(tensors)
    root = ROOT if any(key.startswith(ROOT + PACKED) for key in tensors) else ""
    values, bits = (tensors.get(root + PACKED + ending) for ending in (_VALUES, _BITS))
    # In the order in which they were packed, that of their names in the file.
    names = sorted((name for name in sizes if root + name + _VALUES not in tensors), key=_name_in_file)
    _check_lengths(values, bits, {name: sizes[name] for name in names}, where)
    assert values is not None
    assert bits is not None
    counts = [sizes[name][0] for name in names]
    lengths = [_bytes(sizes[name][1]) for name in names]
    unpacked = {key: value for key, value in tensors.items() if not is_packed([key])}
    for name, own, mask in zip(names, values.split(counts), bits.split(lengths), strict=True):
        _check_bits(mask, *sizes[name], name, where)
        # Copies, since a loader may keep them: a view would keep all the others in memory, and save them.
        unpacked[root + name + _VALUES], unpacked[root + name + _BITS] = own.clone(), mask.clone()
    return unpacked


def pack_scores(tensors: Mapping[str, Tensor], scores: bool = False) -> dict[str, Tensor]:
    """Replace the scores of each supermask by bits, or add the bits. `unpack_scores` is the inverse, up to sizes.

    Args:
        tensors: an adapter's state dict without the adapter's name.
        scores: whether to keep the scores too.

    Returns:
        A new dict with `.keep` (uint8, one bit per score) for each supermask; all other tensors are unchanged.

    Example:
        >>> list(pack_scores({"query.lntune_supermask.weight": torch.ones(2, 4)}))
        ['query.lntune_supermask.keep']
    """
    packed = {}
    for key, value in tensors.items():
        if not key.endswith(SCORES):
            packed[key] = value
            continue
        packed[key.removesuffix(SCORES) + KEEP] = pack_bits(kept(value.detach()))
        if scores:
            packed[key] = value
    return packed


def unpack_scores(
    tensors: Mapping[str, Tensor], masks: Mapping[str, tuple[torch.Size, float | None]], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Convert the supermasks of a file to scores if they are trained, else to bits.

    Args:
        tensors: the state dict of a file.
        masks: for each masked module by name, the shape of its mask and the size of the score that a saved bit becomes
            if its score was not saved (None if the mask is not trained).
        where: the file or adapter, for the message.

    Returns:
        A new dict, and the names of the modules whose scores were made from bits.

    Raises:
        AdapterFileError: the number of bits does not match the number of entries, or bits beyond the last are set.

    Example:
        >>> file = {"query.lntune_supermask.keep": torch.tensor([1]).byte()}
        >>> found, made = unpack_scores(file, {"query": (torch.Size([2]), 5.0)}, "an example")
        >>> found["query.lntune_supermask.weight"].tolist(), made
        ([5.0, -5.0], ['query'])
    """
    unpacked, made = {key: value for key, value in tensors.items() if not key.endswith((KEEP, SCORES))}, []
    for key in (key for key in tensors if key.endswith((KEEP, SCORES))):
        module = key.removesuffix(KEEP).removesuffix(SCORES)
        shape, score = masks.get(module.removeprefix(ROOT), (None, None))
        if key.endswith(SCORES):
            if shape is None or score is not None:
                unpacked[key] = tensors[key]
            elif module + KEEP not in tensors:
                unpacked[module + KEEP] = pack_bits(kept(tensors[key]))
            continue
        if shape is not None:
            _check_supermask(tensors[key], shape, module, where)
        if shape is None or score is None:
            unpacked[key] = tensors[key]
        elif module + SCORES not in tensors:
            scores = torch.full(shape, score, dtype=torch.float32, device=tensors[key].device)
            unpacked[module + SCORES] = scores.where(unpack_bits(tensors[key], shape), -scores)
            made.append(module)
    return unpacked, made


def is_packed(keys: Iterable[str]) -> bool:
    """Whether any of these names belongs to a packed tensor.

    Args:
        keys: names of tensors in a file.

    Returns:
        True if `pack` made one of the tensors.
    """
    return any(key.removeprefix(ROOT) in (PACKED + _VALUES, PACKED + _BITS) for key in keys)


def counts_of(tensors: Mapping[str, Tensor]) -> dict[str, int | None]:
    """Count the tuned entries of each tuned parameter.

    Args:
        tensors: an adapter's state dict without the adapter's name, not packed.

    Returns:
        The number of tuned entries by `<module>.lntune_<parameter>`, None for all.

    Example:
        >>> counts_of({"norm.lntune_bias.weight": torch.ones(3)})
        {'norm.lntune_bias': None}
    """
    return {
        name.removeprefix(ROOT): tensors[name + _VALUES].numel() if name + _BITS in tensors else None
        for name in _named(tensors, _VALUES)
    }


def _named(tensors: Mapping[str, Tensor], ending: str) -> list[str]:
    """Names `<module>.lntune_<parameter>` of the deltas that have an unpacked tensor with this ending."""
    names = [key.removesuffix(ending) for key in tensors if key.endswith(ending) and not is_packed([key])]
    return [name for name in names if name.rpartition(".")[2] in DELTAS]


def _name_in_file(name: str) -> str:
    return old_name(name + _VALUES).removesuffix(_VALUES)


def _bytes(shape: torch.Size) -> int:
    return -(-shape.numel() // 8)


def _check_lengths(
    values: Tensor | None, bits: Tensor | None, sizes: Mapping[str, tuple[int, torch.Size]], where: str
) -> None:
    if not sizes:
        raise AdapterFileError(
            f"{where} holds masked deltas, but does not fit this model, where all deltas are dense. Choose the same "
            "entries first (fit_fisher_masks or set_masks), or load it with its own adapter_config.json under a new "
            "name: PeftModel.from_pretrained, load_adapter."
        )
    expected = {
        PACKED + _VALUES: (values, sum(count for count, _ in sizes.values()), "values"),
        PACKED + _BITS: (bits, sum(_bytes(shape) for _, shape in sizes.values()), "bytes of mask"),
    }
    for key, (tensor, length, what) in expected.items():
        found = None if tensor is None else tuple(tensor.shape)
        if found != (length,):
            raise AdapterFileError(
                f"{where} does not fit this model: {key} should be of shape ({length},), which is the {what} of "
                f"{len(sizes)} parameters, but {'is missing' if found is None else f'is of shape {found}'}. It was "
                "trained on another model or with another mask, or the file or its config was changed."
            )


def _check_bits(mask: Tensor, count: int, shape: torch.Size, name: str, where: str) -> None:
    bits = unpack_bits(mask, torch.Size([8 * len(mask)]))
    found = int(bits[: shape.numel()].sum())
    if found == count and not bits[shape.numel() :].any():
        return
    extra = "" if found != count else " and others beyond its last entry"
    raise AdapterFileError(
        f"{where} does not fit this model: the mask of {name} has {found} entries{extra}, expected {count} of "
        f"{shape.numel()}. It was trained on another model or with another mask, or the file or its config was changed."
    )


def _check_supermask(bits: Tensor, shape: torch.Size, name: str, where: str) -> None:
    fits = tuple(bits.shape) == (_bytes(shape),)
    if fits and not unpack_bits(bits[-1:], torch.Size([8]))[(shape.numel() - 1) % 8 + 1 :].any():
        return
    raise AdapterFileError(
        f"{where} does not fit this model: the supermask of {name} has {bits.numel():,} bytes, expected "
        f"{_bytes(shape):,} for the {shape.numel():,} entries of {tuple(shape)}, with no bit beyond the last. It was "
        "trained on another model, or the file or its config was changed."
    )
