"""The one reader of saved adapters: two files in a folder or on the Hub, read without trusting them."""

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

# Keys that identify a config of this package, whatever its `peft_type` says.
_MARKS = ("kind", "format_version", "peft_lntune_version", "manifest")


class SavedAdapter:
    """A saved adapter of any PEFT type. Each of its files is read when first asked for.

    Args:
        path: the folder, or a repository on the Hub.
        hub: keyword arguments of a loader. Those that say where to look are used: `subfolder`, `revision`, `token`, ...
            None: look only on this machine.

    Attributes:
        name: the folder or repository, for errors.

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
        """The fields of the config by name; None if there is no config.

        Raises:
            AdapterFileError: the config is damaged.
        """
        file = self._folder / CONFIG_FILE
        if file.is_file():
            return read_config(file)
        found = self._download(CONFIG_FILE, Exception)  # the loader then reports what is missing
        return None if found is None else read_config(found)

    @property
    def is_ours(self) -> bool:
        """Whether it has a config of this package."""
        return self.fields is not None and self.fields.get("peft_type") == PEFT_TYPE

    @property
    def seems_ours(self) -> bool:
        """Whether it seems to be an adapter of this package, even if a file is damaged or missing."""
        try:
            if self.fields is not None or not self._folder.is_dir():
                return self.is_ours
        except AdapterFileError:
            return True  # the config is damaged, so its type is not known
        try:
            return any(f".{PREFIX}" in f".{name}" for name in self.tensors)
        except AdapterFileError:
            return False  # neither file can be read

    @property
    def own_fields(self) -> dict[str, Any]:
        """The fields of the config, which must be of this package.

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
                f"{self.name} holds no {CONFIG_FILE}. Give the folder that save_pretrained wrote. To fetch a folder "
                "from the Hub, use huggingface_hub.snapshot_download."
            )
        if not self.is_ours:
            raise AdapterFileError(
                f"{self.name} holds an adapter of PEFT type {fields.get('peft_type')}, not one of peft_lntune. Load it "
                "into a PeftModel of its own."
            )
        return fields

    @cached_property
    def weights(self) -> Path | None:
        """The weight file, as PEFT chooses it: safetensors before pickled; None if the Hub has neither.

        Raises:
            AdapterFileError: a local folder has neither.
        """
        names = (WEIGHTS_FILE, PICKLED_FILE)
        if self._folder.is_dir() or self._hub is None:
            found = next((self._folder / name for name in names if (self._folder / name).exists()), None)
            if found is None:
                # PEFT would take the path for a repository on the Hub, and complain about its spelling.
                raise AdapterFileError(f"{self.name} holds a config, but no {WEIGHTS_FILE}. Get the whole adapter.")
            return found
        missing = (EntryNotFoundError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError)
        return next((file for name in names if (file := self._download(name, *missing)) is not None), None)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the weight file by name.

        Raises:
            AdapterFileError: there is no weight file, or it is damaged.
        """
        if self.weights is None:
            raise AdapterFileError(f"{self.name} holds no weights of an adapter. Get the whole adapter.")
        return read_tensors(self.weights)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the tensors by name, without the prefix that PEFT puts before all names."""
        return {name.removeprefix(ROOT): tensor.shape for name, tensor in self.tensors.items()}

    def check(self, manifest: Mapping[str, Any] | None) -> "SavedAdapter":
        """Check the weights: dtypes, finite values, and the digest in the manifest of a config.

        Args:
            manifest: manifest of the config; None: only dtypes and values are checked.

        Returns:
            The adapter itself.

        Raises:
            AdapterFileError: there are no weights, they cannot be read, or they do not match the manifest.
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
    """Select the keyword arguments of a loader that say where to look on the Hub.

    Args:
        given: any keyword arguments.

    Returns:
        `subfolder`, `revision`, `token` and all others that `hf_hub_download` takes.

    Example:
        >>> hub_options({"revision": "main", "is_trainable": True})
        {'revision': 'main'}
    """
    known = inspect.signature(hf_hub_download).parameters
    return {name: value for name, value in given.items() if name in known}


def read_config(file: str | os.PathLike) -> dict[str, Any]:
    """Read the fields of a config file of any PEFT adapter.

    If a save was killed between its two files, the fields are those of the config that belongs to the weights: the new
    one, or the one it was about to replace. `runtime_config` is left out for adapters of this package, because it
    belongs to one process.

    Args:
        file: an `adapter_config.json`.

    Returns:
        The fields by name, as JSON has them.

    Raises:
        AdapterFileError: the file is damaged or not a JSON object, or it is of this package and claims another PEFT
            type.
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
            f"{file} is damaged: its fields {', '.join(marks)} are those of peft_lntune, but its peft_type is "
            f"{config.get('peft_type')!r} instead of {PEFT_TYPE!r}. Get a good copy of the adapter."
        )
    config = _of_weights(config, Path(file).parent)
    if config.get("peft_type") == PEFT_TYPE:
        config.pop("runtime_config", None)
    return config


def current_config(folder: Path) -> dict[str, Any] | None:
    """Read the config of the adapter of this package in a folder.

    Args:
        folder: the folder.

    Returns:
        The fields by name; None if there is no adapter that could be loaded.
    """
    try:
        config = read_config(folder / CONFIG_FILE)
    except AdapterFileError:
        return None
    return config if _fits(config, folder) else None


def _of_weights(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config that belongs to the weights in its folder: the given one, or the one that it was replacing."""
    manifest = config.get("manifest")
    if not isinstance(manifest, dict) or PREVIOUS not in manifest:
        return config
    new = {**config, "manifest": {key: value for key, value in manifest.items() if key != PREVIOUS}}
    old = manifest[PREVIOUS]
    return old if isinstance(old, dict) and not _fits(new, folder) and _fits(old, folder) else new


def _fits(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether the weights in a folder match the digest in a config."""
    manifest = config.get("manifest")
    if not isinstance(manifest, dict) or not manifest.get("digest"):
        return False
    try:
        SavedAdapter(folder).check(manifest)
    except AdapterFileError:
        return False
    return True
