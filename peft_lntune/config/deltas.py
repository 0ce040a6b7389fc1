"""What configs share whose adapters are deltas on weights and biases: which of the two, and how a mask was made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from peft_lntune.config.base import LNTuneConfig, check_choice, plain
from peft_lntune.errors import ConfigError

__all__ = ["DeltaConfig", "recorded"]

TUNE = ("both", "weight", "bias")


@dataclass(kw_only=True)
class DeltaConfig(LNTuneConfig):
    """Base of the configs whose adapters are deltas. Not used by itself: take `LNTuningConfig` or another kind.

    Args:
        tune: `"weight"`, `"bias"`, or `"both"`.
        mask_source: where only some entries are tuned, how their mask was made: the method and its settings, or what it
            was combined from; never data. Filled in.

    Further arguments: see `LNTuneConfig`.
    """

    tune: str = "both"
    mask_source: dict[str, Any] | None = None

    def _check(self) -> None:
        super()._check()
        self.mask_source = None if self.mask_source is None else recorded(self.mask_source)
        check_choice(self, "tune", TUNE)

    @property
    def deltas(self) -> "DeltaConfig":
        return self

    @property
    def masks_are_fixed(self) -> bool:
        return self.mask_source is not None

    @property
    def chooses_entries(self) -> bool:
        """Whether only some entries are tuned, or shall be."""
        return self.mask_source is not None

    def with_mask_source(self, source: dict[str, Any] | None) -> "DeltaConfig":
        """A copy that says how the mask of its adapter was made."""
        return replace(self, mask_source=source)

    def unmasked(self) -> "DeltaConfig":
        return replace(self, manifest=None, mask_source=None)

    def take_sizes(self, saved: LNTuneConfig) -> None:
        super().take_sizes(saved)
        self.mask_source = getattr(saved, "mask_source", None)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters to tune."""
        return ("weight", "bias") if self.tune == "both" else (self.tune,)


def recorded(source: Any) -> dict[str, Any]:
    """A `mask_source` as it comes back from the JSON of a saved config.

    Raises:
        ConfigError: it is no dict, or holds what JSON has no word for.
    """
    if not isinstance(source, Mapping):
        raise ConfigError(f"mask_source takes a dict, but got {source!r} of type {type(source).__name__}.")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(plain(dict(source), arrays=False)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"mask_source={source!r} cannot be saved: {error}. It says in words and numbers how a mask was made."
        ) from error
    return copied
