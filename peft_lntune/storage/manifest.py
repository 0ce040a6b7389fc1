"""What a config records of the adapter it was saved with, and whether the files are still that adapter.

An adapter is two files, `adapter_config.json` and `adapter_model.safetensors`. Both decide what it computes, so the
manifest in the config covers both: every tensor by a digest, and every field of the config by a copy that the digest
covers too. Provenance is left out, because people and Hubs rightly edit it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_lntune.errors import AdapterFileError
from peft_lntune.storage.adapter_file import CONFIG_FILE, PEFT_TYPE, find_weights, read_tensors
from peft_lntune.storage.keys import is_ours
from peft_lntune.storage.packing import KEEP, PREFIX, ROOT, counts_of, pack

__all__ = [
    "PREVIOUS",
    "PROVENANCE",
    "changes",
    "check_directory",
    "check_foreign",
    "check_tensors",
    "current_config",
    "digest_of",
    "is_sealed",
    "manifest_of",
    "of_weights",
    "read_config",
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

# Keys by which a config is known for one of this package, whatever its `peft_type` says.
_MARKS = ("kind", "format_version", "peft_lntune_version", "manifest")


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
    """`seal` the manifest in a config file by the weight file beside which it is to stand, if there is one."""
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
    broken = [name for name, t in tensors.items() if t.is_floating_point() and not _finite(t)]
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


def check_foreign(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], where: str) -> None:
    """Raise where tensors that no manifest covers cannot be as they were saved.

    Args:
        tensors: of a file in a format of PEFT's own.
        like: the tensors of the model that they are for, by the same names. A file has one dtype where the model has.
        where: the file, for the message.

    Raises:
        AdapterFileError: a value is not finite, a dtype is not floating, or not that of the others.
    """
    dtypes: dict[torch.dtype, tuple[str, torch.dtype]] = {}
    for name, tensor in sorted(tensors.items()):
        if not tensor.is_floating_point():
            raise AdapterFileError(f"{where}: {name} should be of a floating dtype, but is {tensor.dtype}.")
        if not _finite(tensor):
            raise AdapterFileError(
                f"{where}: {name} holds NaN or infinite values. The training that wrote it diverged, or the file is "
                "damaged; take an earlier checkpoint."
            )
        if name in like:
            first, dtype = dtypes.setdefault(like[name].dtype, (name, tensor.dtype))
            if dtype != tensor.dtype:
                raise AdapterFileError(
                    f"{where}: {name} is {tensor.dtype}, and {first} is {dtype}, while both are of one dtype in the "
                    "model. The file was changed since it was saved; get a good copy."
                )


def check_directory(
    manifest: Mapping[str, Any] | None, path: str | os.PathLike, subfolder: str | None = None, **hub: Any
) -> dict[str, torch.Size] | None:
    """Check the weight file beside a config, local or on the Hub.

    Returns:
        The shapes of its tensors by name, without PEFT's prefix; None where the file is neither here nor there.

    Raises:
        AdapterFileError: a local directory holds no weights, the file cannot be read, or `check_tensors` refuses it.
    """
    file = find_weights(path, subfolder, hub)
    if file is None:
        return None
    tensors = read_tensors(file)
    check_tensors(manifest, tensors, str(file))
    return {name.removeprefix(ROOT): tensor.shape for name, tensor in tensors.items()}


def read_config(file: str | os.PathLike) -> dict[str, Any]:
    """The fields of a config file, of any adapter of PEFT.

    Where a save was killed between its two files, the config of the weights that are there: the new one, or the one
    that it was about to replace.

    Raises:
        AdapterFileError: it is damaged, no JSON object, or one of this package that says it is of another PEFT type.
    """
    try:
        config = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise AdapterFileError(f"{file} is damaged: {said}. Get a good copy of the adapter.") from error
    if not isinstance(config, dict):
        raise AdapterFileError(
            f"{file} is damaged: it should hold a JSON object, and holds a {type(config).__name__}. Get a good copy of "
            "the adapter."
        )
    marks = [mark for mark in _MARKS if mark in config]
    if len(marks) > 1 and config.get("peft_type") != PEFT_TYPE:
        raise AdapterFileError(
            f"{file} is damaged: it is of peft_lntune, as {', '.join(marks)} say, but its peft_type is "
            f"{config.get('peft_type')!r} in place of {PEFT_TYPE!r}. Get a good copy of the adapter."
        )
    return of_weights(config, Path(file).parent)


def of_weights(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config as it belongs to the weights in its folder; see `read_config`."""
    manifest = config.get("manifest")
    if not isinstance(manifest, dict) or PREVIOUS not in manifest:
        return config
    new = {**config, "manifest": {key: value for key, value in manifest.items() if key != PREVIOUS}}
    old = manifest[PREVIOUS]
    return old if isinstance(old, dict) and not _fits(new, folder) and _fits(old, folder) else new


def current_config(folder: Path) -> dict[str, Any] | None:
    """The config of the adapter of ours in a folder; None where there is none that could be loaded."""
    try:
        config = read_config(folder / CONFIG_FILE)
    except AdapterFileError:
        return None
    return config if _fits(config, folder) else None


def _fits(config: Mapping[str, Any], folder: Path) -> bool:
    manifest = config.get("manifest")
    try:
        if isinstance(manifest, dict) and manifest.get("digest"):
            return check_directory(manifest, folder) is not None
    except AdapterFileError:
        pass
    return False


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


def _finite(tensor: Tensor) -> bool:
    """Small floats have no `isfinite` of their own."""
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())
