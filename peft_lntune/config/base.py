"""What every config of the family shares: where to tune, how deltas are kept, and what was saved with it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from peft.utils import PeftType

from peft_lntune.errors import AdapterFileError, ConfigError
from peft_lntune.storage.adapter_file import CONFIG_FILE, PEFT_TYPE
from peft_lntune.storage.atomic import new_file
from peft_lntune.storage.manifest import is_sealed, seal_file
from peft_lntune.storage.model_card import name_import
from peft_lntune.storage.renaming import new_name
from peft_lntune.storage.saved_adapter import SavedAdapter, read_config
from peft_lntune.version import __version__

__all__ = ["CONFIG_FILE", "FORMAT_VERSION", "PART_KINDS", "PEFT_TYPE", "LNTuneConfig", "part_kind"]

Kind = TypeVar("Kind", bound="LNTuneConfig")

FORMAT_VERSION = 1
"""Version of the saved files. A file of another version is refused, never guessed at."""


@dataclass(kw_only=True)
class LNTuneConfig(PeftConfig):
    """Base of the family. Not used by itself: take one of its kinds, such as `LNTuningConfig`.

    Args:
        target_modules: names (or endings of names) of the modules to tune, or one regular expression for the whole
            name; any module with a floating weight. None: what the kind searches for, usually all norms.
        exclude_modules: modules to leave out, in the same forms.
        layers_to_transform: index or indices of the layers to tune. Modules outside numbered layers (embedding and
            final norms) are then left out.
        layers_pattern: name of the list that holds the layers, where a model has several.
        modules_to_save: modules to train fully and save beside the adapter, such as a classification head.
        delta_dtype: dtype of the deltas, as `"float32"`; None: float32, or the base dtype where that is wider.
        save_dtype: dtype of the values in the file, as `"bfloat16"`, halving it; None: that of the deltas.
        init_weights: True starts as the identity. False starts at random, for tests.
        kind: which config class this is; filled in.
        format_version: of the saved files; filled in.
        peft_lntune_version: which version of this package made it; filled in.
        manifest: what the weight file saved beside this config holds, so that a torn pair is noticed; filled in.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    delta_dtype: str | None = None
    save_dtype: str | None = None
    init_weights: bool = True
    kind: str = ""
    format_version: int = FORMAT_VERSION
    peft_lntune_version: str = __version__
    manifest: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for own in fields(self):
            if own.name != "mask_source":  # which says how numbers came about, and holds no arrays of them
                setattr(self, own.name, plain(getattr(self, own.name)))
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        self.kind = type(self).__name__
        for name in ("delta_dtype", "save_dtype"):
            if isinstance(getattr(self, name), torch.dtype):
                setattr(self, name, str(getattr(self, name)).removeprefix("torch."))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.layers_to_transform, (range, set, tuple)):
            self.layers_to_transform = list(self.layers_to_transform)  # JSON knows none of the three
        self._check()

    def _check(self) -> None:
        check_format(self.format_version)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(self, name)
        check_names(self, "modules_to_save", one_string=False)
        check_layers(self, "layers_to_transform")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern={self.layers_pattern!r} says where layers are counted, but layers_to_transform does "
                "not say which to take. Give both, or neither."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                f"layers_to_transform={self.layers_to_transform!r} cannot narrow the regular expression "
                f"target_modules={self.target_modules!r}. Put the layers into the expression, or give a list of names."
            )
        check_type(self, "init_weights", bool)
        check_type(self, "inference_mode", bool)
        if self.manifest is not None:
            check_type(self, "manifest", dict)
            check_counts(self.manifest.get("tuned", {}))
            if type(self.manifest.get("selected", 0)) is not int:
                raise ConfigError(
                    f"manifest['selected'] holds a number of entries, but got {self.manifest['selected']!r}. It is "
                    "filled in when an adapter is saved; get a good copy of adapter_config.json."
                )
        _ = self.torch_delta_dtype, self.torch_save_dtype

    @property
    def torch_delta_dtype(self) -> torch.dtype | None:
        """`delta_dtype` as torch has it."""
        return floating_dtype(self, "delta_dtype")

    @property
    def torch_save_dtype(self) -> torch.dtype | None:
        """`save_dtype` as torch has it."""
        return floating_dtype(self, "save_dtype")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, but the file appears whole or not at all, and its manifest covers all that it says.

        Beside the weights that it was loaded with, a config that was changed in Python is saved as it is now: this is
        how a field of a saved adapter is changed.
        """
        target = Path(save_directory)
        if target.is_file():
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        target.mkdir(parents=True, exist_ok=True)
        name_import(target)
        with new_file(target / CONFIG_FILE) as written:
            super().save_pretrained(str(written.parent), **kwargs)
            with suppress(AdapterFileError):  # the weights are still to be written, or damaged: then loading says so
                seal_file(written, SavedAdapter(target).weights)

    @property
    def is_sealed(self) -> bool:
        """Whether the adapter was saved with a digest that covers its heads and its config too.

        False for one that was not saved yet, and for files of early versions, whose digest covers the tensors of its
        parts alone; load and save such an adapter once to have it covered.
        """
        return is_sealed(self.manifest)

    @property
    def deltas(self) -> Any:
        """The `DeltaConfig` that this config is or contains; None where there is none."""
        return None

    @property
    def masks_are_fixed(self) -> bool:
        """Whether this config is of an adapter that has masks, which training does not change."""
        return False

    def unmasked(self) -> "LNTuneConfig":
        """A copy for a new adapter that tunes every entry, whatever adapter this config is of.

        Example:
            >>> from peft_lntune import LNTuningConfig
            >>> LNTuningConfig(mask_source={"made": "by hand"}).unmasked().mask_source is None
            True
        """
        return replace(self, manifest=None)

    def take_sizes(self, saved: "LNTuneConfig") -> None:
        """Say that the next injection of this config is for the adapter that was saved with `saved`.

        Masked deltas then get the sizes they have in the file; until their adapter is made, see `model.prepare`.
        """
        self.manifest = saved.manifest
        self.__dict__["stored"] = saved.__dict__.get("stored", True)

    def take_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """Say what tensors, by name, the file of the next injection holds: what it may claim is compared with that."""
        self.__dict__["stored"] = shapes

    @property
    def stored_counts(self) -> dict[str, int | None]:
        """Tuned entries of each tuned parameter in the file that the next injection is for; empty: all of all."""
        counts = (self.manifest or {}).get("tuned", {}) if "stored" in self.__dict__ else {}
        return {new_name(f"{place}.weight").removesuffix(".weight"): count for place, count in counts.items()}

    @property
    def stored_shapes(self) -> Mapping[str, torch.Size] | None:
        """Shapes of the tensors in the file of the next injection, as the model names them; None: not known."""
        stored = self.__dict__.get("stored")
        return {new_name(name): shape for name, shape in stored.items()} if isinstance(stored, Mapping) else None

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's, with an error that names the file where it is no JSON object; see `read_config`."""
        try:
            return read_config(path_json_file)
        except AdapterFileError as error:
            raise ConfigError(str(error)) from error


PART_KINDS: dict[str, type[LNTuneConfig]] = {}
"""The configs by name, as `kind` in a file has it, that stand for one method each; see `part_kind`."""


def part_kind(cls: type[Kind]) -> type[Kind]:
    """Decorate a config class that an adapter, or a part of one, may have; files then find it by its name."""
    PART_KINDS[cls.__name__] = cls
    return cls


def plain(value: Any, arrays: bool = True) -> Any:
    """Numbers and lists as JSON has them, where they came from numpy or torch; anything else as it is.

    Args:
        value: of a field.
        arrays: False leaves arrays of more than one number as they are.

    Example:
        >>> plain([torch.tensor(1), 2])
        [1, 2]
    """
    if type(value) in (list, tuple, set):
        return type(value)(plain(item, arrays) for item in value)
    if type(value) is dict:
        return {key: plain(item, arrays) for key, item in value.items()}
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        return value.tolist() if (arrays or value.ndim == 0) else value
    return value


def check_format(version: Any) -> None:
    """Raise a `ConfigError` where files of this version are not read here; the one place that says so."""
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"this adapter has format_version {version!r}, and peft_lntune {__version__} reads {FORMAT_VERSION}. "
            "Upgrade with `pip install -U peft-lntune`, or save the adapter again."
        )


def check_counts(counts: Any) -> None:
    """Raise a `ConfigError` where `manifest["tuned"]` is not as it was saved."""
    sizes = counts.values() if isinstance(counts, dict) else [counts]
    wrong = [size for size in sizes if size is not None and (type(size) is not int or size < 1)]
    if wrong:
        raise ConfigError(
            "manifest['tuned'] holds a number of entries, at least 1, or null for each tuned parameter, but got "
            f"{wrong[0]!r}. It is filled in when an adapter is saved; get a good copy of adapter_config.json."
        )


def floating_dtype(config: LNTuneConfig, name: str) -> torch.dtype | None:
    """The dtype that a field names.

    Args:
        config: the config.
        name: of the field.

    Returns:
        The dtype; None where the field is None.

    Raises:
        ConfigError: the field names no floating dtype.
    """
    value = getattr(config, name)
    if value is None:
        return None
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"{name}={value!r} is no floating dtype of torch. "
            'Use "float32", "float64", "bfloat16" or "float16", or leave it out.'
        )
    return dtype


def check_names(config: LNTuneConfig, name: str, one_string: bool = True) -> None:
    """Check a field that holds names of modules.

    Args:
        config: the config.
        name: of the field.
        one_string: whether one string is allowed.

    Raises:
        ConfigError: the field holds anything but names.
    """
    value = getattr(config, name)
    if value is None or (one_string and isinstance(value, str)):
        return
    if isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value):
        return
    allowed = "a string, a list of strings or None" if one_string else "a list of strings or None"
    raise ConfigError(f"{name} takes {allowed}, but got {value!r} of type {type(value).__name__}.")


def check_layers(config: LNTuneConfig, name: str) -> None:
    """Check a field that holds indices of layers.

    Args:
        config: the config.
        name: of the field.

    Raises:
        ConfigError: the field holds neither an index nor a list of them.
    """
    value = getattr(config, name)
    if value is None:
        return
    indices = value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in indices):
        raise ConfigError(
            f"{name} takes an index or a list of indices, counted from 0, but got {value!r}. For the last layers, "
            "give their indices: in a model of 12, the last is 11."
        )


def check_type(config: LNTuneConfig, name: str, kind: type) -> None:
    """Check a field that holds a value of one type.

    Args:
        config: the config.
        name: of the field.
        kind: the type.

    Raises:
        ConfigError: the field holds a value of another type.
    """
    value = getattr(config, name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        article = "an" if kind is int else "a"
        raise ConfigError(f"{name} takes {article} {kind.__name__}, but got {value!r} of type {type(value).__name__}.")


def check_choice(config: LNTuneConfig, name: str, allowed: tuple[str, ...]) -> None:
    """Check a field that holds one of a few values.

    Args:
        config: the config.
        name: of the field.
        allowed: the values.

    Raises:
        ConfigError: the field holds none of the values.
    """
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}.")
