"""Base of the configs for deltas on weights and biases: which of the two, and how a mask was made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from peft_lntune.config.base import LNTuneConfig, check_choice, plain
from peft_lntune.errors import ConfigError

__all__ = ["DeltaConfig", "Tune", "recorded"]

Tune = Literal["both", "weight", "bias"]
TUNE: tuple[Tune, ...] = get_args(Tune)


@dataclass(kw_only=True)
class DeltaConfig(LNTuneConfig):
    """Base of the configs whose adapters are deltas. Do not use it directly: use `LNTuningConfig` or another subclass.

    Args:
        tune: `"weight"`, `"bias"`, or `"both"`.
        mask_source: how the mask was made if only some entries are tuned: the method and its settings, or the adapters
            it was combined from; never data. Filled in.

    Further arguments: see `LNTuneConfig`.

    Raises:
        ConfigError: a field has a value that is not allowed.
    """

    tune: Tune = "both"
    mask_source: dict[str, Any] | None = None

    def _check(self) -> None:
        super()._check()
        self.mask_source = None if self.mask_source is None else recorded(self.mask_source)
        check_choice(self, "tune", TUNE)

    @property
    def deltas(self) -> "DeltaConfig":
        """This config itself."""
        return self

    @property
    def masks_are_fixed(self) -> bool:
        """Whether a mask was set."""
        return self.mask_source is not None

    @property
    def chooses_entries(self) -> bool:
        """Whether only some entries are tuned, or will be."""
        return self.mask_source is not None

    def with_mask_source(self, source: dict[str, Any] | None) -> "DeltaConfig":
        """Copy the config with another `mask_source`.

        Args:
            source: how the mask was made; None: no mask.

        Returns:
            The copy.
        """
        return replace(self, mask_source=source)

    def unmasked(self) -> "DeltaConfig":
        """Copy the config for a new adapter that tunes every entry.

        Returns:
            A copy without manifest and without `mask_source`.
        """
        return replace(self, manifest=None, mask_source=None)

    def take_sizes(self, saved: LNTuneConfig) -> None:
        """Mark this config for loading the adapter that was saved with `saved`, and take its `mask_source`.

        Args:
            saved: the config that was saved with the weights.
        """
        super().take_sizes(saved)
        self.mask_source = getattr(saved, "mask_source", None)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters to tune."""
        return ("weight", "bias") if self.tune == "both" else (self.tune,)


def recorded(source: Any) -> dict[str, Any]:
    """Convert a `mask_source` to what it will be after saving and loading it as JSON.

    Args:
        source: a dict of words and numbers.

    Returns:
        A new dict.

    Raises:
        ConfigError: `source` is not a dict, or JSON cannot hold it.
    """
    if not isinstance(source, Mapping):
        raise ConfigError(f"mask_source takes a dict, but got {source!r} of type {type(source).__name__}.")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(plain(dict(source), arrays=False)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"mask_source={source!r} cannot be saved: {error}. Give words and numbers that say how the mask was made."
        ) from error
    return copied
