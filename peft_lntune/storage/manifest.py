"""What a config records of the adapter it was saved with, and whether the files are still that adapter.

An adapter is two files, `adapter_config.json` and `adapter_model.safetensors`. Both decide what it computes, so the
manifest in the config covers both: every tensor by a digest, and every field of the config by a copy that the digest
covers too. Provenance is left out, because people and Hubs rightly edit it.
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
"""The fields of a config that do not decide what an adapter computes. All others are covered."""

FIELDS, FULL, PREVIOUS = "fields", "full_digest", "previous"
"""Keys of a manifest: the fields as they were saved; the digest of all; the config whose weights are being replaced."""


def manifest_of(tensors: Mapping[str, Tensor], partial: bool = False) -> dict[str, Any]:
    """What a config records of the weights saved with it, before its own fields are final; see `seal`.

    Args:
        tensors: the adapter's state dict without adapter names, not packed yet.
        partial: whether the adapter may tune fewer parameters than its config alone says.

    Returns:
        `digest`: SHA-256 over name, dtype, shape and bytes of each of our tensors, packed as they are saved. `tuned`,
        where one is masked or `partial` is said: for each tuned parameter the number of its tuned entries, null for
        all of them, so that each delta can be made in its final shape before the file is read.
    """
    ours = _ours(tensors)
    counts = counts_of(ours)
    manifest: dict[str, Any] = {"digest": digest_of(pack(ours))}
    return {**manifest, "tuned": counts} if partial or any(counts.values()) else manifest


def seal(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The manifest of a config that is about to be written beside these weights, with all that decides the answer.

    Args:
        config: as JSON has it, with a manifest.
        tensors: every tensor of the weight file, heads too.

    Returns:
        The manifest with `fields`, a copy of the fields that decide what is computed, and `full_digest`, over the
        manifest itself and the tensors. Where the weights are not those of the manifest, neither is claimed.
    """
    manifest = {key: value for key, value in config["manifest"].items() if key not in (FIELDS, FULL, PREVIOUS)}
    if manifest.get("digest") != digest_of(_ours(tensors)):
        return manifest
    manifest[FIELDS] = _covered(config)
    return {**manifest, FULL: _full_digest(manifest, tensors)}


def seal_file(config_file: Path, weights: Path | None) -> None:
    """`seal` the manifest in a config file.

    Args:
        config_file: is written anew, if its config has a manifest.
        weights: the weight file beside which it is to stand; None: there is none, and nothing is done.
    """
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if weights is None or not isinstance(config.get("manifest"), dict):
        return
    config["manifest"] = seal(config, read_tensors(weights))
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def is_sealed(manifest: Mapping[str, Any] | None) -> bool:
    """Whether a manifest covers heads and config too; those of early versions cover the tensors of deltas alone."""
    return bool(manifest) and FULL in manifest  # type: ignore[operator]


def changes(config: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """What of a config is not as it was saved, in words; empty also where its manifest does not say how it was.

    Args:
        config: as JSON has it.
        known: the fields that its kind has; other tools may add fields of their own, which nothing here reads.

    Returns:
        A text per field that differs, with both values.

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
    """Raise where a state dict cannot be the adapter that `manifest` describes.

    Args:
        manifest: as `manifest_of` or `seal` made it; None skips the comparison.
        tensors: a state dict as loaded, without adapter names.
        where: the file or adapter, for the message.

    Raises:
        AdapterFileError: nothing of ours in it, a wrong dtype, a value that is not finite, or another digest.
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
            "comes from another save, or was changed since. Get both from one save."
        )
    if manifest and (FULL in manifest or FIELDS in manifest):
        own = {key: value for key, value in manifest.items() if key not in (FULL, PREVIOUS)}
        if manifest.get(FULL) != _full_digest(own, tensors):
            raise AdapterFileError(
                f"{where} is not the file that its adapter_config.json was saved with: the digests differ that cover "
                "heads (modules_to_save) and the manifest in the config. One of the two files was changed since, or "
                "comes from another save. Get both from one save."
            )


def _covered(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, and of its parts, that decide what it computes."""
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
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _full_digest(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Over the manifest, in which the digest of our tensors is, and over all other tensors."""
    others = {name.removeprefix(ROOT): tensor for name, tensor in tensors.items() if not is_ours(name)}
    text = json.dumps([_plain(manifest), digest_of(others)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON values with whole numbers as such: some tools that format JSON write 1 for 1.0."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry of a floating tensor is NaN or infinite. Small floats have no `isfinite` of their own."""
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())
