"""The one reader of saved adapters: two files in a directory or on the Hub, read without trust in what they say."""

import inspect
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import Tensor

from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.storage.adapter_file import CONFIG_FILE, PEFT_TYPE, PICKLED_FILE, WEIGHTS_FILE, read_tensors
from peft_lntune.storage.manifest import PREVIOUS, check_tensors
from peft_lntune.storage.packing import PREFIX, ROOT

__all__ = ["SavedAdapter", "current_config", "hub_options", "read_config"]

# Keys by which a config is known for one of this package, whatever its `peft_type` says.
_MARKS = ("kind", "format_version", "peft_lntune_version", "manifest")


class SavedAdapter:
    """A saved adapter of any PEFT type; each of its files is read when it is first asked for.

    Args:
        path: the directory, or a repository on the Hub.
        hub: keyword arguments of a loader, of which those count that say where to look: `subfolder`, `revision`,
            `token`, ... None: only this machine is looked at.

    Attributes:
        name: the directory or repository, for errors.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> SavedAdapter(folder).fields is None
        True
    """

    def __init__(self, path: str | os.PathLike, hub: Mapping[str, Any] | None = None) -> None:
        self._path, self._hub = str(path), None if hub is None else hub_options(hub)
        self._folder = Path(path, (hub or {}).get("subfolder") or "")
        self.name = str(self._folder if self._folder.is_dir() else path)

    @cached_property
    def fields(self) -> dict[str, Any] | None:
        """The fields of its config, see `read_config`; None where there is no config."""
        file = self._folder / CONFIG_FILE
        if file.is_file():
            return read_config(file)
        found = self._download(CONFIG_FILE, Exception)  # then the loader itself says what is missing
        return None if found is None else read_config(found)

    @property
    def is_ours(self) -> bool:
        """Whether it has a config, and that is of this package."""
        return self.fields is not None and self.fields.get("peft_type") == PEFT_TYPE

    @property
    def seems_ours(self) -> bool:
        """Whether it is of this package, as far as what is left of its files says."""
        try:
            if self.fields is not None or not self._folder.is_dir():
                return self.is_ours
        except AdapterFileError:
            return True  # its config is damaged, and what it was cannot be told
        try:
            return any(f".{PREFIX}" in f".{name}" for name in self.tensors)
        except AdapterFileError:
            return False  # neither of the two files says anything

    @property
    def own_fields(self) -> dict[str, Any]:
        """The fields of its config, which is of this package.

        Raises:
            AdapterFileError: there is no config, or it is of another PEFT type.
            ConfigError: the config is damaged.
        """
        try:
            fields = self.fields
        except AdapterFileError as error:
            raise ConfigError(str(error)) from error
        if fields is None:
            raise AdapterFileError(
                f"{self.name} holds no {CONFIG_FILE}. Give the directory that save_pretrained has written; one on the "
                "Hub is fetched by huggingface_hub.snapshot_download."
            )
        if not self.is_ours:
            raise AdapterFileError(
                f"{self.name} holds an adapter of PEFT type {fields.get('peft_type')}, not one of peft_lntune. Load it "
                "into a PeftModel of its own."
            )
        return fields

    @cached_property
    def weights(self) -> Path | None:
        """Its weight file, as PEFT chooses it: safetensors before pickled; None: neither here nor on the Hub.

        Raises:
            AdapterFileError: a local directory holds neither.
        """
        names = (WEIGHTS_FILE, PICKLED_FILE)
        if self._folder.is_dir() or self._hub is None:
            found = next((self._folder / name for name in names if (self._folder / name).exists()), None)
            if found is None:
                # PEFT would take the path for the name of a repository on the Hub, and complain about its spelling.
                raise AdapterFileError(f"{self.name} holds a config, but no {WEIGHTS_FILE}. Get the whole adapter.")
            return found
        missing = (EntryNotFoundError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError)
        return next((file for name in names if (file := self._download(name, *missing)) is not None), None)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its weight file by name.

        Raises:
            AdapterFileError: there is no weight file, or it is damaged.
        """
        if self.weights is None:
            raise AdapterFileError(f"{self.name} holds no weights of an adapter. Get the whole adapter.")
        return read_tensors(self.weights)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of its tensors by name, without the prefix that PEFT puts before all names."""
        return {name.removeprefix(ROOT): tensor.shape for name, tensor in self.tensors.items()}

    def check(self, manifest: Mapping[str, Any] | None) -> "SavedAdapter":
        """Compare the weights with the manifest of a config; see `manifest.check_tensors`.

        Args:
            manifest: of the config; None: only what the tensors are in themselves is looked at.

        Returns:
            The adapter itself.

        Raises:
            AdapterFileError: there are no weights, they cannot be read, or they are not those of the manifest.
        """
        check_tensors(manifest, self.tensors, str(self.weights))
        return self

    def _download(self, file: str, *missing: type[Exception]) -> Path | None:
        if self._hub is None:
            return None
        try:
            return Path(hf_hub_download(self._path, file, **self._hub))
        except missing:
            return None


def hub_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a loader's keyword arguments that say where on the Hub to look.

    Args:
        given: any keyword arguments.

    Returns:
        `subfolder`, `revision`, `token` and whatever else `hf_hub_download` takes.

    Example:
        >>> hub_options({"revision": "main", "is_trainable": True})
        {'revision': 'main'}
    """
    known = inspect.signature(hf_hub_download).parameters
    return {name: value for name, value in given.items() if name in known}


def read_config(file: str | os.PathLike) -> dict[str, Any]:
    """The fields of a config file, of any adapter of PEFT.

    Where a save was killed between its two files, these are of the config of the weights that are there: the new one,
    or the one that it was about to replace. `runtime_config` of one of ours is left out: it belongs to one process.

    Args:
        file: an `adapter_config.json`.

    Returns:
        The fields by name, as JSON has them.

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
    config = _of_weights(config, Path(file).parent)
    if config.get("peft_type") == PEFT_TYPE:
        config.pop("runtime_config", None)
    return config


def current_config(folder: Path) -> dict[str, Any] | None:
    """The fields of the adapter of ours in a folder; None where there is none that could be loaded."""
    try:
        config = read_config(folder / CONFIG_FILE)
    except AdapterFileError:
        return None
    return config if _fits(config, folder) else None


def _of_weights(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config as it belongs to the weights in its folder."""
    manifest = config.get("manifest")
    if not isinstance(manifest, dict) or PREVIOUS not in manifest:
        return config
    new = {**config, "manifest": {key: value for key, value in manifest.items() if key != PREVIOUS}}
    old = manifest[PREVIOUS]
    return old if isinstance(old, dict) and not _fits(new, folder) and _fits(old, folder) else new


def _fits(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether the weights in a folder are those of a config, by its digest."""
    manifest = config.get("manifest")
    if not isinstance(manifest, dict) or not manifest.get("digest"):
        return False
    try:
        SavedAdapter(folder).check(manifest)
    except AdapterFileError:
        return False
    return True
