"""The base of all configs: where to tune, in which dtype, and the manifest of a saved adapter."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

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
from peft_lntune.version import INSTALL, __version__

__all__ = ["CONFIG_FILE", "FORMAT_VERSION", "PART_KINDS", "PEFT_TYPE", "DtypeName", "LNTuneConfig", "part_kind"]

Kind = TypeVar("Kind", bound="LNTuneConfig")

DtypeName = Literal["float32", "float64", "bfloat16", "float16"]

FORMAT_VERSION = 1
"""Version of the saved files. A file of another version is refused."""


@dataclass(kw_only=True)
class LNTuneConfig(PeftConfig):
    """Base of all configs. Do not use it directly: use a subclass, such as `LNTuningConfig`.

    Args:
        target_modules: names (or endings of names) of the modules to tune, or one regular expression for the whole
            name. Any module with a floating weight can be named. None: what the subclass searches for, usually all
            norms.
        exclude_modules: names (or endings of names) of modules to leave out, or one regular expression.
        layers_to_transform: index or indices of the layers to tune. Modules outside numbered layers (embedding and
            final norms) are then left out.
        layers_pattern: name of the list that holds the layers, for models with several lists.
        modules_to_save: modules to train fully and save with the adapter, such as a classification head.
        delta_dtype: dtype of the deltas, such as `"float32"`. None: float32, or the base dtype if that is wider.
        save_dtype: dtype of the values in the file, such as `"bfloat16"`, which halves the file. None: that of the
            deltas.
        init_weights: True starts as the identity. False starts at random, for tests.
        kind: name of the config class; filled in.
        format_version: version of the saved files; filled in.
        peft_lntune_version: version of this package that made the config; filled in.
        manifest: digest and contents of the weight file saved with this config, to notice a mismatch; filled in.

    Raises:
        ConfigError: a field has a value that is not allowed.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    delta_dtype: DtypeName | None = None
    save_dtype: DtypeName | None = None
    init_weights: bool = True
    kind: str = ""
    format_version: int = FORMAT_VERSION
    peft_lntune_version: str = __version__
    manifest: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for own in fields(self):
            if own.name != "mask_source":  # checked by its own class, which refuses arrays
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
            self.layers_to_transform = list(self.layers_to_transform)  # JSON has only lists
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
        """`delta_dtype` as a `torch.dtype`; None if it is not set."""
        return floating_dtype(self, "delta_dtype")

    @property
    def torch_save_dtype(self) -> torch.dtype | None:
        """`save_dtype` as a `torch.dtype`; None if it is not set."""
        return floating_dtype(self, "save_dtype")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config as `adapter_config.json`. The file appears whole or not at all, with an updated manifest.

        To change a field of a saved adapter, load its config, set the field, and save it into the same folder.

        Args:
            save_directory: the folder; made if it is missing.
            **kwargs: further arguments of PEFT's `save_pretrained`.

        Raises:
            AssertionError: `save_directory` is a file.
        """
        target = Path(save_directory)
        if target.is_file():
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        target.mkdir(parents=True, exist_ok=True)
        name_import(target)
        with new_file(target / CONFIG_FILE) as written:
            super().save_pretrained(str(written.parent), **kwargs)
            with suppress(AdapterFileError):  # no weights yet, or damaged ones, which loading refuses
                seal_file(written, SavedAdapter(target).weights)

    @property
    def is_sealed(self) -> bool:
        """Whether the adapter was saved with a digest that also covers its heads and its config.

        False for an adapter that was not saved yet, and for files of early versions, whose digest covers only the
        tensors of the parts. Load and save such an adapter once to cover the rest.
        """
        return is_sealed(self.manifest)

    @property
    def deltas(self) -> Any:
        """The `DeltaConfig` that this config is or contains; None if it has no deltas."""
        return None

    @property
    def masks_are_fixed(self) -> bool:
        """Whether the adapter of this config has masks that training does not change."""
        return False

    def unmasked(self) -> "LNTuneConfig":
        """Copy the config for a new adapter that tunes every entry.

        Returns:
            A copy without manifest and without `mask_source`.

        Example:
            >>> from peft_lntune import LNTuningConfig
            >>> LNTuningConfig(mask_source={"made": "by hand"}).unmasked().mask_source is None
            True
        """
        return replace(self, manifest=None)

    def take_sizes(self, saved: "LNTuneConfig") -> None:
        """Mark this config for loading the adapter that was saved with `saved`.

        At the next injection, masked deltas get the sizes they have in the file.

        Args:
            saved: the config that was saved with the weights.
        """
        self.manifest = saved.manifest
        self.__dict__["stored"] = saved.__dict__.get("stored", True)

    def take_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """Record the shapes in the weight file, so that the next injection can check the config against them.

        Args:
            shapes: shape of each tensor in the file, by name.
        """
        self.__dict__["stored"] = shapes

    @property
    def stored_counts(self) -> dict[str, int | None]:
        """Number of tuned entries per parameter in the file about to be loaded; empty if every entry is tuned."""
        counts = (self.manifest or {}).get("tuned", {}) if "stored" in self.__dict__ else {}
        return {new_name(f"{place}.weight").removesuffix(".weight"): count for place, count in counts.items()}

    @property
    def stored_shapes(self) -> Mapping[str, torch.Size] | None:
        """Shapes of the tensors in the file about to be loaded, by their names in the model; None if not known."""
        stored = self.__dict__.get("stored")
        return {new_name(name): shape for name, shape in stored.items()} if isinstance(stored, Mapping) else None

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a config from a JSON file.

        Args:
            path_json_file: an `adapter_config.json`.
            **kwargs: accepted for PEFT, and not used.

        Returns:
            The fields by name.

        Raises:
            ConfigError: the file is damaged or not a JSON object; the message names the file.
        """
        try:
            return read_config(path_json_file)
        except AdapterFileError as error:
            raise ConfigError(str(error)) from error


PART_KINDS: dict[str, type[LNTuneConfig]] = {}
"""The config classes for one method each, by the name that a file gives as `kind`; filled by `part_kind`."""


def part_kind(cls: type[Kind]) -> type[Kind]:
    """Register a config class in `PART_KINDS`, as a decorator, so that files can name it.

    Args:
        cls: a config class for one method.

    Returns:
        The class itself.
    """
    PART_KINDS[cls.__name__] = cls
    return cls


def plain(value: Any, arrays: bool = True) -> Any:
    """Convert numbers and arrays of numpy and torch to those of JSON, also inside lists, tuples, sets and dicts.

    Args:
        value: value of a field.
        arrays: whether to convert arrays of more than one number; if False they stay as they are.

    Returns:
        The converted value; any other value unchanged.

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
    """Refuse a `format_version` that this version of the package cannot read.

    Args:
        version: `format_version` of a config.

    Raises:
        ConfigError: the version is not `FORMAT_VERSION`.
    """
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"this adapter has format_version {version!r}, and peft_lntune {__version__} reads {FORMAT_VERSION}. "
            f"Upgrade with `{INSTALL} -U`, or save the adapter again."
        )


def check_counts(counts: Any) -> None:
    """Refuse a damaged `manifest["tuned"]`.

    Args:
        counts: number of tuned entries by parameter, None for all.

    Raises:
        ConfigError: a count is not a whole number of at least 1, or None.
    """
    sizes = counts.values() if isinstance(counts, dict) else [counts]
    wrong = [size for size in sizes if size is not None and (type(size) is not int or size < 1)]
    if wrong:
        raise ConfigError(
            "manifest['tuned'] holds a number of entries, at least 1, or null for each tuned parameter, but got "
            f"{wrong[0]!r}. It is filled in when an adapter is saved; get a good copy of adapter_config.json."
        )


def floating_dtype(config: LNTuneConfig, name: str) -> torch.dtype | None:
    """Look up the dtype that a field names.

    Args:
        config: the config.
        name: name of the field.

    Returns:
        The dtype; None if the field is None.

    Raises:
        ConfigError: the field does not name a floating dtype.
    """
    value = getattr(config, name)
    if value is None:
        return None
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            f"{name}={value!r} is not a floating dtype of torch. "
            'Use "float32", "float64", "bfloat16" or "float16", or leave it out.'
        )
    return dtype


def check_names(config: LNTuneConfig, name: str, one_string: bool = True) -> None:
    """Check a field that holds names of modules.

    Args:
        config: the config.
        name: name of the field.
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
        name: name of the field.

    Raises:
        ConfigError: the field holds neither an index nor a list of indices.
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


def check_roles(config: Any, allowed: Collection[str], searched: str) -> None:
    """Check the field `roles`, and turn it into a list.

    Args:
        config: a config with the field; one string becomes a list of one.
        allowed: the roles to choose from.
        searched: what the roles choose among, for the message.

    Raises:
        ConfigError: no role is given, a role is unknown, or `target_modules` is given too.
    """
    if isinstance(config.roles, str):
        config.roles = [config.roles]
    check_names(config, "roles", one_string=False)
    if not config.roles or not set(config.roles) <= set(allowed):
        raise ConfigError(f"roles={config.roles!r}: choose one or more of {', '.join(map(repr, allowed))}.")
    config.roles = sorted(config.roles) if isinstance(config.roles, set) else list(config.roles)
    if config.target_modules is not None:
        raise ConfigError(
            f"roles={config.roles!r} narrows the search for {searched}, but target_modules={config.target_modules!r} "
            "replaces that search. Give one of the two."
        )


def check_type(config: LNTuneConfig, name: str, kind: type) -> None:
    """Check a field that holds a value of one type.

    Args:
        config: the config.
        name: name of the field.
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
        name: name of the field.
        allowed: the values.

    Raises:
        ConfigError: the field holds another value.
    """
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not allowed; choose one of {', '.join(map(repr, allowed))}.")
