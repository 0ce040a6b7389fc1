"""The manifest in a saved config: what the adapter's files hold, to check that they still belong together.

An adapter is two files, `adapter_config.json` and `adapter_model.safetensors`. Both decide what it computes, so the
manifest covers both: every tensor by a digest, and every field of the config by a copy that the digest covers too.
Provenance is left out, because people and the Hub may edit it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_lntune.errors import AdapterFileError
from peft_lntune.storage.adapter_file import read_tensors
from peft_lntune.storage.keys import is_ours
from peft_lntune.storage.packing import KEEP, PREFIX, ROOT, counts_of, pack

__all__ = [
    "PREVIOUS",
    "PROVENANCE",
    "changes",
    "check_tensors",
    "digest_of",
    "is_finite",
    "is_sealed",
    "manifest_of",
    "seal",
    "seal_file",
]

PROVENANCE = frozenset(
    {
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "peft_lntune_version",
        "manifest",
    }
)
"""Fields of a config that do not decide what an adapter computes. All others are covered by the digest."""

FIELDS, FULL, PREVIOUS = "fields", "full_digest", "previous"
"""Keys of a manifest: a copy of the fields; the digest of everything; the config whose weights are being replaced."""


def manifest_of(tensors: Mapping[str, Tensor], partial: bool = False) -> dict[str, Any]:
    """Describe the weights of an adapter. `seal` later adds the fields of its config.

    Args:
        tensors: the adapter's state dict without adapter names, not packed yet.
        partial: whether the adapter may tune fewer parameters than its config alone says.

    Returns:
        A dict with `digest`: SHA-256 over name, dtype, shape and bytes of each tensor of the adapter's parts, packed as
        in the file. If a delta is masked or `partial` is True, also `tuned`: the number of tuned entries per tuned
        parameter, None for all, so that each delta can be made in its final shape before the file is read.
    """
    ours = _ours(tensors)
    counts = counts_of(ours)
    manifest: dict[str, Any] = {"digest": digest_of(pack(ours))}
    return {**manifest, "tuned": counts} if partial or any(counts.values()) else manifest


def seal(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Complete the manifest of a config that is about to be saved with these weights.

    Args:
        config: the fields of the config, as JSON has them, with a manifest.
        tensors: every tensor of the weight file, including heads.

    Returns:
        The manifest with `fields`, a copy of the fields that decide what is computed, and `full_digest`, a digest over
        the manifest and the tensors. If the weights do not match the manifest, neither is added.
    """
    manifest = {key: value for key, value in config["manifest"].items() if key not in (FIELDS, FULL, PREVIOUS)}
    if manifest.get("digest") != digest_of(_ours(tensors)):
        return manifest
    manifest[FIELDS] = _covered(config)
    return {**manifest, FULL: _full_digest(manifest, tensors)}


def seal_file(config_file: Path, weights: Path | None) -> None:
    """Complete the manifest in a config file for the weights it is saved with.

    Args:
        config_file: the config file; rewritten if its config has a manifest.
        weights: the weight file; None: nothing is done.

    Raises:
        AdapterFileError: the weight file cannot be read.
    """
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if weights is None or not isinstance(config.get("manifest"), dict):
        return
    config["manifest"] = seal(config, read_tensors(weights))
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def is_sealed(manifest: Mapping[str, Any] | None) -> bool:
    """Whether a manifest also covers heads and config. Manifests of early versions cover only the tensors of deltas.

    Args:
        manifest: the manifest of a config, if any.

    Returns:
        True if everything is covered.
    """
    return bool(manifest) and FULL in manifest  # type: ignore[operator]


def changes(config: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """List the fields of a config that were changed after it was saved.

    Args:
        config: the fields of the config, as JSON has them.
        known: the fields of its class. Other tools may add fields of their own, which are ignored.

    Returns:
        One text per changed field, with both values; empty if the manifest holds no copy of the fields.

    Example:
        >>> changes({"scale": 2.0, "manifest": {"fields": {"scale": 1.0}}}, ["scale"])
        ['scale is 2.0, and was 1.0']
    """
    manifest = config.get("manifest")
    saved = manifest.get(FIELDS) if isinstance(manifest, Mapping) else None
    if saved is None:
        return []
    read = {*known, *(saved if isinstance(saved, Mapping) else ())}
    return list(_differences(_covered({name: config[name] for name in config if name in read}), saved, "fields"))


def check_tensors(manifest: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a state dict that is not the adapter that `manifest` describes.

    Args:
        manifest: a manifest from `manifest_of` or `seal`; None skips the comparison.
        tensors: the state dict of a file, without adapter names.
        where: the file or adapter, for the message.

    Raises:
        AdapterFileError: the state dict has no tensor of this package, a dtype is wrong, a value is not finite, or the
            digest differs.
    """
    ours = _ours(tensors)
    if not ours:
        raise AdapterFileError(
            f"{where} holds no tensor named `...{PREFIX}...`, but {len(tensors)} others, such as "
            f"{next(iter(tensors), 'none')!r}. It was not saved by peft_lntune, or its keys were renamed."
        )
    for name, tensor in ours.items():
        wanted = "uint8" if name.endswith((".mask", KEEP)) else "a floating dtype"
        if (tensor.dtype == torch.uint8) if wanted == "uint8" else tensor.is_floating_point():
            continue
        raise AdapterFileError(f"{where}: {name} should be of {wanted}, but is {tensor.dtype}. Get a good copy.")
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not is_finite(t)]
    if broken:
        raise AdapterFileError(
            f"{where}: {len(broken)} tensors hold NaN or infinite values, the first is {broken[0]}. "
            "The training that wrote it diverged, or the file is damaged; take an earlier checkpoint."
        )
    if manifest and "digest" in manifest and manifest["digest"] != digest_of(ours):
        raise AdapterFileError(
            f"{where} is not the file that its adapter_config.json was saved with: the digests differ. One of the two "
            "comes from another save, or was changed after saving. Get both from one save."
        )
    if manifest and (FULL in manifest or FIELDS in manifest):
        own = {key: value for key, value in manifest.items() if key not in (FULL, PREVIOUS)}
        if manifest.get(FULL) != _full_digest(own, tensors):
            raise AdapterFileError(
                f"{where} is not the file that its adapter_config.json was saved with: the digests differ for heads "
                "(modules_to_save) and the manifest in the config. One of the two files comes from another save, or "
                "was changed after saving. Get both from one save."
            )


def _covered(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config and of its parts that decide what the adapter computes."""
    kept = {name: value for name, value in config.items() if name not in PROVENANCE}
    if isinstance(kept.get("parts"), list):
        kept["parts"] = [_covered(part) if isinstance(part, Mapping) else part for part in kept["parts"]]
    return kept


def _differences(now: Any, saved: Any, path: str) -> Iterator[str]:
    if isinstance(now, Mapping) and isinstance(saved, Mapping):
        for name in [*saved, *(name for name in now if name not in saved)]:
            inner = str(name) if path == "fields" else f"{path}.{name}"
            if name not in now:
                yield f"{inner} is missing, and was {saved[name]!r}"
            elif name not in saved:
                yield f"{inner} is {now[name]!r}, and was not there"
            else:
                yield from _differences(now[name], saved[name], inner)
    elif isinstance(now, list) and isinstance(saved, list) and len(now) == len(saved):
        for place, (one, other) in enumerate(zip(now, saved, strict=True)):
            yield from _differences(one, other, f"{path}[{place}]")
    elif now != saved or isinstance(now, bool) != isinstance(saved, bool):
        yield f"{path} is {now!r}, and was {saved!r}"


def _ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(ROOT): tensor for name, tensor in sorted(tensors.items()) if is_ours(name)}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names.

    Args:
        tensors: tensors by name, on any device.

    Returns:
        The digest in hexadecimal.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _full_digest(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Digest over the manifest (which holds the digest of our tensors) and over all other tensors."""
    others = {name.removeprefix(ROOT): tensor for name, tensor in tensors.items() if not is_ours(name)}
    text = json.dumps([_plain(manifest), digest_of(others)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON values with whole floats as integers, because some tools rewrite 1.0 as 1."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry of a floating tensor is NaN or infinite, also for 8-bit floats, which have no `isfinite`.

    Args:
        tensor: a floating tensor.

    Returns:
        True if every entry is finite.
    """
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())
