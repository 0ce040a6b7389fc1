"""Masked deltas as two tensors of a file: the header of a safetensors file takes a hundred bytes for each tensor in it.

An adapter that tunes a tenth of a model's norms has some fifty masked parameters of a few values each, so a tensor of
values and one of bits for each parameter would weigh less than their names.
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
"""What the container of a delta is called, up to the name of its parameter."""

DELTAS = tuple(f"{PREFIX}{parameter}" for parameter in PARAMETERS)
"""The containers of deltas; the other parts of an adapter are never masked."""

ROOT = "base_model.model."
"""What PEFT puts before every name in a file."""

PACKED = f"{PREFIX}packed"
"""The name, in place of a module and a parameter, of the two tensors that hold all masked deltas."""

SCORES, KEEP = f".{PREFIX}supermask.weight", f".{PREFIX}supermask.keep"
"""How the names of the scores of a supermask end, and of its bits."""

_VALUES, _BITS = ".weight", ".mask"


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the masked deltas of an adapter into two tensors. Inverse of `unpack`.

    The values, `lntune_packed.weight` `(k,)`, and the bits, `lntune_packed.mask` uint8, are those of the masked
    parameters, one after the other in the order of `sorted` on their names. Dense deltas and heads stay as they are.
    A tensor has one dtype, so where an adapter has values of several, only those of the most frequent one are packed.

    Args:
        tensors: an adapter's state dict without the adapter's name: `<module>.lntune_<parameter>.weight` and, where it
            is masked, `.mask` beside it. With or without PEFT's `base_model.model.` before all names.

    Returns:
        A new dict; names have the same prefix. What is packed already stays as it is.

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
    """Take the masked deltas out of what `pack` made.

    Args:
        tensors: the state dict of a file. One in which nothing is packed is returned as it is.
        sizes: for each masked parameter, by its name `<module>.lntune_<parameter>`, the number of its tuned entries and
            the shape of the base parameter.
        where: the file or adapter, for the message.

    Returns:
        A new dict with `.weight` and `.mask` for each name in `sizes`.

    Raises:
        AdapterFileError: the packed tensors are not those of these parameters.

    Example:
        >>> packed = {"lntune_packed.weight": torch.ones(2), "lntune_packed.mask": torch.tensor([5]).byte()}
        >>> unpack(packed, {"norm.lntune_bias": (2, torch.Size([3]))}, "an example")["norm.lntune_bias.mask"]
        tensor([5], dtype=torch.uint8)
    """
    if not is_packed(tensors):
        return dict(tensors)
    root = ROOT if any(key.startswith(ROOT + PACKED) for key in tensors) else ""
    values, bits = (tensors.get(root + PACKED + ending) for ending in (_VALUES, _BITS))
    # In the order of the names that they had when they were packed.
    names = sorted((name for name in sizes if root + name + _VALUES not in tensors), key=_name_in_file)
    _check_lengths(values, bits, {name: sizes[name] for name in names}, where)
    assert values is not None
    assert bits is not None
    counts = [sizes[name][0] for name in names]
    lengths = [_bytes(sizes[name][1]) for name in names]
    unpacked = {key: value for key, value in tensors.items() if not is_packed([key])}
    for name, own, mask in zip(names, values.split(counts), bits.split(lengths), strict=True):
        _check_bits(mask, *sizes[name], name, where)
        # Copies, since a loader may keep them as they are: a view would keep alive, and save, all the others.
        unpacked[root + name + _VALUES], unpacked[root + name + _BITS] = own.clone(), mask.clone()
    return unpacked


def pack_scores(tensors: Mapping[str, Tensor], scores: bool = False) -> dict[str, Tensor]:
    """Put the bits of each supermask in place of its scores, or beside them. Inverse of `unpack_scores`, up to size.

    Args:
        tensors: an adapter's state dict without the adapter's name.
        scores: whether to keep the scores too.

    Returns:
        A new dict with `.keep`, uint8, one bit per score, for each supermask; and all that is of none as it was.

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
    """The tensors of a file with what each supermask is made for: scores where it is trained, bits where it is not.

    Args:
        tensors: the state dict of a file.
        masks: for each masked module, by its name, the shape of the mask and, where it is trained, how large a score
            is taken for a bit whose score was not saved.
        where: the file or adapter, for the message.

    Returns:
        A new dict, and the modules whose scores were made from bits.

    Raises:
        AdapterFileError: there are more or fewer bits than entries, or bits beyond the last one.

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
    """Whether one of these names is of a packed tensor."""
    return any(key.removeprefix(ROOT) in (PACKED + _VALUES, PACKED + _BITS) for key in keys)


def counts_of(tensors: Mapping[str, Tensor]) -> dict[str, int | None]:
    """Tuned entries of each tuned parameter, None for all, from a state dict as `pack` takes it.

    Example:
        >>> counts_of({"norm.lntune_bias.weight": torch.ones(3)})
        {'norm.lntune_bias': None}
    """
    return {
        name.removeprefix(ROOT): tensors[name + _VALUES].numel() if name + _BITS in tensors else None
        for name in _named(tensors, _VALUES)
    }


def _named(tensors: Mapping[str, Tensor], ending: str) -> list[str]:
    """Names `<module>.lntune_<parameter>` of the deltas that have a tensor of their own with this ending."""
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
            "entries first (fit_fisher_masks or set_masks), or load it together with its own adapter_config.json "
            "under a new name: PeftModel.from_pretrained, load_adapter."
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
